"""What the CUDA library is compiled for, what it says of a device, and what calls may take of it: all without a GPU."""

import os
import re
import runpy
import shutil
import subprocess
from importlib import metadata
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import mmfast as mf
from mmfast.backends import cuda, library
from mmfast.resolvers import chain, philox

ROOT = Path(__file__).parent.parent
KNOWN = {75, 80, 86, 87, 88, 89, 90, 100, 103, 110, 120, 121}  # to nvcc 13.0
setuptools_is_new = int(metadata.version("setuptools").split(".")[0]) >= 77
with_cuda = pytest.mark.skipif(not library.built_with_cuda, reason="mmfast was built without CUDA")


@pytest.fixture(scope="module")
def build():
    if not setuptools_is_new:
        pytest.skip("setuptools is too old for setup.py")
    return runpy.run_path(str(ROOT / "setup.py"), run_name="setup")


@pytest.mark.parametrize(
    ("wanted", "known", "chosen", "dropped"),
    [
        (None, KNOWN, ["80", "86", "89", "90", "100", "120+PTX"], ""),
        (None, {70, 75, 80, 86, 89, 90}, ["80", "86", "89", "90+PTX"], "10.0, 12.0+PTX"),
        ("8.0;9.0+PTX", KNOWN, ["80", "90+PTX"], ""),
        ("7.5 8.0 9.0a", KNOWN, ["80", "90a"], "7.5"),
        ("7.0+PTX;9.0", KNOWN, ["90"], "7.0+PTX"),
        ("Volta;Ampere;8.0+PTX", KNOWN, ["80+PTX", "86+PTX"], "7.5"),
        ("native", {80, 90}, ["80", "90+PTX"], "8.6, 8.9, 10.0, 12.0+PTX"),
        ("Ampere+Tegra;Hopper", KNOWN, ["87", "90+PTX"], ""),
        ("Hopper;Blackwell", {80, 90, 100}, ["90+PTX", "100+PTX"], "10.3, 12.0, 12.1+PTX"),
    ],
)
def test_what_an_inherited_list_compiles_for(build, capsys, wanted, known, chosen, dropped):
    assert build["architectures"](wanted or build["RELEASE_ARCHITECTURES"], known) == chosen
    said = capsys.readouterr().err
    assert said.startswith(f"mmfast: not compiled for {dropped}: ") if dropped else not said


@pytest.mark.parametrize(
    ("wanted", "complaint"),
    [("7.5+PTX", "names no GPU to compile for"), ("Turing", "names no GPU"), ("9", "names '9'"), ("8.0,9.0", "names")],
)
def test_a_list_that_leaves_nothing_or_is_none(build, wanted, complaint):
    with pytest.raises(SystemExit, match=complaint):
        build["architectures"](wanted, KNOWN)


@pytest.mark.parametrize("wanted", ["7.5", "6.1 7.0", "Volta;Turing", "99.0"])
@pytest.mark.parametrize("asked", [None, "auto", "cuda"])
def test_an_inherited_list_of_old_gpus_leaves_the_cpu_where_nobody_asked_for_cuda(asked, wanted, tmp_path, monkeypatch, capsys):
    """A machine whose GPU is too old for the kernels: an installation that would end there is none."""
    if not setuptools_is_new:
        pytest.skip("setuptools is too old for setup.py")
    (tmp_path / "bin").mkdir()
    (tmp_path / "lib64").mkdir()
    (tmp_path / "lib64/libcudart_static.a").touch()
    nvcc = tmp_path / "bin/nvcc"
    nvcc.write_text("#!/bin/sh\n[ $1 = --version ] && echo 'release 13.0, V13.0.1' || printf 'compute_75\\ncompute_80\\ncompute_90\\n'\n")
    nvcc.chmod(0o755)
    compiler = tmp_path / "bin/g++"
    compiler.write_text("#!/bin/sh\n")
    compiler.chmod(0o755)
    for name, value in {"CUDA_HOME": str(tmp_path), "CXX": str(compiler), "TORCH_CUDA_ARCH_LIST": wanted, "MMFAST_BUILD": asked}.items():
        monkeypatch.setenv(name, value) if value else monkeypatch.delenv(name, raising=False)
    if asked == "cuda":
        with pytest.raises(SystemExit, match="names no GPU to compile for"):
            runpy.run_path(str(ROOT / "setup.py"), run_name="setup")
        return
    found = runpy.run_path(str(ROOT / "setup.py"), run_name="setup")
    assert (found["BUILD"], found["CUDA"], found["ARCHITECTURES"]) == ("cpu", None, []) and f"TORCH_CUDA_ARCH_LIST={wanted}" in found[
        "WHY_NOT_MORE"
    ]
    assert "without CUDA then" in capsys.readouterr().err
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", f"{wanted};9.0")
    found = runpy.run_path(str(ROOT / "setup.py"), run_name="setup")
    assert found["BUILD"] == "cuda" and found["ARCHITECTURES"] == ["90"]


@pytest.mark.parametrize(
    ("cxx", "words"),
    [
        ("g++", "-ccbin g++"),
        ("ccache g++", "-ccbin g++"),
        ("/usr/bin/sccache clang++-18 -m64 '-DA=b c'", "-ccbin clang++-18 -Xcompiler -m64 -Xcompiler '-DA=b c'"),
        ("'/opt/my gcc/g++' -m64", "-ccbin '/opt/my gcc/g++' -Xcompiler -m64"),
        ("ccache", "-ccbin ccache"),  # that stands for the compiler by a link of its name
    ],
)
def test_nvcc_gets_a_compiler_alone(build, cxx, words):
    assert build["host_compiler"](cxx) == words


NO_GPU = ["", "No devices were found", "NVIDIA-SMI has failed because it couldn't communicate with the NVIDIA driver.", 'Field "compute_cap" is not a valid field to query.', "[N/A]"]  # fmt: skip


@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
@pytest.mark.parametrize(
    ("said", "here"), [*((words, "9.0+PTX") for words in NO_GPU), ("12.0", "12.0+PTX"), ("9.0\n8.0\n9.0", "8.0;9.0+PTX")]
)
def test_make_compiles_for_the_gpus_that_are_here(said, here, tmp_path):
    """nvidia-smi tells on its standard output what is wrong."""
    (tmp_path / "nvidia-smi").write_text(f"#!/bin/sh\ncat <<'END'\n{said}\nEND\nexit 9\n")
    (tmp_path / "nvidia-smi").chmod(0o755)
    environment = os.environ | {"PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}"}
    environment.pop("TORCH_CUDA_ARCH_LIST", None)
    rule = ".venv/built: ; @echo $$TORCH_CUDA_ARCH_LIST"
    makefile = re.sub(r"^\.venv/built: .*\n(\t.*\n)+", rule + "\n", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)
    done = subprocess.run(
        ["make", "-s", "-f", "-", ".venv/built"], input=makefile, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout == f"{here}\n"


def test_words_for_nvcc(build):
    words = "-gencode arch=compute_80,code=sm_80 -gencode arch=compute_90,code=sm_90 -gencode arch=compute_90,code=compute_90"
    assert build["gencodes"](["80", "90+PTX"]) == words


@pytest.mark.parametrize(
    ("compiled_for", "device", "code"),
    [
        ("80;90+PTX", (8, 0), "machine"),
        ("80;90+PTX", (8, 9), "machine"),
        ("80;90+PTX", (9, 0), "machine"),
        ("80;90+PTX", (10, 0), "ptx"),
        ("80;90+PTX", (12, 0), "ptx"),
        ("80;90+PTX", (7, 5), "none"),
        ("80+PTX;86", (9, 0), "ptx"),
        ("86", (8, 0), "none"),
        ("80;90", (10, 0), "none"),
        ("90a", (9, 0), "machine"),
        ("90a+PTX", (10, 0), "none"),
        ("80;100;120+PTX", (10, 3), "machine"),
        ("80;100;120+PTX", (11, 0), "none"),
        ("80;100;120+PTX", (12, 1), "machine"),
        ("120", (2, 0), "none"),
    ],
)
def test_which_code_runs_on_which_device(compiled_for, device, code):
    host = pytest.importorskip("mmfast._host", reason="MMFAST_HOST=1 was not set when mmfast was built", exc_type=ImportError)
    assert cuda.CODES[host.gpu_code(compiled_for, *device)] == code


@with_cuda
def test_what_is_said_where_there_is_no_gpu():
    """The functions behind it answer and leave nothing behind; none of them needs a driver."""
    built_for = [flag.split("code=")[1] for flag in library.read_facts(library.PATH)["cuda"]["flags"].split() if "code=sm_" in flag]
    assert [f"sm_{entry.removesuffix('+PTX')}" for entry in cuda.architectures().split(";")] == built_for
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    assert cuda._exports().mmfast_cuda_why_not(0) == b"there is no NVIDIA driver"
    assert cuda.code(0) == "none" and cuda.paths(0) == set()
    cuda.allow(0, {"cluster", "overlap", "heads", "elementwise"})  # the last two are not for the plan to choose
    cuda.tune(0, 2**20, 0.25)
    cuda.allow(0, {*cuda.PATHS, "overlap"})
    with cuda.force("persistent", overlap=False):
        assert cuda.plan(0, 4, 3, 3, 1, 100, 0, 0)[0] == "two_pass"
    with pytest.raises(ValueError, match="tuple"), cuda.force("unheard_of"):
        pass


def test_what_is_made_on_first_use_is_not_made_in_a_capture(monkeypatch):
    """A state made there would be zero again in every replay, a stream would have to come from the host."""
    gpu = torch.device("cuda")
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(RuntimeError, match="the state of GradVac comes to the GPU on first use.*call once before the capture"):
        chain.states_of([mf.GradVac()], (), 3, gpu)
    for stream in (lambda: chain.stream_of([mf.PCGrad()], gpu), lambda: mf.GradDrop().stream(gpu)):
        with pytest.raises(RuntimeError, match="call once before the capture"):
            stream()


class Calls(TorchDispatchMode):
    """The operators that are called."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.__name__)
        return func(*args, **kwargs or {})


def test_a_random_stream_moves_on_without_the_host(monkeypatch):
    """A number that came from there would wait for the device, and end a capture."""
    monkeypatch.setattr(philox, "_ONE_CALL", {})
    stream = torch.tensor([7, 0])
    with Calls() as calls:
        philox.advance(stream)
        philox.advance(stream)
    assert stream.tolist() == [7, 2] and calls.names == ["arange.default", "add_.Tensor", "add_.Tensor"]
