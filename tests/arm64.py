"""Holds the CPU operators on ARM to the bits of x86, as `make arm64` does: cross-compiled, run under QEMU, every result hashed.

Needs aarch64-linux-gnu-g++ and qemu-aarch64 (Debian: g++-aarch64-linux-gnu, qemu-user). Also counts what the compiler made of the multiply-adds.
"""

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

from rule_table import RULES

ROOT = Path(__file__).parent.parent
FACTS = json.loads((ROOT / "mmfast/_build.json").read_text())
CROSS = "aarch64-linux-gnu-"


def rules():
    """One line each: name, steps, parameters, K; lists with their length in front."""
    for name, row in RULES.items():
        for k in (row.min_k + 1, 7, 12):
            chain = row.make(k).chain()
            if chain is None:
                continue
            steps = [n for rule in chain for n in (rule.method, len(rule.params()))]
            params = [x for rule in chain for x in rule.params()]
            yield " ".join(map(str, [name.replace(" ", "_"), len(steps), *steps, len(params), *params, 1, k]))


def compiled(compiler, source, target):
    """The object of a source file, with the flags of the library."""
    subprocess.run([compiler, *FACTS["flags"].split(), f"-I{ROOT / 'csrc'}", "-c", source, "-o", target], check=True)
    return target


def hashes(*command):
    """{instruction set: {operator: hash}}"""
    printed = subprocess.run(command, input="\n".join(rules()), text=True, check=True, stdout=subprocess.PIPE).stdout
    found = {}
    for line in printed.splitlines():
        isa, *what, value = line.split()
        found.setdefault(isa, {})[" ".join(what)] = value
    return found


def x86_hashes(folder):
    """Of every instruction set that this processor has: the objects are those of the library."""
    built = ROOT / "build" / FACTS["MMFAST_BUILD"]
    main = compiled("g++", ROOT / "tests/arm64.cpp", folder / "x86.o")
    subprocess.run(["g++", main, built / "choose.o", *built.glob("isa_*.o"), "-o", folder / "x86"], check=True)
    return hashes(folder / "x86")


def arm_hashes(folder):
    """Of the one instruction set of ARM, and how many multiply-adds are (vector instructions, scalar ones, calls of a function)."""
    sources = ["tests/arm64.cpp", "csrc/cpu/choose.cpp", "csrc/cpu/isa_portable.cpp"]
    objects = [compiled(f"{CROSS}g++", ROOT / source, folder / f"{Path(source).stem}.o") for source in sources]
    subprocess.run([f"{CROSS}g++", "-static", *objects, "-o", folder / "arm"], check=True)
    code = subprocess.run([f"{CROSS}objdump", "-d", objects[-1]], text=True, check=True, stdout=subprocess.PIPE).stdout
    counts = [len(re.findall(pattern, code)) for pattern in (r"\tfmla\t", r"\tfmadd\t", r"\tbl\t.*<fmaf?>")]
    return hashes("qemu-aarch64", folder / "arm")["portable"], counts


def main():
    with tempfile.TemporaryDirectory() as name:
        answers = {f"x86 {isa}": found for isa, found in x86_hashes(Path(name)).items()}
        answers["ARM"], (vector, scalar, calls) = arm_hashes(Path(name))
    print(f"on ARM: {vector} vector multiply-adds, {scalar} scalar ones, {calls} calls of a function for one")
    failed = calls > 0 or vector < 1000
    widest = next(iter(answers))
    for isa, found in answers.items():
        differ = [what for what in answers[widest] if found.get(what) != answers[widest][what]]
        print(f"{isa}: {len(found)} hashes, {len(differ)} other than those of {widest}", *differ, sep="\n    ")
        failed |= bool(differ)
    return failed


if __name__ == "__main__":
    sys.exit(main())
