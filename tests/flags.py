"""Flags of XLA that tests run with."""

QUICK = "--xla_backend_optimization_level=0"
"""Code that is compiled in two thirds of the time, and is no slower at the sizes of tests. The
long-running tests (`make test-slow`) take it as users get it."""
