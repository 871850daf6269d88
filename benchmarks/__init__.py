"""Measurements that take minutes and want a quiet machine; `make bench` runs them."""
