"""How long a resolve should take, from the bytes it moves: docs/gpu.md's table in numbers. What is not known is a guess that the first run on a GPU replaces."""

LAUNCH = 2.5  # us of a launch behind another
BARRIER = 1.5  # us in which all blocks wait for each other
CLUSTER_BARRIER = 0.2
FOLD = 3.0  # us in which each block of a persistent launch adds up to 450 slots
SOLVER = 3.0  # us of one warp with a problem of few rows: a guess
BLOCK_RATE = 1e5  # bytes per us that one block of a cluster reads
CLUSTER, CHUNK = 16, 4096  # blocks of a cluster at most, elements of a slot at least

# us of a training step as a CUDA graph of some 150 nodes; LinearHeads add two launches, two grid barriers and the solver
STEP = {"plain layer": 250.0, "LinearHeads": 260.0}


def microseconds(path: str, read: int, written: int, launches: int, n: int, rate: float) -> float:
    """Of a resolve of N elements by `path`, where the device copies `rate` bytes per us."""
    if path == "cluster":
        blocks = min(CLUSTER, 1 << max(0, -(-n // CHUNK) - 1).bit_length())
        return LAUNCH + (read + written) / blocks / BLOCK_RATE + 2 * CLUSTER_BARRIER + SOLVER
    moved = (read + written) / rate
    return LAUNCH + moved + BARRIER + FOLD + SOLVER if path == "persistent" else launches * LAUNCH + moved + SOLVER
