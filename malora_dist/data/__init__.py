"""Task files -> checked examples -> tokens -> micro-batches, the same for any number of processes."""
