"""What group= costs: calculated for clusters of GPUs, measured here for processes over gloo. `python -m benchmarks.ranks` prints both tables of docs/distributed.md.

The calculation is that of a tree, up and down: a constant, a latency for each step, and the bytes over the bandwidth. Its latencies are the constants that NCCL
itself chooses its algorithms by (src/graph/tuning.cc of 2.2x, tree), its bandwidths those of the hardware's data sheets.
"""

import math
import os
import tempfile
import time
import warnings

import torch
import torch.distributed as dist

import mmfast as mf

NODE = 8  # GPUs of a node
START = {"small": 6.8e-6, "large": 8.4e-6}  # seconds; NCCL's protocols LL and Simple
NVLINK = {"small": 0.6e-6, "large": 4e-6}  # seconds a step within a node
NETWORK = {"small": 5e-6, "large": 14e-6}  # seconds a step between nodes
WITHIN = 450e9  # bytes per second and direction of a GPU: NVLink 4
BETWEEN = 8 * 50e9  # of a node: eight ports of 400 Gb/s
RESNET18 = 11_689_512  # parameters


def all_reduce_seconds(size: int, ranks: int) -> float:
    """Of `size` bytes over GPUs in nodes of eight."""
    kind = "small" if size <= 1 << 16 else "large"
    nodes = max(1, ranks // NODE)
    steps = 2 * ((min(ranks, NODE) - 1) * NVLINK[kind] + math.log2(nodes) * NETWORK[kind])
    bandwidth = WITHIN if nodes == 1 else min(WITHIN, BETWEEN)
    efficiency = 0.5 if kind == "small" else 1.0  # LL sends a flag with each word
    return START[kind] + steps + 2 * (ranks - 1) / ranks * size / (bandwidth * efficiency)


def calculated() -> None:
    columns = {
        "block, K = 4": [8 * 16, 16],
        "block, K = 16": [8 * 256, 16],
        "block, K = 256": [8 * 65536, 16],
        "batch_sum, K = 16, d = 512": [8 * 16 * 512],
        "backward, K = 4, ResNet-18": [4 * RESNET18] * 4,
        "DDP, ResNet-18": [4 * RESNET18],
    }
    print("| GPUs | " + " | ".join(columns) + " |\n|--:|" + "--:|" * len(columns))
    for ranks in (8, 64, 512, 4096):
        times = [sum(all_reduce_seconds(size, ranks) for size in sizes) for sizes in columns.values()]
        print(f"| {ranks:,} | " + " | ".join(f"{t * 1e6:.0f} µs" if t < 1e-3 else f"{t * 1e3:.2f} ms" for t in times) + " |")


def least(call, times: int = 300) -> float:
    """The shortest of many: where processes share the cores with others, a longer one says how long one of them waited for a core."""
    samples = []
    for _ in range(times):
        start = time.perf_counter()
        call()
        samples.append(time.perf_counter() - start)
    return min(samples)


def step(k: int, n: int, group) -> float:
    """Seconds of a fork of n numbers and its backward pass."""
    rule, y, grads = mf.UPGrad(), torch.zeros(n, requires_grad=True), list(torch.randn(k, n))
    return least(lambda: torch.autograd.backward(mf.fork(y, k, rule, group=group), grads))


def measured(ranks: int) -> None:
    """Prints a row, from the first of `ranks` processes of one thread each."""
    with tempfile.TemporaryDirectory() as folder:
        children = []
        for rank in range(ranks):
            if not (child := os.fork()):
                try:
                    row(rank, ranks, f"{folder}/store")
                finally:
                    os._exit(0)
            children.append(child)
        for child in children:
            os.waitpid(child, 0)


def row(rank: int, ranks: int, store: str) -> None:
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", "a process group of .* is up")
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=ranks)
    x = torch.zeros(16, dtype=torch.float64)
    times = [least(lambda: dist.all_reduce(x))]
    for k in (4, 16):
        times += [step(k, 1 << 16, None), step(k, 1 << 16, dist.group.WORLD)]
    if rank == 0:
        os.write(1, (f"| {ranks} | " + " | ".join(f"{t * 1e6:.0f} µs" for t in times) + " |\n").encode())
    dist.destroy_process_group()


def main() -> None:
    print("Calculated: seconds on the wire of one training step.\n")
    calculated()
    print("\nMeasured here, over gloo on one machine: fork and backward pass, N = 65536 on each rank, the shortest of 300.\n", flush=True)
    print(
        "| processes | all-reduce, 16 numbers | K = 4 alone | with group= | K = 16 alone | with group= |\n|--:|--:|--:|--:|--:|--:|",
        flush=True,
    )
    for ranks in (2, 4):
        measured(ranks)


if __name__ == "__main__":
    main()
