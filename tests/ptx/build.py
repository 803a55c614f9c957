"""Builds the kernels' PTX, translated, with the unmodified launch code on top: build/ptx/libmmfast_ptx.so. Incremental; two processes wait for each other."""

import fcntl
import os
import platform
import shlex
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import torch

from mmfast.backends import library

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
WORK = ROOT / "build" / "ptx"
LIBRARY = WORK / "libmmfast_ptx.so"
FACTS = library.read_facts(library.PATH)
ARCHITECTURE = "arch=compute_90,code=compute_90"  # PTX and nothing else
LONG_FILES = ("persistent", "solve")  # all solvers: they take twice as long to compile at -O1, and gain little
FLAGS = "-std=c++17 -fPIC -fvisibility=hidden -ffp-contract=off -fno-strict-aliasing"


def cuda_home() -> Path | None:
    """The toolkit that mmfast itself was compiled with, as far as it can be found again."""
    nvcc = shutil.which("nvcc")
    places = [os.environ.get("CUDA_HOME"), nvcc and Path(nvcc).resolve().parent.parent, "/usr/local/cuda"]
    return next((Path(place) for place in places if place and (Path(place) / "include/cuda_runtime.h").exists()), None)


def why_not() -> str | None:
    """Why the kernels' PTX can't run here, or None."""
    if sys.platform != "linux" or platform.machine() != "x86_64":
        return f"its threads are fibers in the assembly of Linux on x86-64, this is {sys.platform} on {platform.machine()}"
    if not library.available:
        return f"nothing compiled to compare with: {library.missing_reason}"
    if library.PATH.resolve() != (ROOT / "mmfast/_C.so").resolve() or not FACTS.get("cuda"):
        return f"{library.PATH} was not built here with CUDA"
    if not (ROOT / "build/cuda/choose.o").exists():
        return "build/cuda, with the objects of mmfast's own build, is not there"
    if cuda_home() is None:
        return "there is no nvcc (CUDA_HOME, PATH, /usr/local/cuda)"
    return None if find_spec("ninja") else "ninja is not installed"


def ninja_file() -> str:
    cuda, torch_dir = cuda_home(), Path(torch.__file__).parent
    cxx = os.environ.get("CXX", "g++")
    nvcc = f"{cuda}/bin/nvcc -ccbin {shlex.quote(cxx)} {FACTS['cuda']['flags'].partition('-gencode')[0]} -gencode {ARCHITECTURE}"
    include = f"-I{HERE} -isystem {torch_dir}/include -isystem {cuda}/include -DTORCH_STABLE_ONLY -DTORCH_TARGET_VERSION=0x020a000000000000"
    libraries = f"-L{torch_dir}/lib -Wl,--no-as-needed -ltorch -ltorch_cpu -lc10"
    lines = [
        f"rule kernels\n  command = mkdir -p $name && {nvcc} --keep --keep-dir $name -MD -MF $name.d -c $defines$in -o $name.host.o",
        "  depfile = $name.d\n  deps = gcc",
        f"rule translate\n  command = {sys.executable} {HERE}/translate.py $in $out",
        f"rule translated\n  command = {cxx} $level -w {FLAGS} -MD -MF $out.d -I{HERE} -c $in -o $out\n  depfile = $out.d\n  deps = gcc",
        f"rule compile\n  command = {cxx} -O2 -Wall -Wextra {FLAGS} -MD -MF $out.d {include} $extra -c $in -o $out\n  depfile = $out.d\n  deps = gcc",
        f"rule link\n  command = {cxx} -shared -Wl,-Bsymbolic $in -o $out {libraries}",  # a torch with CUDA has symbols of the same names
    ]
    objects = []
    for source in sorted((ROOT / "csrc/cuda").glob("*.cu"), key=lambda path: -path.stat().st_size):
        name = source.stem
        lines.append(f"build {name}.host.o | {name}/{name}.ptx: kernels {source}\n  name = {name}")
        if name == "device":
            lines.append("  defines = '-DMMFAST_CUDA_ARCHITECTURES=\"80;90+PTX\"' ")
        lines.append(f"build {name}.cpp: translate {name}/{name}.ptx | {HERE}/translate.py {HERE}/arithmetic.py {HERE}/parse.py")
        level = "-O0" if name in LONG_FILES else "-O1"
        lines.append(f"build {name}.o: translated {name}.cpp\n  level = {level}")
        objects += [f"{name}.host.o", f"{name}.o"]
    for source in sorted(HERE.glob("*.cpp")):
        lines.append(f"build {source.stem}.o: compile {source}")
        objects.append(f"{source.stem}.o")
    for source in sorted((ROOT / "csrc").glob("ops_cuda*.cpp")):
        lines.append(f"build {source.stem}.o: compile {source}\n  extra = -Wno-address -include {HERE}/torch_shim.h")
        objects.append(f"{source.stem}.o")
    rules = [str(path) for path in sorted((ROOT / "build/cuda").glob("isa_*.o"))]  # ops_cuda.cpp asks the CPU's kernels about the rules
    lines.append(f"build {LIBRARY.name}: link {' '.join(objects)} {ROOT}/build/cuda/choose.o {' '.join(rules)}")
    return "\n".join(lines) + "\n"


def build() -> Path:
    """The library, built if it isn't; raises with what the compiler said."""
    WORK.mkdir(parents=True, exist_ok=True)
    with (WORK / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        (WORK / "build.ninja").write_text(ninja_file())
        done = subprocess.run([sys.executable, "-m", "ninja", "-C", str(WORK)], capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"the kernels' PTX was not built:\n{done.stdout[-4000:]}{done.stderr[-2000:]}")
    return LIBRARY


if __name__ == "__main__":
    sys.exit(why_not() or print(build()))
