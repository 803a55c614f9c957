"""Host overhead against the stored baseline: runs test_overhead.py and prints pytest-benchmark's comparison; test_overhead.py says how to fail on it."""

import importlib.util
import json
import subprocess
import sys

from benchmarks.machine import ROOT, environment
from benchmarks.rows import RESULTS

BASELINE = RESULTS / "overhead-baseline.json"


def compare() -> None:
    if importlib.util.find_spec("pytest_benchmark") is None:
        print("no overhead comparison: pytest-benchmark is not installed")
        return
    line = [sys.executable, "-m", "pytest", "-q", "benchmarks/test_overhead.py"]
    line += ["--benchmark-columns=median,iqr,rounds", "--benchmark-sort=name"]
    if BASELINE.exists():
        line += [f"--benchmark-compare={BASELINE.relative_to(ROOT)}"]
        env, then = environment(), json.loads(BASELINE.read_text())["machine_info"]
        other = [f"{name} {now!r}, then {then.get(name)!r}" for name, now in env.items() if name in then and then[name] != now]
        if other:  # numbers of another machine are shown, but nothing is concluded from them
            print(f"the overhead baseline was made elsewhere: {'; '.join(other)}")
            line += ["-W", "ignore::pytest_benchmark.logger.PytestBenchmarkWarning"]
    subprocess.run(line, check=False, cwd=ROOT)
