"""Whether the kernels of a GPU may serve backend="auto": they have proved themselves on this device, driver and torch, path by path."""

import contextlib
import itertools
import json
import os
import time
from collections.abc import Iterator, Sequence
from datetime import timedelta

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from mmfast import contract
from mmfast.backends import cpu, cuda, ladder, library, reference, verdict
from mmfast.backends.target import CudaTarget, Target
from mmfast.backends.verdict import Result

CHECK = "python -m mmfast doctor --check"
NOT_TAKEN = "is none that these gradients and rules, or this device, take"  # csrc/ops_cuda.cpp of a forced path
OUT_OF_MEMORY = "out of memory"  # torch's word and the driver's: it says nothing of the kernels
Results = dict[tuple[str, str], Result]


@contextlib.contextmanager
def apart() -> Iterator[None]:
    """Neither autograd, autocast, a mode, a transformation nor a generator of the caller's sees what runs inside."""
    with contextlib.ExitStack() as stack:
        for kind in ("cpu", "cuda"):
            if torch.amp.is_autocast_available(kind):
                stack.enter_context(torch.autocast(kind, enabled=False))
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.no_grad())
        stack.enter_context(_disable_current_modes())
        stack.enter_context(torch._C.DisableTorchFunction())  # torch.set_default_device is such a mode
        stack.enter_context(torch._C._DisableFuncTorch())
        yield


def climb(target: Target, path: str, thorough: bool = False) -> tuple[Result, bool]:
    """(what one path does with its problems; whether the device still serves afterwards)."""
    start, problems, found, usable = time.monotonic(), ladder.problems(path, thorough), [], True
    hung = "it did not end within two seconds; restart this process before you use the device again"
    oracle = cpu if library.available and target.backend != "cpu" else reference
    worst, why, wanted = 0.0, "", []
    try:
        with target.taking(path):
            poison = torch.full((1 << 17,), float("nan"), dtype=torch.float64, device=target.device)
            del poison  # what a kernel reads before somebody has written it is no number
            tried = []
            for seed, problem in enumerate(problems):
                try:
                    found.append(problem.run(target.functions, target.device, seed))
                    tried.append((seed, problem))
                except RuntimeError as error:
                    if NOT_TAKEN not in str(error):
                        raise
                if not target.finished():  # the inputs of the next problem would wait for it, and for ever
                    return Result(target.backend, path, False, len(tried), seconds=time.monotonic() - start, why=hung), False
            if not tried:
                raise RuntimeError("the device refused every launch of it")
            together = torch.cat([x.contiguous().view(-1).view(torch.uint8) for tensors in found for x in tensors])
            wanted = [ladder.wanted(problem, oracle, seed) for seed, problem in tried]
            if not target.finished():
                why, usable = hung, False
            else:
                host = iter(split(together.to("cpu"), [x for tensors in found for x in tensors]))
                for (_, problem), tensors in zip(tried, wanted, strict=True):
                    ours = [next(host) for _ in tensors]
                    error_of, wrong = ladder.differences(problem, ours, tensors, target.exact)
                    worst, why = max(worst, error_of), why or wrong or ""
    except Exception as error:  # noqa: BLE001 whatever a device or a compiler dies of, this path is out and the reason is told
        why = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        usable = target.alive()
    return Result(target.backend, path, not why, len(wanted), worst, time.monotonic() - start, why), usable


def split(flat: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
    """The tensors whose bytes lie one after the other."""
    parts = flat.split([x.numel() * x.element_size() for x in like])
    return [part.clone().view(x.dtype).view(x.shape) for part, x in zip(parts, like, strict=True)]


def prove(target: Target, kept: verdict.Kept, known: Results, thorough: bool = False) -> Results:
    """`known` with results of the target's other paths, kept for the next process; a path that a dead process was testing is not tried."""
    results = dict(known)
    with kept.testing() as alone, apart():
        dead = kept.marked() if alone else None
        if dead and dead not in results:
            results[dead] = Result(*dead, False, why="the process that tested it before was gone without an answer")
        for path in target.paths:
            if (target.backend, path) in results:
                continue
            if alone:
                kept.mark(target.backend, path)
            try:
                results[target.backend, path], usable = climb(target, path, thorough)
            except BaseException:  # somebody's Ctrl-C: this process is not gone
                if alone:
                    kept.unmark()
                raise
            if not usable:
                break
        else:
            if alone:
                kept.unmark()
        if alone and results != known:
            kept.save({key: result for key, result in results.items() if OUT_OF_MEMORY not in result.why})
    return results


_rounds = itertools.count()  # in which the ranks of a job agree: what a rank said in an earlier one is no answer


def agree(left_out: set[str], patience: float = 30.0) -> set[str]:
    """The paths that any rank of this job leaves out: all ranks are to take the same ones."""
    distributed = torch.distributed
    if not (distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1):
        return left_out
    store = distributed.distributed_c10d._get_default_store()
    turn = next(_rounds)
    keys = [f"mmfast left out by {rank}, {turn}" for rank in range(distributed.get_world_size())]
    store.set(keys[distributed.get_rank()], json.dumps(sorted(left_out)))
    try:
        store.wait(keys, timedelta(seconds=patience))
    except RuntimeError:
        contract.tell(f"not every rank has used mmfast on its GPU within {patience:g} s; this one goes by what its own GPU does")
        return left_out
    return left_out.union(*(json.loads(store.get(key)) for key in keys))


_serves: dict[int, dict[str, str]] = {}  # of each device: which backend serves what needs a path
_results: dict[int, Results] = {}
_reasons: dict[int, str] = {}  # why plain torch serves
_told: set[str] = set()


def tell_once(message: str) -> None:
    if message not in _told:
        _told.add(message)
        contract.tell(message)


def serving(device: torch.device, needs: str, compiling: bool = False) -> str:
    """The backend that serves calls on a GPU that need a path: "cuda", "triton" or "reference" until one has proved itself."""
    index = torch.cuda.current_device() if device.index is None else device.index
    found = _serves.get(index)
    if found is None:
        found = _decide(torch.device("cuda", index), compiling)
    return found.get(needs, "reference")


def _decide(device: torch.device, compiling: bool) -> dict[str, str]:
    known = _known(device)
    if reason := cuda.why_not(device.index):  # whatever it could do before
        return _settle(device, {key: result for key, result in known.items() if key[0] != "cuda"}, reason)
    ready = ("cuda", "two_pass") in known
    if compiling or torch.cuda.is_current_stream_capturing():
        if not ready:
            tell_once(f"nothing is tested under torch.compile or while a CUDA graph is captured, so plain torch serves {device} here; "
                      "call mmfast.verify(), or any of its operators, once before")  # fmt: skip
            return {}
        return _settle(device, known)
    steered = os.environ.get("MMFAST_VERIFY") or ""
    if steered not in ("", "off", "force"):
        raise ValueError(f"MMFAST_VERIFY is {steered!r}, expected off, force or nothing")
    if steered == "off":
        return _settle(device, known, "" if ready else "MMFAST_VERIFY=off, and no test was made before")
    if cuda.code(device.index) != "machine" and not ready:
        return _settle(
            device,
            known,
            "the driver would have to compile the kernels for this device first, which takes minutes once; mmfast.verify() does that",
        )
    if steered == "force":
        known = {}
    return _settle(device, prove(CudaTarget(device), verdict.Kept(verdict.facts(device)), known))


def _known(device: torch.device) -> Results:
    return _results.get(device.index) or verdict.Kept(verdict.facts(device)).load()


def _settle(device: torch.device, results: Results, why_not: str = "") -> dict[str, str]:
    """What serves from now on, and the words on what does not."""
    _results[device.index] = results
    left_out = {f"{backend} {path}" for (backend, path), result in results.items() if not result.passed}
    together = agree(left_out)
    for name in sorted(together):
        backend, path = name.split()
        result = results.get((backend, path))
        why = result.why if result and not result.passed else "another rank of this job leaves it out"
        tell_once(f"mmfast leaves out the {path} kernels of backend {backend!r} on {device} ({why}); {CHECK} shows it again")
    passed = {key for key, result in results.items() if result.passed and " ".join(key) not in together}
    if ("cuda", "two_pass") in passed:
        cuda.allow(device.index, {path for backend, path in passed if backend == "cuda"})
    found = {}
    for path in ("two_pass", "heads", "elementwise"):
        found[path] = next((backend for backend in ("cuda", "triton") if (backend, path) in passed), "reference")
    if why_not and found["two_pass"] == "reference":
        _reasons[device.index] = why_not
        tell_once(f"plain torch serves {device}: {why_not}")
    _serves[device.index] = found
    return found


def replace(device: torch.device, results: Results) -> None:
    """What `verify` found counts from now on."""
    _serves.pop(device.index, None)
    _reasons.pop(device.index, None)
    _settle(device, results)


def words(index: int, backend: str) -> str:
    """What is known of a backend on a GPU, for people."""
    results = _known(torch.device("cuda", index))
    passed = [path for (name, path), result in results.items() if name == backend and result.passed]
    failed = [path for (name, path), result in results.items() if name == backend and not result.passed]
    if not passed and not failed:
        return _reasons.get(index) or "not tested on this device yet: mmfast.verify(), or the first call, does it"
    return f"proved on this device: {', '.join(passed) or 'nothing'}" + (f"; left out: {', '.join(failed)}" if failed else "")
