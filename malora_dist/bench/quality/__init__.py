"""`malora bench quality`: which method learns better, at equal parameters, each at its own best learning rate."""
