"""Builds mmfast/_C.so, and mmfast/_host for development, with ninja. Read top to bottom: decide, compile, note the facts.

MMFAST_BUILD     auto (default) | cuda | cpu | none: what to compile; auto takes the most that this machine can do
MMFAST_HOST      1 adds mmfast/_host, the solvers on NumPy arrays for tests and experiments; never in a released wheel
MMFAST_SANITIZE  1 compiles with AddressSanitizer and UndefinedBehaviorSanitizer
CXX, CXXFLAGS and LDFLAGS mean what they mean elsewhere
"""

import json
import os
import platform
import shutil
import subprocess
import sys
import sysconfig
from importlib.util import find_spec
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()
HOST, SANITIZE = (os.environ.get(name, "0") not in ("", "0") for name in ("MMFAST_HOST", "MMFAST_SANITIZE"))
X86 = platform.machine() in ("x86_64", "AMD64")
ISA_FLAGS = {  # of csrc/cpu/isa_NAME*.cpp; "" is any other file
    "": "",
    "avx512": "-mavx2 -mfma -mf16c -mavx512f -mavx512bw -mavx512vl -mavx512dq -mprefer-vector-width=512 -Wno-maybe-uninitialized",
    "avx2": "-mavx2 -mfma -mf16c",
    "portable": "" if X86 else "-ffp-contract=fast",
}
if not X86:
    del ISA_FLAGS["avx512"], ISA_FLAGS["avx2"]
# -ffp-contract=off: a fused multiply-add is written where it is meant, so every x86 instruction set gives the same bits
FLAGS = "-O3 -g1 -std=c++17 -fPIC -fvisibility=hidden -fno-math-errno -ffp-contract=off -Wall -Wextra"
SANITIZE_FLAGS = "-O1 -fno-omit-frame-pointer -fsanitize=address,undefined -fno-sanitize-recover=all" if SANITIZE else ""


def isa(source):
    return source.stem.split("_")[1] if source.stem.startswith("isa_") else ""


def decide(wanted):
    """(build, compiler, why no more than that is built)."""
    candidates = [os.environ["CXX"]] if os.environ.get("CXX") else ["g++", "c++", "clang++"]
    cxx = next(filter(None, map(shutil.which, candidates)), None)
    why_not_cpu = None if cxx else f"no C++ compiler was found (tried {', '.join(candidates)})"
    if sys.platform != "linux":
        why_not_cpu = f"the compiled code is for Linux, this is {sys.platform}"
    why_not_cuda = why_not_cpu or "this version has no CUDA sources"
    if wanted not in ("auto", "cuda", "cpu", "none"):
        sys.exit(f"mmfast: MMFAST_BUILD is {wanted!r}; it must be auto, cuda, cpu or none")
    obstacle = {"cuda": why_not_cuda, "cpu": why_not_cpu}.get(wanted)
    if obstacle:
        sys.exit(f"mmfast: MMFAST_BUILD={wanted} is impossible: {obstacle}")
    if wanted == "auto" and why_not_cpu:
        line = f"* mmfast: NOTHING IS COMPILED, only the slow plain-torch backend will work: {why_not_cpu} *"
        print("*" * len(line), line, "*" * len(line), sep="\n", file=sys.stderr)
    if wanted == "none" or why_not_cpu:
        return "none", None, why_not_cpu
    return "cpu", cxx, "MMFAST_BUILD=cpu" if wanted == "cpu" else why_not_cuda


BUILD, CXX, WHY_NOT_MORE = decide(os.environ.get("MMFAST_BUILD", "auto"))


class Ninja(build_ext):
    def get_ext_filename(self, name):
        # no Python version in the name of _C: the stable ABI serves them all
        return name.replace(".", os.sep) + (".so" if name.endswith("_C") else sysconfig.get_config_var("EXT_SUFFIX"))

    def run(self):
        missing = [name for name in ("torch", "ninja", *(["pybind11"] if HOST else [])) if find_spec(name) is None]
        if missing:
            sys.exit(f"mmfast: compiling needs {', '.join(missing)}; install it, or drop --no-build-isolation, or set MMFAST_BUILD=none")
        import torch

        work = ROOT / "build" / ("sanitize" if SANITIZE else BUILD)  # always the same, so that every way to install is incremental
        work.mkdir(parents=True, exist_ok=True)
        (work / "build.ninja").write_text(self.ninja_file(Path(torch.__file__).parent))
        if subprocess.call([sys.executable, "-m", "ninja", "-C", str(work)]):
            sys.exit("mmfast: compiling failed, see above; MMFAST_BUILD=none installs the slow plain-torch backend without compiling")

        package = ROOT / "mmfast" if self.inplace or self.editable_mode else Path(self.build_lib) / "mmfast"
        package.mkdir(parents=True, exist_ok=True)
        for stale in package.glob("_*.so"):
            stale.unlink()
        for ext in self.extensions:
            shutil.copy2(work / Path(self.get_ext_filename(ext.name)).name, package)
        (package / "_build.json").write_text(json.dumps(self.facts(torch.__version__), indent=2) + "\n")

    def ninja_file(self, torch_dir):
        sources = [s for s in sorted((ROOT / "csrc").rglob("*.cpp")) if (HOST or s.stem != "host") and isa(s) in ISA_FLAGS]
        extra = {  # by folder or name: torch's stable ABI is seen by ops*.cpp alone, Python by host.cpp alone
            "csrc": f"-DTORCH_STABLE_ONLY -DTORCH_TARGET_VERSION=0x020a000000000000 -isystem {torch_dir}/include",
            "cpu": "",
        }
        objects = {folder: " ".join(f"{s.stem}.o" for s in sources if s.parent.name == folder and s.stem != "host") for folder in extra}
        if HOST:
            import pybind11

            extra["host"] = f"-isystem {pybind11.get_include()} -isystem {sysconfig.get_paths()['include']}"
        lines = [
            f"flags = {self.flags()} -ffile-prefix-map={ROOT}=.",
            f"rule compile\n  command = {CXX} -MMD -MF $out.d $flags $extra -c $in -o $out\n  depfile = $out.d\n  deps = gcc\n  description = compile $in",
            f"rule link\n  command = {CXX} -shared {SANITIZE_FLAGS} $in -o $out $libraries {os.environ.get('LDFLAGS', '')}\n  description = link $out",
            *(f"build {s.stem}.o: compile {s}\n  extra = {extra.get(s.stem, extra[s.parent.name])} {ISA_FLAGS[isa(s)]}" for s in sources),
            f"build _C.so: link {objects['csrc']} {objects['cpu']}",
            f"  libraries = -L{torch_dir}/lib -Wl,--no-as-needed -ltorch -ltorch_cpu -lc10",
        ]
        if HOST:
            lines.append(f"build {Path(self.get_ext_filename('mmfast._host')).name}: link host.o {objects['cpu']}")
        return "\n".join(lines) + "\n"

    def flags(self):
        return " ".join(filter(None, [FLAGS, SANITIZE_FLAGS, os.environ.get("CXXFLAGS")]))

    def facts(self, torch_version):
        def output(*command):
            return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()[0]

        return {
            "version": self.distribution.get_version(),
            "git": output("git", "describe", "--always", "--dirty") if (ROOT / ".git").exists() and shutil.which("git") else None,
            "MMFAST_BUILD": BUILD,
            "why_not_more": WHY_NOT_MORE,
            "torch": torch_version,
            "compiler": output(CXX, "--version"),
            "flags": self.flags(),
            "isas": list(filter(None, ISA_FLAGS)),
        }


class Wheel(bdist_wheel):
    def get_tag(self):
        tag = super().get_tag()
        return tag if HOST or BUILD == "none" else ("py310", "none", tag[2])


names = [] if BUILD == "none" else ["mmfast._C", "mmfast._host"] if HOST else ["mmfast._C"]
setup(ext_modules=[Extension(name, []) for name in names], cmdclass={"build_ext": Ninja, "bdist_wheel": Wheel})
