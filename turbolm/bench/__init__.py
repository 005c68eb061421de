"""What this machine reaches: tokens per second of a model, and its matrix kernels beside the machine's limits."""
