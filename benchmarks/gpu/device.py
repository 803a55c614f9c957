"""How a call is timed: on a GPU by its own clock, or, for a dry run of all this code, on the CPU."""

from collections.abc import Callable
from time import perf_counter

import torch

import mmfast as mf
from benchmarks.gpu import launches
from benchmarks.timing import Call, Timing, summary
from mmfast.backends import cuda, library

CLEARED = 1 << 28  # bytes that are written before a cold call: more than any GPU's cache holds
COPIES = 20  # of a call in one graph: the time of its launch is shared by so many


class Gpu:
    """The current CUDA device, and the CUDA operators."""

    device, backend = torch.device("cuda"), "cuda"

    def __init__(self) -> None:
        self.name = torch.cuda.get_device_name()
        self.architecture = "sm_{}{}".format(*torch.cuda.get_device_capability())
        self.space = torch.empty(CLEARED, dtype=torch.uint8, device=self.device)

    def event(self) -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _timed(self, call: Call, rounds: int, before: Call | None = None) -> list[float]:
        """Seconds of each call between two events."""
        found = []
        for _ in range(rounds):
            if before is not None:
                before()
            start = self.event()
            call()
            end = self.event()
            end.synchronize()
            found.append(start.elapsed_time(end) * 1e-3)
        return found

    def cold(self, call: Call, rounds: int) -> Timing:
        """The GPU's time of a call whose data are in no cache; the host prepares it while the GPU clears the cache."""
        call()
        return summary(self._timed(call, rounds, lambda: self.space.add_(1)))

    def eager(self, call: Call, rounds: int) -> Timing:
        """From an idle GPU, what the host does included."""
        call()
        torch.cuda.synchronize()
        return summary(self._timed(call, rounds, torch.cuda.synchronize))

    def graphed(self, call: Call, rounds: int, copies: int = COPIES) -> tuple[Timing, int]:
        """(one call's share of a replayed graph of so many copies, kernels of one call). A call that waits for the GPU cannot be captured and raises."""
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                call()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph(keep_graph=True)
        with torch.cuda.graph(graph):
            for _ in range(copies):
                call()
        kernels, _ = launches.count(self.architecture, graph.raw_cuda_graph())
        graph.instantiate()
        graph.replay()
        times = self._timed(graph.replay, rounds)
        return summary([time / copies for time in times]), kernels // copies

    def empty_launch(self) -> Call:
        """A cooperative launch of a block for each processor that does nothing."""
        found, blocks = launches.library(self.architecture), torch.cuda.get_device_properties(self.device).multi_processor_count
        return lambda: launches.check(found.empty_cooperative(blocks, torch.cuda.current_stream().cuda_stream))

    def plan(self, rule: mf.Resolver, k: int, n: int, size: int) -> tuple[str, int, int, int]:
        """(path, bytes read, bytes written, launches) of a resolve of one problem."""
        return cuda.plan(torch.cuda.current_device(), size, k, k, 1, n, sum(part.state_size(k) for part in rule.chain() or []), 0)


class Host:
    """The CPU in a GPU's place: its times say nothing, but every line of the measurement runs."""

    device, name = torch.device("cpu"), "dry run"
    backend = "cpu" if library.available else "reference"

    def cold(self, call: Call, rounds: int) -> Timing:
        found = []
        for _ in range(rounds):
            start = perf_counter()
            call()
            found.append(perf_counter() - start)
        return summary(found)

    eager = cold

    def graphed(self, call: Call, rounds: int, copies: int = COPIES) -> tuple[Timing, int]:
        return self.cold(call, rounds), 4

    def empty_launch(self) -> Call:
        return lambda: None

    def plan(self, rule: mf.Resolver, k: int, n: int, size: int) -> tuple[str, int, int, int]:
        return "two_pass", 2 * k * n * size, n * size, 4


Device = Gpu | Host
Make = Callable[[], Call]  # a call, prepared when its turn comes
