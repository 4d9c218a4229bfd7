"""A device that computes on the CPU, keeps CUDA's rules, and counts what a GPU would launch and wait for."""
