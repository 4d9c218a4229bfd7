"""`malora convert SRC DST --to KIND`: adapters and checkpoints in other forms, on a machine without a GPU."""
