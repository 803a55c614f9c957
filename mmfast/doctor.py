"""mmfast doctor: what this installation can do, why it cannot do the rest, and whether its kernels compute what they should on this device.

The standard library alone is needed; torch is asked where it loads.
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

from mmfast import __version__
from mmfast.console import fail, missing

EXTRAS = {
    "demo": {"typer": "typer", "rich": "rich", "sklearn": "scikit-learn", "matplotlib": "matplotlib"},
    "train": {"typer": "typer", "rich": "rich", "scipy": "scipy"},
    "plot": {"matplotlib": "matplotlib"},
}
# docs/environment.md says what each of them does
VARIABLES = (
    *(f"MMFAST_{name}" for name in ("BACKEND", "VERIFY", "LIBRARY", "CPU_ISA", "CUDA_PATH", "CUDA_OVERLAP", "POISON", "DATA")),
    *("TRITON_INTERPRET", "XDG_CACHE_HOME", "CUDA_VISIBLE_DEVICES", "CUDA_MODULE_LOADING"),
)
USAGE = """Usage: mmfast doctor [--check] [--thorough] [--json]

Prints what this installation can do, and why it cannot do the rest.

  --check     also tests every path of every backend on this device, as mmfast.verify() does; the exit status is 1 where one fails
  --thorough  tests more: seconds instead of a tenth of one
  --json      prints one JSON object, for a bug report"""


def doctor(arguments: list[str]) -> None:
    """The command."""
    if arguments in (["--help"], ["-h"]):
        print(USAGE)
        return
    for argument in arguments:
        if argument not in ("--check", "--thorough", "--json"):
            fail(f"doctor takes --check, --thorough and --json, got {argument}")
    found, report = facts(), None
    if "--check" in arguments or "--thorough" in arguments:
        report = _check("--thorough" in arguments)
    if "--json" in arguments:
        print(json.dumps(found | ({"check": json.loads(report.to_json())} if report else {}), indent=1))
    else:
        width = max(map(len, found))
        for name, value in found.items():
            print(f"{name:<{width}}  {value}")
        if report:
            print(f"\n{report}")
    if report and not report.passed:
        raise SystemExit(1)


def _check(thorough: bool) -> Any:
    try:
        from mmfast.ops.verify import verify

        return verify(thorough=thorough)
    except Exception as error:  # noqa: BLE001 whatever a broken torch or GPU dies of, the person must be told
        fail(f"nothing can be tested: {type(error).__name__}: {error}")


def facts() -> dict[str, Any]:
    """Versions, backends, extras, what the build noted, and which environment variables steer it."""
    found: dict[str, Any] = {"mmfast": __version__, "python": sys.version.split()[0]} | _torch_facts()
    for extra, packages in EXTRAS.items():
        lacking = ", ".join(missing(packages))
        found[f"mmfast {extra}"] = f"not available: needs {lacking}; pip install 'mmfast[{extra}]'" if lacking else "available"
    found |= {f"built {name}": value for name, value in _build_facts().items() if value}
    return found | {name: os.environ[name] for name in VARIABLES if os.environ.get(name)}


def _torch_facts() -> dict[str, Any]:
    """What torch and the backends say of themselves, or why torch cannot be asked."""
    cure = "mmfast computes nothing without it; pip install 'torch>=2.10'"
    if missing({"torch": "torch"}):
        return {"torch": f"not installed: {cure}"}
    try:
        import torch

        from mmfast.backends.choice import backends
    except Exception as error:  # noqa: BLE001 whatever a broken torch dies of, the person must be told
        return {"torch": f"does not load ({type(error).__name__}: {error}): {cure}"}
    found: dict[str, Any] = {"torch": torch.__version__, "threads": torch.get_num_threads()}
    try:
        for name, (available, reason) in backends().items():
            found[f"backend {name}"] = reason if available else f"not available: {reason}"
        found["GPU"] = torch.cuda.get_device_name() if torch.cuda.is_available() else "none that torch can use"
    except Exception as error:  # noqa: BLE001 a GPU that is there and does not answer, say: that is what is asked about
        found["GPU"] = f"does not answer: {type(error).__name__}: {error}"
    return found


def _build_facts() -> dict[str, Any]:
    """What the build wrote down; read here, for the module that knows the library loads torch."""
    library = os.environ.get("MMFAST_LIBRARY")
    folder = Path(library).parent if library else Path(__file__).parent
    try:
        facts = json.loads((folder / "_build.json").read_text())
    except (OSError, ValueError):
        return {}
    return facts if isinstance(facts, dict) else {}
