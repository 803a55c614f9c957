"""Builds mmfast/_C.so with ninja. Read top to bottom: find what there is, write build.ninja, run it, record the facts."""

import json
import os
import platform
import shutil
import subprocess
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()
ISA_FLAGS = {
    "isa_avx512": "-mavx2 -mfma -mf16c -mavx512f -mavx512bw -mavx512vl -mavx512dq -mprefer-vector-width=512 -Wno-maybe-uninitialized",
    "isa_avx2": "-mavx2 -mfma -mf16c",
    "isa_portable": "",
}


class Ninja(build_ext):
    def get_ext_filename(self, name):
        return name.replace(".", os.sep) + ".so"  # no Python version in the name: the stable ABI serves them all

    def build_extension(self, ext):
        import torch

        torch_dir = Path(torch.__file__).parent
        out = Path(self.get_ext_fullpath(ext.name))
        work = Path(self.build_temp).resolve()
        work.mkdir(parents=True, exist_ok=True)
        out.parent.mkdir(parents=True, exist_ok=True)
        cxx = os.environ.get("CXX", "g++")
        # -ffp-contract=off: a fused multiply-add is written where it is meant, so every instruction set gives the same bits
        flags = (
            "-O3 -g1 -std=c++17 -fPIC -fvisibility=hidden -fno-math-errno -ffp-contract=off -Wall -Wextra "
            f"-DTORCH_STABLE_ONLY -DTORCH_TARGET_VERSION=0x020a000000000000 -isystem {torch_dir}/include "
            f"-isystem {torch_dir}/include/torch/csrc/api/include {os.environ.get('CXXFLAGS', '')}"
        )
        sources = [ROOT / "csrc/ops.cpp", *sorted((ROOT / "csrc/cpu").glob("*.cpp"))]
        rules = [
            f"cxx = {cxx}",
            f"flags = {flags}",
            "rule compile\n  command = $cxx -MMD -MF $out.d $flags $isa -c $in -o $out\n  depfile = $out.d\n  deps = gcc",
            f"rule link\n  command = $cxx -shared $in -o $out -L{torch_dir}/lib -Wl,--no-as-needed -ltorch -ltorch_cpu -lc10 "
            f"{os.environ.get('LDFLAGS', '')}",
        ]
        objects = []
        for source in sources:
            objects.append(f"{source.stem}.o")
            rules.append(f"build {source.stem}.o: compile {source}\n  isa = {ISA_FLAGS.get(source.stem, '')}")
        rules.append(f"build {out.resolve()}: link {' '.join(objects)}")
        (work / "build.ninja").write_text("\n".join(rules) + "\n")
        subprocess.check_call([shutil.which("ninja") or "ninja", "-C", str(work)])


setup(ext_modules=[Extension("mmfast._C", [])], cmdclass={"build_ext": Ninja})
