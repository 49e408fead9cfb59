"""Measurements that are not part of the product; run them from the repository: `python -m
benchmarks.peers`.
"""
