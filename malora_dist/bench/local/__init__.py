"""`malora bench layer`, `step` and their kind: one process, no launcher, everyone on the same work."""
