"""The CUDA kernels' real PTX on a CPU: a translator, a machine of fibers, a stand-in for the CUDA runtime, and tests of every path (docs/gpu.md)."""
