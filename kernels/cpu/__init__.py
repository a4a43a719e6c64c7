"""The same arithmetic for processors with AVX-512 BF16, compiled by numba: see vectors first."""
