"""What nvcc and its assembler made of csrc/cuda: looked at without a GPU."""

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from mmfast.backends import library

LOGS = Path(__file__).parent.parent / "build" / "cuda"
cuda = library.read_facts(library.PATH).get("cuda")
pytestmark = pytest.mark.skipif(not cuda or not LOGS.exists(), reason="mmfast was not built with CUDA in this folder")

HOT = (
    "gram_kernel",
    "fold_kernel",
    "sums_kernel",
    "presence_kernel",
    "combine_kernel",
    "graddrop_kernel",
    "trimmed_kernel",
    "products_kernel",
    "mask_delta_kernel",
    "lengths_kernel",
)
# bytes of a thread: arguments of the rules' functions, what a few of them spill, and whether a step is left out (every); with half of the registers more
SOLVER_STACK = {"solve_kernel": 928, "persistent_kernel": 1424}
# bytes of stack and of spills around the call for a problem whose lengths are measured, which few are: others pass it by
MEASURED = {"combine_kernel": (8, 0), "lengths_kernel": (24, 104)}
# bytes that the functions of persistent_kernel around its solver store: what registers hold for their caller, once a call
PHASE_SPILLS = {"read_phase": 48, "write_phase": 0}


def entries(architecture):
    """(kernel, registers, bytes of stack, bytes of spills) of every kernel."""
    found = []
    for log in sorted(LOGS.glob("*.ptxas")):
        parts = re.split(r"Compiling entry function '(\S+)' for 'sm_(\d+)'", log.read_text())
        for name, arch, text in zip(parts[1::3], parts[2::3], parts[3::3], strict=True):
            if arch != architecture:
                continue
            stack, stores, loads = map(
                int, re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", text).groups()
            )
            found.append((name, int(re.search(r"Used (\d+) registers", text)[1]), stack, stores + loads))
    return found


# what launches, asks of the device, or sets something to zero: none of it waits for the GPU, allocates or copies
CALLS = {
    "cudaLaunchKernelExC",
    "cudaMemset2DAsync",
    "cudaMemsetAsync",
    "cudaGetErrorString",
    "cudaGetLastError",
    "cudaDriverGetVersion",
    "cudaRuntimeGetVersion",
    "cudaGetDevice",
    "cudaDeviceGetAttribute",
    "cudaFuncSetAttribute",
    "cudaFuncGetAttributes",
    "cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags",
    "cudaOccupancyMaxActiveClusters",
}


def test_nothing_that_is_called_waits_for_the_device():
    if shutil.which("nm") is None:
        pytest.skip("nm is not installed")
    objects = [*LOGS.glob("cuda_*.o"), *LOGS.glob("ops_cuda*.o")]
    names = set(re.findall(r" U (cu[A-Z]\w+|cuda\w+)", subprocess.check_output(["nm", *objects], text=True)))
    assert "cudaLaunchKernelExC" in names and names <= CALLS, names - CALLS


def architectures():
    return re.findall(r"code=sm_(\d+)", cuda["flags"]) if cuda else []


@pytest.mark.parametrize("architecture", architectures())
def test_no_hot_kernel_spills(architecture):
    kernels = entries(architecture)
    for hot in HOT:
        assert any(hot in name for name, *_ in kernels), hot
    for name, registers, stack, spills in kernels:
        limit = next((bytes for kernel, bytes in SOLVER_STACK.items() if kernel in name), None)
        if limit is not None:
            assert stack <= limit, (name, stack)
            continue
        most_stack, most_spills = next((bytes for kernel, bytes in MEASURED.items() if kernel in name), (0, 0))
        assert stack <= most_stack and spills <= most_spills and registers <= 255, (name, registers, stack, spills)


def test_the_phases_of_the_persistent_kernel_spill_nothing_of_their_own():
    text = (LOGS / "cuda_persistent.o.ptxas").read_text()
    found = re.findall(
        r"Function properties for (\S+)\n\s*(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", text
    )
    for phase, limit in PHASE_SPILLS.items():
        figures = [(name, int(stack), int(stores), int(loads)) for name, stack, stores, loads in found if phase in name]
        assert figures, phase
        for name, stack, stores, loads in figures:  # loaded once for each way out
            assert stack == 0 and stores <= limit and loads <= 2 * limit, (name, stack, stores, loads)


def test_ptx_for_later_gpus_is_there():
    if "TORCH_CUDA_ARCH_LIST" not in os.environ:
        assert architectures() and "code=compute_" in cuda["flags"]
