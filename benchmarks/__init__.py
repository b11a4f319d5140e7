"""Benchmarks of pycoll, each beside its peers in one run. `pycoll bench --help` lists them."""
