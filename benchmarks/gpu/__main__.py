"""python -m benchmarks.gpu FILE.csv [--seconds S] [--dry]: times the CUDA operators on the GPU; --dry runs all of it on the CPU, tiny, to find what is broken."""

import argparse
import sys
from pathlib import Path

import torch

from benchmarks.gpu.device import Gpu, Host
from benchmarks.gpu.lines import Writer
from benchmarks.gpu.run import DRY, FULL, Run
from benchmarks.machine import environment
from mmfast.backends import cuda


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    parser.add_argument("file", type=Path)
    parser.add_argument("--seconds", type=float, default=120.0, help="no measurement begins later")
    parser.add_argument("--dry", action="store_true", help="on the CPU, with tiny sizes")
    asked = parser.parse_args(arguments)
    if not asked.dry and (reason := cuda.why_not()):
        print(f"nothing can be timed: {reason}", file=sys.stderr)
        return 3
    device = Host() if asked.dry else Gpu()
    env = environment() | {"gpu": device.name, "cuda": str(torch.version.cuda)}
    with asked.file.open("w", newline="") as file:
        Run(device, DRY if asked.dry else FULL, Writer(file, env).add, asked.seconds).all()
    return 0


if __name__ == "__main__":
    sys.exit(main())
