"""Installs the wheel in dist into empty environments and tests the installed package there, away from the source, as `make wheel-test` does.

Each environment first has torch and nothing else: the wheel must bring nothing with it, work without NumPy, and pass the tests that need none. Then it
gets what the other tests need. What stands behind the options goes to pytest in place of the whole suite.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent
WITHOUT_NUMPY = [
    f"tests/test_{name}.py"
    for name in ("block", "checkpoints", "compose", "func", "in_place", "magnitude", "projection", "robust", "stats")
]
PIP = ["-m", "pip", "--disable-pip-version-check"]
# warnings are errors in the tests, but for what torch itself says: of a missing NumPy, of Python 3.13.0, and of its own jit, which its forward mode uses
TORCHS_OWN = ("Failed to initialize NumPy", "Guards may run slower", "`torch.jit.script` is deprecated")
PYTEST = ["-m", "pytest", "-q", "-p", "no:cacheprovider", *(word for text in TORCHS_OWN for word in ("-W", f"ignore:{text}"))]

SMOKE = """
import sys, time
start = time.perf_counter()
import mmfast as mf  # before torch, which warns where there is no NumPy
import torch
print(f"Python {sys.version.split()[0]}, torch {torch.__version__}, imported in {time.perf_counter() - start:.1f} s")
assert "site-packages" in mf.__file__, mf.__file__
from mmfast.backends import cpu, direct, library
assert library.available and direct.missing_reason is None, (library.missing_reason, direct.missing_reason)
torch.manual_seed(0)
for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
    grads = torch.randn(5, 10_001, dtype=dtype)
    for rule in (mf.MGDA(), mf.UPGrad(), mf.CAGrad(), mf.TrimmedMean(1)):
        torch.testing.assert_close(mf.resolve(grads, rule, backend="cpu"), mf.resolve(grads, rule, backend="reference"))
encoder = torch.nn.Linear(20, 64)
heads = torch.nn.ModuleList([torch.nn.Linear(64, n) for n in (3, 1, 7)])
block = mf.ImpartialityBlock(heads, mf.PCGrad())
optimizer = torch.optim.SGD([*encoder.parameters(), *heads.parameters()], 0.1)
for _ in range(20):
    optimizer.zero_grad()
    sum(output.square().mean() for output in block(encoder(torch.randn(32, 20)))).backward()
    optimizer.step()
print(block.stats())
print("instruction set:", cpu.isa())
"""


def run(*command, **options):
    """Runs a command and shows it; returns what it printed where `capture_output` is given."""
    print("$", *("..." if "\n" in str(word) else word for word in command), flush=True)
    return subprocess.run(list(map(str, command)), check=True, text=True, **options).stdout


def packages(python):
    """Names of what is installed, and their versions."""
    return {package["name"]: package["version"] for package in json.loads(run(python, *PIP, "list", "--format=json", capture_output=True))}


def environment(folder, interpreter, torch):
    """The Python of a virtual environment that holds torch of this version, or the newest; made if it is not there."""
    python = folder / "bin/python"
    if not python.exists():
        run(interpreter, "-m", "venv", folder)
    there = packages(python).get("torch", "").split("+")[0]
    if not there or torch not in (
        "newest",
        there,
    ):  # also where an earlier time was cut off, and another version came in with the tests' packages
        wanted = "torch" if torch == "newest" else f"torch=={torch}"
        run(python, *PIP, "install", "--quiet", *os.environ.get("PIP_FLAGS", "").split(), wanted)
    return python


def install(python, wheel):
    """Installs the wheel, which must bring nothing else; prints how long it took and how much it is."""
    if "mmfast" in packages(python):
        run(python, *PIP, "uninstall", "--quiet", "-y", "mmfast")
    before, start = packages(python).keys(), time.perf_counter()
    run(python, *PIP, "install", "--quiet", wheel)
    seconds = time.perf_counter() - start
    if packages(python).keys() - before != {"mmfast"}:
        sys.exit(f"the wheel brought {packages(python).keys() - before}")
    site = Path(run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", capture_output=True).strip())
    size = sum(path.stat().st_size for path in (site / "mmfast").rglob("*") if path.is_file() and path.suffix != ".pyc")
    print(f"installed in {seconds:.1f} s: {wheel.stat().st_size / 1e6:.1f} MB, {size / 1e6:.1f} MB on disk", flush=True)


def unpacked_tests(folder):
    """The source distribution without the package: tests that find no mmfast but the installed one."""
    with tarfile.open(next((ROOT / "dist").glob("mmfast-*.tar.gz"))) as source:
        source.extractall(folder, filter="data")
    (tests,) = folder.iterdir()
    shutil.rmtree(tests / "mmfast")
    return tests


def check(python, wheel, tests, arguments):
    """All checks of one environment."""
    quiet = {"cwd": tests, "env": {**os.environ, "OMP_WAIT_POLICY": "passive", "PYTHONPATH": ""}}
    numpy = "numpy" in packages(python)
    install(python, wheel)
    run(python, "-W", "error", "-c", SMOKE, **quiet)
    run(python, "-m", "mmfast", "doctor", **quiet)
    if numpy:
        print("NumPy is there already: the tests without it are left out")
    else:
        run(python, *PIP, "install", "--quiet", "pytest", "hypothesis")
        run(python, *PYTEST, *WITHOUT_NUMPY, **quiet)
    torch = packages(python)["torch"]
    run(python, *PIP, "install", "--quiet", f"{wheel}[dev]")
    if packages(python)["torch"] != torch:
        sys.exit(f"the tests' packages brought torch {packages(python)['torch']} in place of {torch}")
    run(python, *PYTEST, *(arguments or ["-n", "2", "--dist", "worksteal"]), **quiet)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--python", nargs="+", default=["python3.10", "python3.13"], help="interpreters (default: python3.10 python3.13)")
    parser.add_argument(
        "--torch",
        nargs="+",
        default=["2.10.0", "newest"],
        help="versions (default: 2.10.0 newest); PIP_FLAGS may name an index of CPU builds",
    )
    parser.add_argument("--folder", type=Path, help="where environments are kept for the next time, as PYTHON-TORCH")
    options, arguments = parser.parse_known_args()
    wheels = [path for path in (ROOT / "dist").glob("mmfast-*.whl") if not path.stem.endswith("-none-any")]
    if len(wheels) != 1:
        sys.exit(f"dist holds {len(wheels)} compiled wheels, expected one; make wheel builds it")
    with tempfile.TemporaryDirectory() as folder:
        tests = unpacked_tests(Path(folder, "source"))
        for interpreter in options.python:
            for torch in options.torch:
                print(f"\n{interpreter}, torch {torch}", flush=True)
                place = (options.folder or Path(folder)).resolve() / f"{Path(interpreter).name}-{torch}"
                check(environment(place, interpreter, torch), wheels[0], tests, arguments)
    print("\nall environments passed")


if __name__ == "__main__":
    main()
