"""Kernels in Triton, for GPUs that the compiled binary does not serve."""
