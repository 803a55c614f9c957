"""A device whose kernels are under test: its paths, and how they are launched and waited for without disturbing anybody."""

import contextlib
import time
from collections.abc import Iterator
from typing import Any

import torch

from mmfast.backends import cuda

PATIENCE = 2.0  # seconds after which a kernel counts as hung: the slowest takes milliseconds


class Target:
    """The kernels of one backend on one device."""

    exact = False  # whether the bits of the CPU operators are promised
    paths: tuple[str, ...] = ("two_pass", "heads", "elementwise")

    def __init__(self, backend: str, device: torch.device, functions: Any) -> None:
        self.backend, self.device, self.functions = backend, device, functions

    @contextlib.contextmanager
    def taking(self, path: str) -> Iterator[None]:
        """Calls inside take this path, and raise where they cannot."""
        yield

    def finished(self) -> bool:
        """Whether what was launched ends while somebody would still wait for it."""
        return True

    def alive(self) -> bool:
        """Whether the device still answers after an error."""
        return True


class GpuTarget(Target):
    """A GPU, on a stream of its own that is asked and never waited for: a hung kernel must not hang the process."""

    def __init__(self, backend: str, device: torch.device, functions: Any) -> None:
        super().__init__(backend, device, functions)
        self.stream = torch.cuda.Stream(device)

    @contextlib.contextmanager
    def taking(self, path: str) -> Iterator[None]:
        with torch.cuda.device(self.device), torch.cuda.stream(self.stream):
            torch.cuda.synchronize()  # streams may share a queue: what the caller has begun before is no hang of ours
            yield

    def finished(self) -> bool:
        event = torch.cuda.Event()
        event.record(self.stream)
        end = time.monotonic() + PATIENCE
        while not event.query():
            if time.monotonic() > end:
                return False
            time.sleep(1e-4)
        return True

    def alive(self) -> bool:
        try:
            return self.finished()
        except RuntimeError:
            return False


class CudaTarget(GpuTarget):
    """The compiled CUDA kernels."""

    exact = True

    def __init__(self, device: torch.device) -> None:
        super().__init__("cuda", device, cuda)
        found = cuda.paths(device.index)
        self.paths = tuple(p for p in ("two_pass", "overlap", "persistent", "cluster", "per_sample") if p in found) + (
            "heads",
            "elementwise",
        )

    @contextlib.contextmanager
    def taking(self, path: str) -> Iterator[None]:
        with super().taking(path), forced(path):
            yield


def forced(path: str) -> contextlib.AbstractContextManager[None]:
    """The compiled CUDA kernels by this path and no other."""
    return cuda.force(path if path in ("persistent", "cluster", "per_sample") else "two_pass", overlap=path == "overlap")
