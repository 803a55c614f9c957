"""What a training process keeps of the memory that it frees: page faults of steps that allocate and free the same, counted by the system."""

import os
import subprocess
import sys

import pytest

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="glibc's malloc")

STEPS = """
import ctypes, resource, sys, torch
from mmfast.experiments.memory import keep_memory
torch.set_num_threads(1)
kept = keep_memory()
if "back" in sys.argv:  # every tensor is memory of its own, and goes back at once
    ctypes.CDLL(None).mallopt(-3, 128 << 10)
def step():
    tensors = [torch.ones(500_000 * (1 + i)) for i in range(8)]  # up to 16 MB each, 72 in all
def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(30):
    step()
before = faults()
for _ in range(10):
    step()
print(kept, faults() - before)
"""


def run(*arguments, **environment):
    plain = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_TUNABLES"))}
    found = subprocess.run([sys.executable, "-c", STEPS, *arguments], env=plain | environment, capture_output=True, text=True, check=True)
    kept, faults = found.stdout.split()
    return kept == "True", int(faults)


def test_a_step_gets_the_pages_of_the_one_before():
    kept, faults = run()
    if not kept:
        pytest.skip("another malloc")
    assert faults < 50
    assert run("back")[1] > 200  # huge pages are 360; that the count sees it


def test_what_the_environment_says_is_left():
    kept, faults = run(MALLOC_MMAP_THRESHOLD_="131072")
    assert not kept and faults > 200
