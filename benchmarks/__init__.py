"""Benchmarks of seconds and memory, and tests with damaged inputs and killed runs. See README.md."""
