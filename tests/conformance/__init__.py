"""torch's own distributed test suite over any c10d backend. README.md explains."""
