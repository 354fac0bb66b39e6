"""Parts of `benchmarks/peers.py`; workers/ has a file for each library."""
