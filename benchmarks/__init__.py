"""The benchmark beside PyTorch, which is no part of the package: python benchmarks/bench.py"""
