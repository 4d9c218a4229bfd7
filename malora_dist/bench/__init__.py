"""`malora bench`: variants of one recipe, measured side by side in one set of processes."""
