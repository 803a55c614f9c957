"""The compiled library: what it needs, what it exports, which instruction set runs, and what happens without it."""

import copy
import importlib
import json
import os
import pkgutil
import platform
import re
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from problems import gramian
from rule_table import RULES

import mmfast as mf
from mmfast import ops, resolvers
from mmfast.backends import cpu, cuda, direct, library
from mmfast.resolvers.base import Rule

ROOT = Path(__file__).parent.parent
PACKAGE = Path(mf.__file__).parent  # elsewhere where the installed wheel is tested
X86 = platform.machine() == "x86_64"
CPU_FLAGS = {"avx512": {"avx512f", "avx512bw", "avx512vl", "avx512dq"}, "avx2": {"avx2", "fma", "f16c"}, "portable": set()}
SETUPTOOLS = int(metadata.version("setuptools").split(".")[0])
builds = pytest.mark.skipif(SETUPTOOLS < 77, reason=f"setuptools {SETUPTOOLS} is too old for setup.py")
compiled = pytest.mark.skipif(not library.available, reason=f"nothing compiled to look at: {library.missing_reason}")


def python(*arguments, folder=ROOT, **environment):
    """Runs Python elsewhere; an environment value of None unsets the variable."""
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **environment}
    env = {name: value for name, value in env.items() if value is not None}
    return subprocess.run([sys.executable, *arguments], check=False, cwd=folder, env=env, capture_output=True, text=True)


def has_isa(isa):
    if not X86:
        return isa == "portable"
    return CPU_FLAGS[isa] <= set(re.search(r"^flags\s*:(.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)[1].split())


@compiled
def test_library_needs_only_the_stable_abi():
    """No Python, no C++ symbol of torch: one binary serves every Python and every torch from 2.10 on."""
    if shutil.which("nm") is None:
        pytest.skip("nm is not installed")
    if "-fsanitize" in library.read_facts(library.PATH).get("flags", ""):
        pytest.skip("a sanitized library takes malloc and others from its sanitizer")
    lines = subprocess.check_output(["nm", "-D", library.PATH], text=True).splitlines()
    symbols = [line.split()[-2:] for line in lines]
    needed = {name for kind, name in symbols if kind == "U"}
    system = {name for name in needed if re.search(r"@(GLIBC|GLIBCXX|CXXABI|GCC)_|^_Z(T[ISV])?N?K?S[a-z]", name)}  # libc, std::
    torchs = {name for name in needed if re.match(r"(aoti_torch|torch)_[a-z0-9_]+$", name)}
    assert torchs
    assert needed - system - torchs == set()
    ours = {name for kind, name in symbols if kind == "T"}
    cudas = {f"mmfast_cuda_{name}" for name in ("why_not", "code", "architectures", "force", "allow", "paths", "tune", "plan")}
    assert ours - {"_init", "_fini"} == {"mmfast_cpu_isa", "mmfast_cpu_entry"} | (cudas if library.built_with_cuda else set())


@compiled
def test_the_way_past_the_dispatcher_is_there():
    """Where it was built, it loads, and needs nothing of torch and only the stable part of Python."""
    if not library.read_facts(library.PATH).get("direct"):
        pytest.skip("built without Python's development files, or for a Python without a global lock")
    assert direct.missing_reason is None
    module = library.PATH.with_name("_direct.abi3.so")
    if shutil.which("nm") is None or "-fsanitize" in library.read_facts(library.PATH).get("flags", ""):
        pytest.skip("nm is not installed, or a sanitized library takes malloc and others from its sanitizer")
    symbols = [line.split()[-2:] for line in subprocess.check_output(["nm", "-D", module], text=True).splitlines()]
    needed = {name for kind, name in symbols if kind == "U"}
    assert {name for name in needed if not re.search(r"@(GLIBC|GLIBCXX|CXXABI|GCC)_|^_?Py", name)} == set()
    assert {name for kind, name in symbols if kind == "T"} - {"_init", "_fini"} == {"PyInit__direct"}


@compiled
def test_every_instruction_set_gives_the_same_bits():
    code = """
import torch
from problems import gramian
from rule_table import RULES
from mmfast import ops, resolvers
from mmfast.backends import cpu, cuda, library
print(cpu.isa())
for name, row in RULES.items():
    torch.manual_seed(0)
    for k in (row.min_k, row.min_k + 4, 33):
        print(name, k, [x.hex() for x in ops.weights(gramian(k), row.make(k)).tolist()])
"""
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    answers = {}
    for isa in filter(has_isa, CPU_FLAGS):
        run = python("-c", code, MMFAST_CPU_ISA=isa, PYTHONPATH=path)
        assert run.returncode == 0, run.stderr
        chosen, answers[isa] = run.stdout.split("\n", 1)
        assert chosen == isa
    widest = next(iter(answers))
    assert cpu.isa() == os.environ.get("MMFAST_CPU_ISA", widest)
    for isa, answer in answers.items():
        assert answer == answers[widest], isa


def test_reasons(tmp_path, monkeypatch):
    """Whatever is wrong with the library, the reason names it, what it was built as, and the line that builds it."""
    path = tmp_path / "_C.so"
    assert "does not exist" in library.load(path) and library.BUILD_LINE in library.load(path)
    path.write_text("not a library")
    (tmp_path / "_build.json").write_text(json.dumps({"version": "1.2.3", "compiler": "g++ 99"}))
    reason = library.load(path)
    assert f"does not load with torch {torch.__version__}" in reason
    assert str(path) in reason and "version: 1.2.3, compiler: g++ 99" in reason and library.BUILD_LINE in reason
    monkeypatch.setattr(sys, "platform", "darwin")  # where it cannot be built
    assert library.load(tmp_path / "none.so").endswith("the compiled code is for Linux, this is darwin")


@compiled
@pytest.mark.parametrize("name", ["_C.so", "./_C.so", "../place/_C.so"])
def test_a_library_by_a_relative_path_is_found_from_everywhere(tmp_path, name):
    place = tmp_path / "place"
    place.mkdir()
    for file in (library.PATH, *library.PATH.parent.glob("_direct*.so")):
        (place / file.name).symlink_to(file)
    code = "import os, mmfast as mf; from mmfast.backends import cpu, direct; os.chdir('/'); print(cpu.isa(), mf.backends()['cpu'], direct.missing_reason)"
    run = python("-c", code, folder=place, MMFAST_LIBRARY=name)
    assert run.stdout == f"{cpu.isa()} {mf.backends()['cpu']} {direct.missing_reason}\n", run.stdout + run.stderr


@compiled
@pytest.mark.parametrize("facts", [{"version": "0.0.9"}, {}, [], {"version": mf.__version__, "git": "other"}])
def test_a_library_of_another_version_is_not_taken(tmp_path, facts):
    """Its operators may have the same names and take other arguments: an editable install whose source moved on."""
    path = tmp_path / "_C.so"
    path.symlink_to(library.PATH)
    (tmp_path / "_build.json").write_text(json.dumps(facts))
    reason = library.load(path)
    if facts == {"version": "0.0.9"}:
        assert f"{path} (version: 0.0.9) is not of this mmfast, {mf.__version__}; build it again with: " in reason
    else:
        assert reason is None


def test_without_a_library_the_reference_serves(tmp_path):
    library = tmp_path / "_C.so"
    library.write_bytes(b"\x7fELF broken")
    code = """
import torch
from mmfast import ops, resolvers
from mmfast.backends import cpu, cuda, library
from mmfast.resolvers.simple import Mean
assert cpu.isa() is None
print(library.available, library.missing_reason, ops.weights(torch.eye(4), Mean()).tolist())
"""
    run = python("-c", code, MMFAST_LIBRARY=str(library))
    assert run.returncode == 0, run.stderr
    assert run.stdout.startswith(f"False {library} ") and run.stdout.endswith("[0.25, 0.25, 0.25, 0.25]\n")


@compiled
def test_facts():
    facts = library.read_facts(library.PATH)
    assert re.match(r"\d+\.\d+\.\d+", facts["version"])
    assert facts["MMFAST_BUILD"] in ("cpu", "cuda") and facts["torch"] and facts["compiler"] and "-O" in facts["flags"]
    assert facts["isas"] == (list(CPU_FLAGS) if X86 else ["portable"])
    assert str(ROOT) not in json.dumps(facts)  # it travels in wheels


def test_the_cuda_backend_says_why_it_is_not_there(monkeypatch):
    """No library, no CUDA in it, no GPU, no code for it: each has its reason, and nothing falls back in silence."""
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    reason = cuda.why_not()
    assert mf.backends()["cuda"] == (False, reason)
    with pytest.raises(RuntimeError, match="backend 'cuda' is not available: "):
        ops.gram([torch.ones(2)], backend="cuda")
    if library.read_facts(library.PATH).get("cuda"):
        assert reason == f"torch {torch.__version__} sees no CUDA device"
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        assert cuda.why_not() == f"{library.PATH}: there is no NVIDIA driver"
        monkeypatch.setattr(cuda, "_served", set())
        monkeypatch.setattr(cuda, "_exports", lambda: SimpleNamespace(mmfast_cuda_why_not=lambda device: None))
        assert cuda.why_not() is None
        with pytest.raises(ValueError, match="backend 'cuda' needs tensors on CUDA, they are on cpu"):
            ops.gram([torch.ones(2)], backend="cuda")
    monkeypatch.setattr(library, "available", False)
    monkeypatch.setattr(library, "missing_reason", "no library")
    assert cuda.why_not() == "no library"


@builds
@pytest.mark.parametrize("build", ["none", "auto"])
def test_install_without_a_compiler(tmp_path, build):
    """The pure-Python package works, from any folder."""
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path)
    shutil.copytree(PACKAGE, tmp_path / "mmfast", ignore=shutil.ignore_patterns("*.so", "_build.json", "__pycache__"))
    environment = {"MMFAST_BUILD": build, "PATH": str(tmp_path / "empty"), "CXX": None, "MMFAST_LIBRARY": None}
    run = python("setup.py", "-q", "build", "--build-lib", str(tmp_path / "lib"), folder=tmp_path, **environment)
    assert run.returncode == 0, run.stderr
    assert ("NOTHING IS COMPILED" in run.stderr) == (build == "auto")
    assert (tmp_path / "lib/mmfast/py.typed").exists()
    assert (tmp_path / "lib/mmfast/__init__.py").exists() and not list((tmp_path / "lib").rglob("*.so"))
    facts = json.loads((tmp_path / "lib/mmfast/_build.json").read_text())
    why = "MMFAST_BUILD=none" if build == "none" else "no C++ compiler was found"
    assert facts["MMFAST_BUILD"] == "none" and why in facts["why_not_more"] and facts["version"]
    code = "import mmfast.ops as o, torch; from mmfast.backends import library; from mmfast.resolvers.simple import Sum; print(library.available, o.weights(torch.eye(2), Sum()).sum().item())"
    run = python("-c", code, folder="/", PYTHONPATH=str(tmp_path / "lib"), MMFAST_LIBRARY=None)
    assert run.stdout == "False 2.0\n", run.stderr
    said = why if PACKAGE.parent == ROOT else "before the installed mmfast"  # which it then hides
    assert said in run.stderr and "MMFAST_BUILD=cpu pip install --force-reinstall" in run.stderr
    run = python("setup.py", "-q", "build_ext", "--inplace", folder=tmp_path, **environment)
    assert run.returncode == 0 and why in json.loads((tmp_path / "mmfast/_build.json").read_text())["why_not_more"]


@builds
def test_a_compile_that_fails_leaves_its_reason(tmp_path):
    pytest.importorskip("ninja", reason="ninja is not installed")
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path)
    shutil.copytree(PACKAGE, tmp_path / "mmfast", ignore=shutil.ignore_patterns("*.so", "_build.json", "__pycache__"))
    shutil.copytree(ROOT / "csrc", tmp_path / "csrc")
    (tmp_path / "broken").write_text("#!/bin/sh\nexit 1\n")
    (tmp_path / "broken").chmod(0o755)
    run = python("setup.py", "-q", "build_ext", "--inplace", folder=tmp_path, MMFAST_BUILD="cpu", CXX=str(tmp_path / "broken"))
    assert run.returncode != 0 and "compiling failed" in run.stderr
    facts = json.loads((tmp_path / "mmfast/_build.json").read_text())
    assert facts["MMFAST_BUILD"] == "none" and facts["why_not_more"] == "compiling with MMFAST_BUILD=cpu failed"


SLOW = """
import sys, warnings, torch
with warnings.catch_warnings(record=True) as seen:
    warnings.simplefilter("always")
    import mmfast as mf
    g = [torch.randn(4), torch.randn(4)]
    mf.resolve(g, mf.MGDA(), backend="reference"); mf.gram(g, backend="reference")
    assert not seen, seen
    for _ in range(3):
        for call in (lambda: mf.resolve(g, mf.MGDA()), lambda: mf.gram(g), lambda: mf.resolve(g, mf.TrimmedMean(0)), lambda: mf.LinearHeads(4, [1], "mgda")(torch.randn(2, 4, requires_grad=True))[0].sum().backward()):
            call()
print(len(seen), seen[0].filename.endswith(("<string>", "-c")), seen[0].message)
"""


@pytest.mark.parametrize("shadows", [True, False])
def test_slow_calls_say_why_once(tmp_path, shadows):
    """A source folder before the installed package, or an installed one without compiled code; not at import, not where plain torch was asked for."""
    shutil.copytree(PACKAGE, tmp_path / "clone/mmfast", ignore=shutil.ignore_patterns("*.so", "_build.json", "__pycache__"))
    if shadows:
        (tmp_path / "clone/setup.py").write_text("")
    (tmp_path / "site/mmfast").mkdir(parents=True)
    if shadows:
        (tmp_path / "site/mmfast/_C.so").write_text("")
    path = os.pathsep.join([str(tmp_path / "clone"), str(tmp_path / "site")])
    run = python("-c", SLOW, folder=tmp_path, PYTHONPATH=path, MMFAST_LIBRARY=None)
    assert run.stdout.startswith("1 True mmfast runs in plain torch on this CPU"), run.stdout + run.stderr
    assert ("pip install -e ." if shadows else "--no-binary mmfast") in run.stdout
    assert (f"before the installed mmfast in {tmp_path / 'site'}" in run.stdout) == shadows


@builds
@pytest.mark.parametrize(
    ("build", "path", "complaint"),
    [
        ("gpu", None, "MMFAST_BUILD is 'gpu'; it must be auto, cuda, cpu or none"),
        ("cpu", "/nowhere", "MMFAST_BUILD=cpu is impossible: no C++ compiler was found"),
        ("cuda", "/nowhere", "MMFAST_BUILD=cuda is impossible: no C++ compiler was found"),
    ],
)
def test_impossible_builds_fail(build, path, complaint):
    run = python("setup.py", "--version", MMFAST_BUILD=build, CXX=None, **({"PATH": path} if path else {}))
    assert run.returncode != 0 and complaint in run.stderr


def test_core_needs_no_numpy():
    code = "import sys; sys.modules['numpy'] = None; import mmfast.ops as o, torch; from mmfast.resolvers.simple import Sum; o.weights(torch.eye(2), Sum())"
    run = python("-c", code)
    assert run.returncode == 0, run.stderr


@pytest.mark.parametrize("how", ["sys.modules['numpy'] = None", "sys.path = [p for p in sys.path if 'site-packages' not in p] + [SITE]"])
def test_a_missing_numpy_is_not_warned_of(how, tmp_path):
    """Neither on import nor in the first calls, whether the import is blocked or NumPy is not installed."""
    site = Path(torch.__file__).parent.parent
    for package in site.iterdir():
        if package.name != "numpy":
            (tmp_path / package.name).symlink_to(package)
    lines = [
        "import sys",
        f"SITE = {str(tmp_path)!r}",
        how,
        "import mmfast as mf, torch",
        "assert mf.resolve(torch.ones(2, 3), 'mgda').tolist() == [1.0, 1.0, 1.0]",
        "y = torch.ones(4, 3, requires_grad=True)",
        "sum(out.sum() for out in mf.ImpartialityBlock([torch.nn.Linear(3, 1)] * 2, 'upgrad')(y)).backward()",
        "try:\n    import numpy\nexcept ImportError:\n    print('without', mf.backends()['reference'])",
    ]
    run = python("-W", "always", "-c", "\n".join(lines))
    assert run.stdout.startswith("without") and "NumPy" not in run.stderr, run.stdout + run.stderr


def rule_classes(base=Rule):
    for module in pkgutil.iter_modules(resolvers.__path__):
        importlib.import_module(f"mmfast.resolvers.{module.name}")
    for rule in base.__subclasses__():
        if rule.__module__.startswith("mmfast."):
            yield rule
        yield from rule_classes(rule)


class TestHost:
    @pytest.fixture
    def host(self):
        return pytest.importorskip("mmfast._host", reason="MMFAST_HOST=1 was not set when mmfast was built", exc_type=ImportError)

    def test_every_rule_has_its_solver(self, host):
        ours = {
            rule.method: {"name": rule.__name__, "maps_rows": rule.rows is not Rule.rows, "smooths": rule.smooths}
            for rule in rule_classes()
            if hasattr(rule, "method")
        }
        assert ours == host.rules()

    @pytest.mark.parametrize("name", RULES)
    def test_solves_as_the_operator_does(self, host, name):
        """Same bits on arrays as on tensors, with and without a mask, state handed on by the caller."""
        if not library.available:
            pytest.skip(library.missing_reason)
        k = RULES[name].min_k + 3
        resolver = RULES[name].make(k)
        chain = resolver.chain()
        if chain is None:
            pytest.skip(f"{name} is not run by the compiled solver")
        G = torch.stack([gramian(k, seed=s) for s in range(2)])
        mask = torch.ones(k, dtype=torch.bool)
        mask[1] = False
        steps = [n for rule in chain for n in (rule.method, len(rule.params()))]
        params = [x for rule in chain for x in rule.params()]
        rng = next((copy.copy(rule.rng.tolist()) for rule in chain if rule.rng is not None), [0, 0])
        state = None
        for counter, rows in enumerate((None, mask, None)):
            w, state = host.solve(
                G.numpy(), steps, params, None if rows is None else rows.numpy(), state, seed=rng[0], counter=rng[1] + counter
            )
            assert torch.equal(torch.from_numpy(w), ops.weights(G, resolver, rows))

    def test_refuses_what_it_cannot_solve(self, host):
        G = torch.eye(3).numpy()
        for arguments, complaint in [
            ((G[:2], [0, 0], []), r"G must have shape \[\.\.\., K, K\]"),
            ((G, [0], []), "pairs"),
            ((G, [31, 0], []), "names rule 31"),
            ((G, [0, 1], []), "params must hold as many"),
            ((G, [0, 0], [], G[0, :2] > 0), "mask must have shape"),
            ((G, [0, 0], [], None, G), "state must have shape"),
        ]:
            with pytest.raises(ValueError, match=complaint):
                host.solve(*arguments)
        with pytest.raises(ValueError, match="isa is 'mmx'"):
            host.solve(G, [0, 0], [], isa="mmx")
        assert host.isa in host.isas()
