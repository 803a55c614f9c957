"""The launch code of csrc/cuda over a runtime that plays a device and its refusals (launches.cpp); no kernel runs."""

import ctypes
import re
import runpy
import shutil
import subprocess
from importlib import metadata
from pathlib import Path

import pytest

from mmfast.backends import cuda, library

ROOT = Path(__file__).parent.parent
BUILD = ROOT / "build" / "cuda"
FACTS = library.read_facts(library.PATH).get("cuda")
BUILT = [int(number) for number in re.findall(r"code=sm_(\d+)", FACTS["flags"])] if FACTS else []
pytestmark = pytest.mark.skipif(not FACTS or not BUILD.exists(), reason="mmfast was not built with CUDA in this folder")
# cudaError_t
INVALID_CONFIGURATION, OUT_OF_RESOURCES, COOPERATIVE_TOO_LARGE, ILLEGAL_ADDRESS, INVALID_VALUE = 9, 701, 720, 700, 1
SMALL, LARGE = 1000, 1_000_000  # elements that a cluster takes, and all blocks


@pytest.fixture(scope="module")
def binary(tmp_path_factory):
    if int(metadata.version("setuptools").split(".")[0]) < 77:
        pytest.skip("setuptools is too old for setup.py")
    toolkit, why_not = runpy.run_path(str(ROOT / "setup.py"), run_name="setup")["find_cuda"]()
    if why_not or not shutil.which("g++"):
        pytest.skip(why_not or "there is no g++")
    path = tmp_path_factory.mktemp("launches") / "launches.so"
    objects = [*sorted(BUILD.glob("cuda_*.o")), BUILD / "ops_cuda_exports.o"]
    flags = ["-shared", "-fPIC", "-std=c++17", "-fvisibility=hidden", f"-I{toolkit / 'include'}", f"-I{ROOT / 'csrc'}"]
    subprocess.run(["g++", *flags, str(ROOT / "tests/launches.cpp"), *map(str, objects), "-o", str(path)], check=True)
    return path


@pytest.fixture
def runtime(binary, tmp_path):
    """Loaded anew, so that nothing is known of the device of another test."""
    copy = tmp_path / "launches.so"
    shutil.copy(binary, copy)
    loaded = ctypes.CDLL(str(copy))
    loaded.launches.restype = loaded.why.restype = loaded.mmfast_cuda_why_not.restype = loaded.mmfast_cuda_architectures.restype = (
        ctypes.c_char_p
    )
    loaded.mmfast_cuda_tune.argtypes = [ctypes.c_int64, ctypes.c_int64, ctypes.c_double]
    return loaded


def launched(runtime):
    """(kernel, blocks, mode) of each launch since it was last asked."""
    found = [entry.split(":") for entry in runtime.launches().decode().split()]
    return [
        (re.search(r"(?:\d|_)([a-z_]+_kernel)", name)[1].removeprefix("occupancy_of_"), int(blocks), mode) for name, blocks, mode in found
    ]


def modes(runtime):
    return [mode for _, _, mode in launched(runtime)]


def set_device(runtime, /, **numbers):
    for name, value in numbers.items():
        runtime.set_number(name.encode(), ctypes.c_int64(value))


@pytest.mark.parametrize("error", [COOPERATIVE_TOO_LARGE, OUT_OF_RESOURCES, INVALID_CONFIGURATION])
@pytest.mark.parametrize(
    ("batch", "inner", "per", "mode"), [(1, SMALL, 0, "cluster"), (1, LARGE, 0, "cooperative"), (100, 4096, 1, "plain")]
)
def test_a_problem_that_has_no_room_is_left_to_the_general_kernels(runtime, batch, inner, per, mode, error):
    arguments = (ctypes.c_int64(batch), ctypes.c_int64(inner), per)
    assert runtime.resolve(*arguments) == 1 and mode in modes(runtime)
    runtime.set_fault(b"persistent", error, 1)
    assert runtime.resolve(*arguments) == 0 and runtime.error_left() == 0
    assert runtime.resolve(*arguments) == 1


def test_linear_branches_take_as_many_warps_as_have_room(runtime):
    assert runtime.heads() == 1
    *_, (_, most, mode) = launched(runtime)
    assert most > 4 and mode == "cooperative"
    runtime.set_fault(b"solve_kernel", COOPERATIVE_TOO_LARGE, 2)
    assert runtime.heads() == 1
    assert [blocks for name, blocks, _ in launched(runtime) if name == "solve_kernel"] == [most, most // 2, most // 4]
    runtime.set_fault(b"solve_kernel", COOPERATIVE_TOO_LARGE, most.bit_length() - 1)
    assert runtime.heads() == 1 and launched(runtime)[-1] == ("solve_kernel", 1, "plain")
    runtime.set_fault(b"solve_kernel", COOPERATIVE_TOO_LARGE, 100)
    assert runtime.heads() == -1 and b"no room for one warp" in runtime.why()


def test_a_launch_that_may_not_overlap_starts_after_the_one_before(runtime):
    runtime.set_fault(b"combine", OUT_OF_RESOURCES, 1)
    assert runtime.combine(True) == 1 and modes(runtime) == ["dependent", "plain"]
    runtime.set_fault(b"combine", OUT_OF_RESOURCES, 1)
    assert runtime.combine(False) == -1 and b"the CUDA kernel combine did not start: some error" in runtime.why()


def test_an_error_is_told_as_whose_it_is(runtime, monkeypatch):
    runtime.leave_error(INVALID_VALUE)  # of somebody else
    assert runtime.combine(False) == 1 and runtime.heads() == 1 and runtime.resolve(ctypes.c_int64(1), ctypes.c_int64(LARGE), 0) == 1
    runtime.set_fault(b"combine", ILLEGAL_ADDRESS, 2)
    monkeypatch.delenv("CUDA_LAUNCH_BLOCKING", raising=False)
    assert runtime.combine(False) == -1
    assert runtime.why().startswith(b"mmfast: an earlier kernel, of mmfast or not, failed, and combine did not start: an illegal address")
    monkeypatch.setenv("CUDA_LAUNCH_BLOCKING", "1")
    assert runtime.combine(False) == -1 and runtime.why() == b"mmfast: the CUDA kernel combine failed: an illegal address"


def test_a_device_without_large_clusters_leaves_no_error(runtime):
    set_device(runtime, non_portable=0, cluster=8)
    assert runtime.resolve(ctypes.c_int64(1), ctypes.c_int64(80_000), 0) == 1
    assert launched(runtime) == [("persistent_kernel", 8, "cluster")] and runtime.error_left() == 0


def test_occupancy_is_asked_once_for_each_size(runtime):
    for n, asked in ((LARGE, 1), (LARGE, 0), (2 * LARGE, 1), (LARGE, 0)):
        assert runtime.resolve(ctypes.c_int64(1), ctypes.c_int64(n), 0) == 1 and modes(runtime).count("asked") == asked
    for asked in (1, 0):
        assert runtime.heads() == 1 and modes(runtime).count("asked") == asked


@pytest.mark.parametrize(
    ("numbers", "reason", "code"),
    [
        ({}, None, 1),
        ({"capability": 80, "driver": 13010}, None, 1),
        ({"capability": 89}, None, 1),
        ({"driver": 0}, "there is no NVIDIA driver", 0),
        ({"driver": 12040}, "the driver knows CUDA 12.4, a library built with CUDA 13.0 needs one that knows 13.0: ", 0),
        ({"driver": 12000, "runtime": 12080}, "the driver knows CUDA 12.0, a library built with CUDA 12.8 needs one that knows 12.1: ", 0),
        ({"driver": 12020, "runtime": 12080}, None, 1),
        ({"capability": 75}, "there is no code for device 0, of compute capability 7.5: the library holds code for ", 0),
        ({"capability": 200}, None, 2),
        (
            {"capability": 200, "driver": 12060, "runtime": 12080},
            "the driver, for CUDA 12.6, cannot compile the PTX of CUDA 12.8 for device 0",
            0,
        ),
        ({"devices": 0}, "device 0 does not answer: some error", 0),
    ],
)
def test_why_kernels_cannot_run(runtime, numbers, reason, code):
    capability = numbers.get("capability", 90)
    if code == 1 and not any(capability // 10 * 10 <= built <= capability for built in BUILT):
        pytest.skip(f"this build has no code for a GPU of capability {capability}")
    set_device(runtime, **numbers)
    found = runtime.mmfast_cuda_why_not(ctypes.c_int64(0))
    assert (found is None) == (reason is None) and (reason is None or found.decode().startswith(reason)), found
    assert runtime.mmfast_cuda_code(ctypes.c_int64(0)) == code and runtime.error_left() == 0
    assert launched(runtime) == []


def path_of(runtime, n=SMALL, batch=1, per=0):
    found = (ctypes.c_int64 * 4)()
    runtime.mmfast_cuda_plan(*(ctypes.c_int64(x) for x in (0, 4, 3, 3, batch, n, 0, per)), found)
    return cuda.PATHS[found[0]]


def test_paths_that_are_not_allowed_are_not_chosen(runtime):
    device = ctypes.c_int64(0)
    bits = {"two_pass": 1, "persistent": 2, "per_sample": 4, "cluster": 8, "overlap": 256}
    assert runtime.mmfast_cuda_paths(device) == sum(bits.values())
    assert [path_of(runtime), path_of(runtime, LARGE), path_of(runtime, 4096, 100, 1)] == ["cluster", "persistent", "per_sample"]
    runtime.mmfast_cuda_allow(device, ctypes.c_int64(bits["persistent"]))
    assert [path_of(runtime), path_of(runtime, LARGE), path_of(runtime, 4096, 100, 1)] == ["persistent", "persistent", "two_pass"]
    runtime.mmfast_cuda_allow(device, ctypes.c_int64(0))
    assert {path_of(runtime), path_of(runtime, LARGE)} == {"two_pass"} and runtime.mmfast_cuda_paths(device) == sum(bits.values())
    runtime.mmfast_cuda_allow(device, ctypes.c_int64(sum(bits.values())))
    runtime.mmfast_cuda_tune(0, 3 * 4 * SMALL - 1, 0.25)
    assert path_of(runtime) == "persistent" and path_of(runtime, SMALL - 1) == "cluster"
    runtime.mmfast_cuda_tune(0, 1 << 20, 1.5)  # more than there is
    assert path_of(runtime, LARGE) == "two_pass" and path_of(runtime) == "cluster"
