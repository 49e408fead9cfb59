"""Measurements that are no part of the product; run as `python -m benchmarks.peers`."""
