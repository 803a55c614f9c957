"""The processes of a group in test_group.py: `python group_ranks.py 2` starts two, each runs every case, and lines of JSON say how it went."""

import json
import os
import signal
import sys
import tempfile
import time
import traceback
import warnings
from datetime import timedelta

import group_problems
import group_training
import torch
import torch.distributed as dist
from group_shards import Shards, through_fork

import mmfast as mf

TIMEOUT = timedelta(minutes=5)  # one that fails ends, which the others hear at once
CASES = {
    name.removeprefix("case_"): case
    for module in (group_problems, group_training)
    for name, case in vars(module).items()
    if name.startswith("case_")
}


def run_rank(rank, world, store):
    torch.set_num_threads(1)
    warnings.simplefilter("error")
    warnings.filterwarnings("ignore", "a process group of .* is up")  # said of the one process that each rank compares with
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world, timeout=TIMEOUT)
    chosen = os.environ.get("GROUP_CASES", "").split() or CASES
    for name in chosen:
        torch.manual_seed(0)
        error = None
        try:
            CASES[name](rank, world)
        except BaseException:  # noqa: BLE001 what went wrong is the other process's to tell
            error = traceback.format_exc()
        os.write(1, (json.dumps({"world": world, "case": name, "rank": rank, "error": error}) + "\n").encode())
        if error:
            os._exit(1)  # the others hear it: their connection is closed
    dist.destroy_process_group()


def run_lost(rank, how, store):
    """The second rank is killed, or gets stuck, after one step; the first says what becomes of its own next one, and when."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2, timeout=timedelta(seconds=5))
    through_fork(list(Shards(rank, 2).mine()), mf.MGDA(), group=dist.group.WORLD)
    if rank:
        os.kill(os.getpid(), signal.SIGKILL if how == "killed" else signal.SIGSTOP)
    start, error = time.monotonic(), None
    try:
        through_fork(list(Shards(rank, 2).mine()), mf.MGDA(), group=dist.group.WORLD)
    except RuntimeError as raised:
        error = str(raised)
    os.write(1, (json.dumps({"how": how, "seconds": time.monotonic() - start, "error": error}) + "\n").encode())


def forked(ranks, call):
    """Processes that call(rank)."""
    children = []
    for rank in range(ranks):
        if not (child := os.fork()):
            try:
                call(rank)
            except BaseException:  # noqa: BLE001 the process ends here
                traceback.print_exc()
            finally:
                os._exit(0)
        children.append(child)
    return children


def main(what):
    """Forks the ranks, so that torch is imported once."""
    with tempfile.TemporaryDirectory() as folder:
        if what in ("killed", "stuck"):
            first, second = forked(2, lambda rank: run_lost(rank, what, f"{folder}/store"))
            os.waitpid(first, 0)
            os.kill(second, signal.SIGKILL)
            os.waitpid(second, 0)
            return
        world = int(what)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.compile(lambda x: x + 1, backend="aot_eager")(torch.ones(1))  # what it imports, the ranks need not
        for child in forked(world, lambda rank: run_rank(rank, world, f"{folder}/store")):
            os.waitpid(child, 0)


if __name__ == "__main__":
    for what in sys.argv[1:]:
        main(what)
