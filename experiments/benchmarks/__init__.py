"""Benchmarks: each prints one JSON line.

Compile times are those of a program that is compiled anew: run them without `JAX_COMPILATION_CACHE_DIR`.
"""
