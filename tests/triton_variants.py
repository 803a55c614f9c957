"""What a GPU would compile of the Triton kernels, found without one: python tests/triton_variants.py TARGET [SIZE ...] prints a line of JSON for each kernel, or solver.

Launches are recorded instead of run; the compiler's own binder then says what it would specialise on for the target, and compiles that.
"""

import json
import os
import re
import subprocess
import sys
import tempfile
from itertools import product
from pathlib import Path

import torch
import triton
from conftest import LONG
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.compiler.compiler import make_backend
from triton.runtime.jit import create_function_from_signature

import mmfast as mf
from mmfast import contract
from mmfast.backends.triton import combine, elementwise, gram, likelihoods, rows, solve
from mmfast.backends.triton import lengths as measures

TARGETS = {
    "cuda:80": GPUTarget("cuda", 80, 32),
    "cuda:90": GPUTarget("cuda", 90, 32),
    "cuda:100": GPUTarget("cuda", 100, 32),
    "hip:gfx942": GPUTarget("hip", "gfx942", 64),
}


class Recorder:
    """Stands in for the launch of every kernel."""

    def __init__(self, target):
        self.backend, self.target, self.found = make_backend(target), target, {}
        triton.JITFunction.run = lambda kernel, *args, grid, warmup, **kwargs: self.launch(kernel, args, kwargs)
        rows._threads_of_a_warp = lambda device: target.warp_size

    def launch(self, kernel, args, kwargs):
        binder = create_function_from_signature(kernel.signature, kernel.params, self.backend)
        bound, specialization, options = binder(*args, **kwargs)
        key = (kernel.__name__, str(specialization), str(options))
        if key not in self.found:
            options, signature, constants, attributes = kernel._pack_args(self.backend, kwargs, bound, specialization, options)
            self.found[key] = (ASTSource(kernel, signature, constants, attributes), options.__dict__)

    def compile(self, title):
        for (name, *_), (source, options) in self.found.items():
            line = {"kernel": f"{name} {title}", **figures(triton.compile(source, target=self.target, options=options), options)}
            print(json.dumps(line), flush=True)
        self.found.clear()


def figures(compiled, options):
    """Registers, bytes of spills and of shared memory, and the widest load, by what the assembler says."""
    if "ptx" not in compiled.asm:
        text = compiled.asm["amdgcn"]
        registers, spilled = (int(re.search(rf"\.{name}: +(\d+)", text)[1]) for name in ("vgpr_count", "vgpr_spill_count"))
        widest = 16 if "load_dwordx4" in text else 0
    else:
        text = compiled.asm["ptx"]
        spilled, registers = ptxas(text, options)
        widest = 16 if re.search(r"ld\.global\.(v4\.b32|v2\.b64)|cp\.async\.cg", text) else 0
    return {"registers": registers, "spills": spilled, "shared": compiled.metadata.shared, "widest_load": widest}


def ptxas(text, options):
    """(bytes of spills, registers) of a program in PTX."""
    from triton.backends.nvidia.compiler import get_ptxas

    arch = re.search(r"\.target (\w+)", text)[1]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "kernel.ptx")
        path.write_text(text)
        flags = [] if options["enable_fp_fusion"] else ["--fmad=false"]
        if tuple(map(int, triton.__version__.split(".")[:2])) >= (3, 9):
            flags.append("--regAllocOptLevel=2")  # as the compiler itself has it
        command = [get_ptxas(int(re.search(r"\d+", arch)[0])).path, "-v", *flags, f"--gpu-name={arch}", str(path), "-o", os.devnull]
        said = subprocess.run(command, check=True, capture_output=True, text=True).stderr
    stores, loads = re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", said).groups()
    return int(stores) + int(loads), int(re.search(r"Used (\d+) registers", said)[1])


def gradients(k, n, dtype, batch=1):
    return rows.rows_of([torch.zeros(batch, n, dtype=dtype) for _ in range(k)])


# those that are compiled with what keeps the norm, too
NORMED = [(8, torch.float32), (8, torch.bfloat16), (4, torch.float32), (32, torch.float64), (64, torch.float32)]


def with_norm(g, mask, per):
    """What follows the solver where the norm is to be preserved."""
    G, both = torch.zeros(g.k, g.k, dtype=torch.float64), torch.zeros(2, g.k, dtype=torch.float64)
    combine.combine_with_norm(g, mask, both[0], False, measures.measure_by_gramian(g, mask, G, both, contract.PER[per], 1e-7))


def every_kernel(recorder, all_sizes):
    """The kernels of the smallest and largest rows that each form takes."""
    few = [(3, torch.float32), (8, torch.float32), (8, torch.bfloat16)]
    few += [
        (1, torch.float32),
        (2, torch.bfloat16),
        (4, torch.float32),
        (8, torch.float64),
        (16, torch.float32),
        (32, torch.float64),
    ] * all_sizes
    few += [(64, torch.float32), (64, torch.bfloat16), (64, torch.float64)] * all_sizes
    for k, dtype in few:
        g = gradients(k, 8192, dtype)
        name = f"K={k} {str(dtype).removeprefix('torch.')}"
        w = torch.zeros(k, dtype=torch.float64)
        gram.gram(g, None, False)
        combine.combine(g, None, w, False, True)
        if (k, dtype) in NORMED:
            with_norm(g, None, "batch")
        recorder.compile(name)
    for k in [3, 8] * all_sizes:
        gram.gram(rows.rows_of([torch.zeros(1, 8193)[:, 1:] for _ in range(k)]), None, False)
        combine.combine(
            rows.rows_of([torch.zeros(1, 8193)[:, 1:] for _ in range(k)]), None, torch.zeros(k, dtype=torch.float64), False, False
        )
        recorder.compile(f"K={k} float32 unaligned")
    g, w = gradients(3, 8192, torch.float32), torch.zeros(3, dtype=torch.float64)
    measures.lengths(g, None, w, contract.PER["batch"])
    measures.measure(g, None, w, contract.PER["batch"], torch.zeros(3, dtype=torch.float64))
    recorder.compile("K=3 float32")
    for k, dtype in [(3, torch.float32)] + [(8, torch.float32), (64, torch.bfloat16)] * all_sizes:
        g = gradients(k, 1000, dtype, 4)
        name = f"K={k} {str(dtype).removeprefix('torch.')} masked"
        mask = torch.zeros(4, k, dtype=torch.bool)
        gram.gram(g, mask, False)
        gram.gram(g, mask, True)
        gram.batch_sums(g, mask)
        combine.combine(g, mask, torch.zeros(k, dtype=torch.float64), False, True)
        with_norm(g, mask, "batch_sum")
        elementwise.graddrop(g, mask, torch.zeros(1, dtype=torch.float64), torch.zeros(2, dtype=torch.int64))
        elementwise.trimmed_mean(g, mask, 1)
        recorder.compile(name)
    for dtype in [torch.float32] + [torch.float64] * all_sizes:
        raw, x, features = torch.zeros(300, 2, dtype=dtype), torch.zeros(300, 1, dtype=dtype), torch.tensor([[0, 2]])
        out, slopes = likelihoods.log_prob(raw, x, x > 0, features, torch.ones(1), True)
        likelihoods.log_prob_backward(out, slopes, features)
        recorder.compile(str(dtype).removeprefix("torch."))


def every_solver(recorder, sizes):
    """Every rule as a block asks for it (make test: one in three), and with what else it can be given, for `sizes` rows."""
    for k in sizes:
        pref = [1.0] * k
        plain = [
            mf.Sum(),
            mf.Mean(),
            mf.Constant(pref),
            mf.Random(),
            mf.PCGrad(),
            mf.PCGrad(order="fixed"),
            mf.MGDA(),
            mf.MGDA("l2"),
            mf.MGDA("l2", cap=0.1),
            mf.CAGrad(),
            mf.UPGrad(),
        ]
        plain += [mf.DualProj(), mf.NashMTL(), mf.FairGrad(), mf.FairGrad(0.1), mf.IMTLG(), mf.AlignedMTL(), mf.ConFIG()]
        plain = plain if LONG else plain[1::3]
        given = [mf.UPGrad(pref), mf.DualProj(pref), mf.AlignedMTL(pref=pref), mf.ConFIG(pref)]
        for rule, mask in [(rule, None) for rule in plain] + [
            (rule, torch.ones(2, k, dtype=torch.bool)) for rule in [mf.Mean(), *given] if k == sizes[-1]
        ]:
            G = torch.zeros(2, k, k, dtype=torch.float64)
            assert solve.solve_twice(G, mask, [rule], [None], rule.rng, 1e-7) is not None
            if mask is not None:  # and as `mf.weights` asks for it
                solve.solve(G, mask, [rule], [None], rule.rng, True, 1e-7)
            recorder.compile(f"{type(rule).__name__} K={k}" + " masked" * (mask is not None))


def alignments(recorder):
    """How many kernels three rows compile over all alignments, lengths and masks of theirs."""
    pool = torch.zeros(3, 9000)
    for first, second, third, n in product(range(5), range(5), range(5), (1040, 4097, 8192)):
        g = rows.rows_of([pool[0, first : first + n], pool[1, second : second + n], pool[2, third : third + n]])
        gram.gram(g, None, False)
        w = torch.zeros(4, dtype=torch.float64)[n % 2 :][:3]
        combine.combine(g, None, w, False, True)
        with_norm(g, None, "batch")
        solve.solve(
            torch.zeros(10 + n % 2, dtype=torch.float64)[n % 2 :][:9].view(3, 3),
            None,
            [mf.MGDA(normalize="none")],
            [None],
            None,
            True,
            1e-7 * n,
        )
    missing = rows.rows_of([pool[0], pool[1]], (1,))
    gram.gram(missing, None, False)
    counts = {}
    for name, *_ in recorder.found:
        counts[name] = counts.get(name, 0) + 1
    print(json.dumps(counts))


if __name__ == "__main__":
    target, solvers = sys.argv[1], sys.argv[2:]
    if solvers:
        every_solver(Recorder(TARGETS[target]), [int(size) for size in solvers])
    elif target == "alignments":
        alignments(Recorder(TARGETS["cuda:90"]))
        alignments(Recorder(TARGETS["hip:gfx942"]))
    else:
        every_kernel(Recorder(TARGETS[target]), LONG and target in ("cuda:90", "hip:gfx942"))
