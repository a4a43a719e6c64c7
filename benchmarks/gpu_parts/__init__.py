"""The phases of benchmarks/gpu.py, one file for what is measured."""
