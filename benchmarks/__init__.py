"""Benchmarks: what is computed again, what is kept, and what that is worth. See README.md."""
