"""How fast mmfast is: every claimed number comes from here. Run `python -m benchmarks.bench`."""
