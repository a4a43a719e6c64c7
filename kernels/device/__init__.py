"""Kernels in Triton for a CUDA device, each with its bound and a torch reference."""
