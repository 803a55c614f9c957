"""Builds mmfast/_C.so, and mmfast/_host for development, with ninja. Read top to bottom: decide, compile, note the facts.

MMFAST_BUILD     auto (default) | cuda | cpu | none: what to compile; auto takes the most that this machine can do
CUDA_HOME        where the CUDA toolkit is; else nvcc is looked for on PATH and in /usr/local/cuda. No GPU is needed to compile
                 a wheel is for 12.8 or 12.9: what CUDA 13 compiles needs a driver of release 580 or later (docs/gpu.md)
TORCH_CUDA_ARCH_LIST  the GPUs to compile for; default 8.0;8.6;8.9;9.0;10.0;12.0+PTX, those of them that nvcc knows (make compiles for the GPU that is here, or 9.0+PTX)
MMFAST_HOST      1 adds mmfast/_host, the solvers on NumPy arrays for tests and experiments; never in a released wheel
MMFAST_SANITIZE  1 compiles with AddressSanitizer and UndefinedBehaviorSanitizer
CXX, CXXFLAGS and LDFLAGS mean what they mean elsewhere
"""

import importlib.metadata
import json
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from importlib.util import find_spec
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

ROOT = Path(__file__).parent.resolve()
HOST, SANITIZE = (os.environ.get(name, "0") not in ("", "0") for name in ("MMFAST_HOST", "MMFAST_SANITIZE"))
INCLUDE_PYTHON = Path(sysconfig.get_paths()["include"])
# all works without _direct, small calls slower: where Python came without its development files, or without its global lock and stable ABI
DIRECT = (INCLUDE_PYTHON / "Python.h").exists() and not sysconfig.get_config_var("Py_GIL_DISABLED")
TARGETS = {"_C": "_C.so"} | ({"_direct": "_direct.abi3.so"} if DIRECT else {})  # both serve every later Python
TARGETS |= {"_host": "_host" + sysconfig.get_config_var("EXT_SUFFIX")} if HOST else {}
# -ffp-contract=off: a fused multiply-add is written where it is meant, so every processor gives the same bits
FLAGS = "-O3 -g1 -std=c++17 -fPIC -fvisibility=hidden -fno-math-errno -ffp-contract=off -Wall -Wextra"
SANITIZE_FLAGS = "-O1 -fno-omit-frame-pointer -fsanitize=address,undefined -fno-sanitize-recover=all" if SANITIZE else ""
AVX2 = "-mavx2 -mfma -mf16c"
AVX512 = f"{AVX2} -mavx512f -mavx512bw -mavx512vl -mavx512dq -mprefer-vector-width=512 -Wno-uninitialized -Wno-maybe-uninitialized"
X86 = platform.machine() in ("x86_64", "AMD64")
ISAS = ({"avx512": AVX512, "avx2": AVX2} if X86 else {}) | {"portable": ""}


# no fast math, nothing fused that is not written so: the solvers are those of the CPU, bit for bit
NVCC_FLAGS = "-O3 -std=c++17 -fmad=false --expt-relaxed-constexpr -lineinfo -Xcompiler -fPIC,-fvisibility=hidden"


def cuda_release(home):
    version = subprocess.run([home / "bin/nvcc", "--version"], capture_output=True, text=True, check=False).stdout
    return version.partition("release ")[2].partition(",")[0] or "unknown"


def find_cuda():
    """(the toolkit's folder, None), or (None, why there is none to use)."""
    nvcc = shutil.which("nvcc")
    places = [
        Path(place) for place in (os.environ.get("CUDA_HOME"), nvcc and Path(nvcc).resolve().parent.parent, "/usr/local/cuda") if place
    ]
    home = next((place for place in places if (place / "bin/nvcc").exists() and (place / "lib64/libcudart_static.a").exists()), None)
    if home is None:
        return None, "no CUDA toolkit with bin/nvcc and lib64/libcudart_static.a was found (CUDA_HOME, nvcc on PATH, /usr/local/cuda)"
    release = cuda_release(home)
    numbers = release.split(".")
    if not all(number.isdigit() for number in numbers) or tuple(map(int, numbers)) < (12, 1):  # kernels with more than 4 KB of arguments
        return None, f"the CUDA toolkit in {home} is {release}, 12.1 or later is needed"
    return home, None


RELEASE_ARCHITECTURES = "8.0;8.6;8.9;9.0;10.0;12.0+PTX"
# what torch calls them in its list
GENERATIONS = {
    "native": RELEASE_ARCHITECTURES,  # the GPUs that torch sees here; none need be there to compile
    **dict.fromkeys(["Kepler", "Kepler+Tesla", "Maxwell", "Maxwell+Tegra", "Pascal", "Volta", "Volta+Tegra", "Turing"], "7.5"),
    "Ampere": "8.0;8.6+PTX",
    "Ampere+Tegra": "8.7",
    "Ada": "8.9+PTX",
    "Hopper": "9.0+PTX",
    "Blackwell": "10.0;10.3;12.0;12.1+PTX",
    "Blackwell+Tegra": "11.0",
}


class NoneLeft(SystemExit):
    """A list that names no GPU to compile for: an end where CUDA was asked for."""


def known_architectures(home):
    """Those that nvcc can compile for, as numbers: 80, 90, ..."""
    listed = subprocess.run([home / "bin/nvcc", "--list-gpu-arch"], capture_output=True, text=True, check=False).stdout
    return {int(number) for number in re.findall(r"compute_(\d+)$", listed, re.MULTILINE)}


def architectures(wanted, known):
    """What to compile for, as 80, 90a or 90+PTX, of a list as torch takes it (8.0;9.0+PTX, or Ampere); what cannot be is left out with a note.

    The kernels need cp.async, and so 8.0. Where the newest of the list is unknown to nvcc, its PTX is made for the newest that is left.
    """
    entries = [part for entry in re.split("[; ]+", wanted) if entry for part in GENERATIONS.get(entry, entry).split(";")]
    chosen, dropped, ptx_of_dropped = {}, [], False
    for entry in entries:
        found = re.fullmatch(r"(\d+)\.(\d)(a?)(\+PTX)?", entry)
        if not found:
            sys.exit(f"mmfast: TORCH_CUDA_ARCH_LIST names {entry!r}; it must be a list such as 8.0;9.0+PTX")
        number, letter, ptx = int(found[1] + found[2]), found[3], bool(found[4])
        if number < 80 or number not in known:
            dropped.append(entry)
            ptx_of_dropped |= ptx and number >= 80
        else:
            chosen[number, letter] = chosen.get((number, letter), False) or ptx
    if not chosen:
        raise NoneLeft(
            f"mmfast: TORCH_CUDA_ARCH_LIST={wanted} names no GPU to compile for: the kernels need 8.0 or later, nvcc knows {sorted(known)}"
        )
    if ptx_of_dropped:
        chosen[max(chosen)] = True
    if dropped:
        print(
            f"mmfast: not compiled for {', '.join(dropped)}: the kernels need 8.0 or later, and an nvcc that knows the GPU", file=sys.stderr
        )
    return [f"{number}{letter}{'+PTX' * ptx}" for (number, letter), ptx in sorted(chosen.items())]


def gencodes(entries):
    """nvcc's words for them."""
    words = []
    for entry in entries:
        number = entry.removesuffix("+PTX")
        words.append(f"-gencode arch=compute_{number},code=sm_{number}")
        if entry.endswith("+PTX"):
            words.append(f"-gencode arch=compute_{number},code=compute_{number}")
    return " ".join(words)


def decide(wanted):
    """(build, compiler, the CUDA toolkit's folder, why no more than that is built)."""
    candidates = [os.environ["CXX"]] if os.environ.get("CXX") else ["g++", "c++", "clang++"]
    cxx = next((c for c in candidates if shutil.which(shlex.split(c)[0])), None)
    why_not_cpu = None if cxx else f"no C++ compiler was found (tried {', '.join(candidates)})"
    if sys.platform != "linux":
        why_not_cpu = f"the compiled code is for Linux, this is {sys.platform}"
    cuda, why_not_cuda = find_cuda()
    why_not_cuda = why_not_cpu or why_not_cuda
    if wanted not in ("auto", "cuda", "cpu", "none"):
        sys.exit(f"mmfast: MMFAST_BUILD is {wanted!r}; it must be auto, cuda, cpu or none")
    if obstacle := {"cuda": why_not_cuda, "cpu": why_not_cpu}.get(wanted):
        sys.exit(f"mmfast: MMFAST_BUILD={wanted} is impossible: {obstacle}")
    if wanted == "auto" and why_not_cpu:
        line = f"* mmfast: NOTHING IS COMPILED, only the slow plain-torch backend will work: {why_not_cpu} *"
        print("*" * len(line), line, "*" * len(line), sep="\n", file=sys.stderr)
    if wanted == "none" or why_not_cpu:
        return "none", None, None, "MMFAST_BUILD=none" if wanted == "none" else why_not_cpu
    if wanted == "cpu" or why_not_cuda:
        return "cpu", cxx, None, "MMFAST_BUILD=cpu" if wanted == "cpu" else why_not_cuda
    return "cuda", cxx, cuda, None


BUILD, CXX, CUDA, WHY_NOT_MORE = decide(WANTED := os.environ.get("MMFAST_BUILD") or "auto")
try:
    ARCHITECTURES = (
        architectures(os.environ.get("TORCH_CUDA_ARCH_LIST") or RELEASE_ARCHITECTURES, known_architectures(CUDA)) if CUDA else []
    )
except NoneLeft as none_left:
    if WANTED == "cuda":
        raise
    BUILD, CUDA, WHY_NOT_MORE, ARCHITECTURES = "cpu", None, str(none_left).removeprefix("mmfast: "), []
    print(f"{none_left}; without CUDA then", file=sys.stderr)


def first_line(*command):
    return (subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False).stdout.splitlines() or [None])[0]


def flags():
    return " ".join(filter(None, [FLAGS, SANITIZE_FLAGS, os.environ.get("CXXFLAGS")]))


def note_facts(package, version, build=BUILD, why_not_more=WHY_NOT_MORE):
    """Writes what was built, and why no more than that, beside it: without compiled code, too, for somebody will ask why calls are slow."""
    compiled = build != "none"
    in_git = (ROOT / ".git").exists() and shutil.which("git")  # not the repository of somebody who unpacked mmfast in theirs
    facts = {
        "version": version,
        "git": first_line("git", "describe", "--always", "--dirty") if in_git else None,
        "MMFAST_BUILD": build,
        "why_not_more": why_not_more,
        "torch": importlib.metadata.version("torch") if find_spec("torch") else None,
        "compiler": first_line(*shlex.split(CXX), "--version") if CXX else None,
        "flags": flags() if compiled else None,
        "isas": list(ISAS) if compiled else [],
        "direct": compiled and DIRECT,
        "cuda": compiled and CUDA and {"release": cuda_release(CUDA), "flags": f"{NVCC_FLAGS} {gencodes(ARCHITECTURES)}"} or None,
    }
    package.mkdir(parents=True, exist_ok=True)
    (package / "_build.json").write_text(json.dumps(facts, indent=2) + "\n")


def remove_compiled(package):
    for stale in package.glob("_*.so"):
        stale.unlink()  # rather than written over: a running Python may have it mapped


def host_compiler(cxx):
    """What nvcc takes for CXX: a compiler alone, its options behind -Xcompiler, and no ccache before it."""
    words = shlex.split(cxx)
    if len(words) > 1 and Path(words[0]).name in ("ccache", "sccache", "distcc"):
        del words[0]
    return " ".join(["-ccbin", shlex.quote(words[0]), *(f"-Xcompiler {shlex.quote(word)}" for word in words[1:])])


class Package(build_py):
    """The Python files; where nothing is compiled, no extension notes the facts."""

    def run(self):
        super().run()
        if BUILD == "none":
            package = ROOT / "mmfast" if self.editable_mode else Path(self.build_lib, "mmfast")
            remove_compiled(package)
            note_facts(package, self.distribution.get_version())


class Ninja(build_ext):
    def get_ext_filename(self, name):
        return os.path.join("mmfast", TARGETS[name.removeprefix("mmfast.")])

    def run(self):
        package = ROOT / "mmfast" if self.inplace or self.editable_mode else Path(self.build_lib, "mmfast")
        version = self.distribution.get_version()
        if BUILD == "none":
            remove_compiled(package)
            note_facts(package, version)
            return
        if missing := [name for name in ["torch", "ninja"] + ["pybind11"] * HOST if find_spec(name) is None]:
            sys.exit(f"mmfast: compiling needs {', '.join(missing)}; install it, or drop --no-build-isolation, or set MMFAST_BUILD=none")
        work = ROOT / "build" / ("sanitize" if SANITIZE else BUILD)  # always the same, so that every way to install is incremental
        work.mkdir(parents=True, exist_ok=True)
        (work / "build.ninja").write_text(self.ninja_file(work, Path(find_spec("torch").origin).parent))
        if subprocess.call([sys.executable, "-m", "ninja", "-C", str(work)]):
            if not (package / "_C.so").exists():  # what an earlier build left there keeps its facts
                note_facts(package, version, "none", f"compiling with MMFAST_BUILD={BUILD} failed")
            sys.exit("mmfast: compiling failed, see above; MMFAST_BUILD=none installs the slow plain-torch backend without compiling")
        package.mkdir(parents=True, exist_ok=True)
        remove_compiled(package)
        for target in TARGETS.values():
            shutil.copy2(work / target, package)
        note_facts(package, version)

    def ninja_file(self, work, torch_dir):
        # torch is seen by ops*.cpp alone, Python by host*.cpp, and of both direct.cpp sees the part that does not change
        system = {"ops": [torch_dir / "include"], "direct": [torch_dir / "include", INCLUDE_PYTHON], "host": []}
        if HOST:
            import pybind11

            system["host"] = [pybind11.get_include(), INCLUDE_PYTHON]
        extra = {kind: " ".join(f"-isystem {shlex.quote(str(path))}" for path in paths) for kind, paths in system.items()}
        extra["host"] += " -Wno-unknown-pragmas"  # those of the CUDA code that it runs on the CPU
        extra["ops"] += " -DTORCH_STABLE_ONLY -DTORCH_TARGET_VERSION=0x020a000000000000"
        extra |= {f"isa_{isa}": flags for isa, flags in ISAS.items()}
        mapped = shlex.quote(f"-ffile-prefix-map={ROOT}=.")
        lines = [
            f"rule compile\n  command = {CXX} -MD -MF $out.d {flags()} {mapped} $extra -c $in -o $out\n  depfile = $out.d\n  deps = gcc",
            f"rule link\n  command = {CXX} -shared {SANITIZE_FLAGS} $in -o $out $libraries {os.environ.get('LDFLAGS', '')}",
        ]
        objects = {"ops": "", "direct": "", "host": "", "cpu": "", "cuda": ""}
        for source in sorted((ROOT / "csrc").rglob("*.cpp")):
            kind = next((kind for kind in extra if source.stem.startswith(kind)), "other")
            if kind == "host" and not HOST or kind == "direct" and not DIRECT or kind == "other" and source.stem.startswith("isa_"):
                continue  # the instruction set of another processor
            if source.stem.startswith("ops_cuda") and not CUDA:
                continue
            lines.append(f"build {source.stem}.o: compile {os.path.relpath(source, work)}\n  extra = {extra.get(kind, '')}")
            objects[kind if kind in objects else "cpu"] += f" {source.stem}.o"
        libraries = f"-L{shlex.quote(str(torch_dir / 'lib'))} -Wl,--no-as-needed -ltorch -ltorch_cpu -lc10"
        if CUDA:
            # what the assembler says of registers and spills is kept: tests/test_cuda_build.py has limits
            holds = "'-DMMFAST_CUDA_ARCHITECTURES=\"" + ";".join(ARCHITECTURES) + "\"'"
            threads = max(1, len(os.sched_getaffinity(0)) // 2)  # two of the files take most of the time, once for each architecture
            nvcc = f"{shlex.quote(str(CUDA / 'bin/nvcc'))} {host_compiler(CXX)} {NVCC_FLAGS} {gencodes(ARCHITECTURES)} {holds}"
            nvcc += f" -Xptxas -v --threads {threads}"
            lines.append(f"rule cuda\n  command = {nvcc} -MD -MF $out.d -c $in -o $out > $out.ptxas 2>&1 || (cat $out.ptxas; false)")
            lines.append("  depfile = $out.d\n  deps = gcc")
            for source in sorted((ROOT / "csrc/cuda").glob("*.cu")):
                lines.append(f"build cuda_{source.stem}.o: cuda {os.path.relpath(source, work)}")
                objects["cuda"] += f" cuda_{source.stem}.o"
            libraries += f" -L{shlex.quote(str(CUDA / 'lib64'))} -lcudart_static -lpthread -ldl -lrt -Wl,--exclude-libs,ALL"
        lines.append(f"build _C.so: link {objects['ops']} {objects['cpu']} {objects['cuda']}\n  libraries = {libraries}")
        if DIRECT:
            lines.append(f"build {TARGETS['_direct']}: link {objects['direct']}")
        if HOST:
            lines.append(f"build {TARGETS['_host']}: link {objects['host']} {objects['cpu']}")
        return "\n".join(lines) + "\n"


class Wheel(bdist_wheel):
    def get_tag(self):
        tag = super().get_tag()
        return tag if HOST or BUILD == "none" else ("py310", "none", tag[2])


extensions = [] if BUILD == "none" else [Extension(f"mmfast.{name}", []) for name in TARGETS]
if __name__ == "__main__":  # also where a front end runs this file
    setup(ext_modules=extensions, cmdclass={"build_py": Package, "build_ext": Ninja, "bdist_wheel": Wheel})
