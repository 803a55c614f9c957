"""Looks for races in the solvers: every rule by a team of 32 threads under ThreadSanitizer, as `make sanitize` does (about three minutes)."""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from problems import gramian
from rule_table import RULES

ROOT = Path(__file__).parent.parent


def problems():
    """One line each: name, steps, parameters, Gramian; lists with their length in front. Regular ones, equal rows, low rank."""
    for name, row in RULES.items():
        for k in (row.min_k + 1, 7, 12, 34):
            chain = row.make(k).chain()
            if chain is None:
                continue
            twins = gramian(k, seed=2)
            twins[-1], twins[:, -1], twins[-1, -1] = twins[0].clone(), twins[:, 0].clone(), twins[0, 0].clone()
            flat = torch.randn(k, max(2, k // 3), dtype=torch.float64)
            for G in (gramian(k, seed=0), gramian(k, seed=1), twins, flat @ flat.T):
                steps = [n for rule in chain for n in (rule.method, len(rule.params()))]
                params = [x for rule in chain for x in rule.params()]
                yield " ".join(map(str, [name.replace(" ", "_"), len(steps), *steps, len(params), *params, k * k, *G.flatten().tolist()]))


def main():
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        program = Path(folder, "races")
        flags = ["-O1", "-g", "-std=c++17", "-ffp-contract=off", "-fsanitize=thread", f"-I{ROOT / 'csrc'}"]
        subprocess.run([os.environ.get("CXX", "g++"), *flags, ROOT / "tests/races.cpp", "-o", program, "-lpthread"], check=True)
        env = {**os.environ, "TSAN_OPTIONS": "halt_on_error=1"}
        run = subprocess.run([program], input="\n".join(problems()), text=True, env=env, stderr=subprocess.PIPE, check=False)
    if run.returncode:
        print(run.stderr[-6000:], file=sys.stderr)
    return run.returncode


if __name__ == "__main__":
    sys.exit(main())
