"""How fast mmfast is: every claimed number comes from here. Run `python -m benchmarks.bench`."""

import os

# The peers' matrices are small, and after each call OpenBLAS's threads spin for a while, beside whoever is timed next; read when NumPy is first imported.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
