"""The sections that time training steps, and what models are made of; bench.py has those of the operators."""

from benchmarks import attached, collapse, compiled, likelihoods, monitored, multimodal, parameters, tabular, together
from benchmarks.case import Run, compare, line
from benchmarks.machine import data_in
from benchmarks.providers import ELEMENTWISE, RULES, TWELVE, Unavailable, gate
from benchmarks.rows import Row
from benchmarks.targets import MONITOR
from benchmarks.timing import Call


def heads(run: Run) -> None:
    """Training steps of a tabular VAE whose heads are linear; K as in the paper's data sets, N = S, the samples of z."""
    for k in [13] if run.quick else [13, 24, 50]:
        for samples in [1] if run.quick else [1, 20]:
            for name in [n for n in run.rules if n not in ELEMENTWISE]:
                error, right = tabular.gate(k, RULES[name])
                calls = tabular.steps(k, samples, RULES[name], name)
                rows = {p: Row("heads", name, k, samples, p, data_in=data_in(samples * 128 * 50 * 4)) for p in calls}
                compare(run, rows, calls, right, error)
                print(line(list(rows.values())), flush=True)


def parameter_lists(run: Run) -> None:
    """Lists of tensors, one problem: the parameters of a ResNet-18, against TorchJD in both of its ways."""
    data = parameters.Lists(list(parameters.resnet18())[: 20 if run.quick else None])
    for name in [n for n in run.rules if n not in ELEMENTWISE]:
        rows = {p: Row("parameters", name, data.k, data.n, p, data_in=data_in(data.k * data.n * 4)) for p in parameters.PROVIDERS}
        calls: dict[str, Call] = {}
        for p, provider in parameters.PROVIDERS.items():
            try:
                calls[p] = provider(name, data)
            except Unavailable as reason:
                rows[p].verdict = str(reason)
        error, right = gate(name, data, data.resolve)
        timings = compare(run, rows, calls, right, error, 4)
        if right:
            rows["ours"].gbps = (2 * data.k + 1) * data.n * 4 / timings["ours"].median / 1e3
        print(line(list(rows.values())), flush=True)


def attach(run: Run) -> None:
    """A training step with `attach`, with the block built in and without one: a usual size, and small ones, where every microsecond of the host shows."""
    for width, batch in [(512, 256)] if run.quick else [(512, 256), (64, 256), (16, 32)]:
        calls, error, right = attached.steps(width, batch)
        rows = {
            p: Row("attach", "UPGrad", attached.HEADS, batch * width, p, data_in=data_in(attached.HEADS * batch * width * 4)) for p in calls
        }
        compare(run, rows, calls, right, error, 12)
        print(line(list(rows.values())), flush=True)


def monitor(run: Run) -> None:
    """What a Monitor adds to a training step: its thread's CPU time beside the step's."""
    for make in monitored.CASES[:1] if run.quick else monitored.CASES:
        case = make()
        timings, error, right = monitored.times(case, 2 if run.quick else 6)
        rows = {p: Row("monitor", "UPGrad", case.k, case.n, p) for p in ("none", "monitor")}
        rows["monitor"].error = error
        if right:
            for p, row in rows.items():
                row.timed(timings[p])
            share = 100 * timings["monitor"].median / timings["none"].median
            rows["monitor"].verdict = MONITOR.verdict(share)
        else:
            rows["monitor"].verdict = "wrong"
        run.rows += rows.values()
        print(line(list(rows.values())), f"({share:.2f} % of the step)" if right else "", flush=True)


def log_probs(run: Run) -> None:
    """Likelihoods and their gradients, the compiled operator against plain torch."""
    for name, rows_of_x, samples in likelihoods.CASES[: 3 if run.quick else None]:
        case = likelihoods.Case(name, rows_of_x, samples)
        error, right = case.gate()
        calls = {p: case.call(p) for p in ("ours", "torch", "none")}
        rows = {
            p: Row("likelihoods", name, len(case.joint.sizes), rows_of_x * samples, p, data_in=data_in(case.raw.numel() * 4)) for p in calls
        }
        compare(run, rows, calls, right, error, 4)
        print(line(list(rows.values())), flush=True)


def many_models(run: Run) -> None:
    """A training step of several models together against one of a single model."""
    for objective, samples, count in together.CASES[: 2 if run.quick else None]:
        calls, error, right = together.steps(objective, samples, count)
        rows = {p: Row("together", objective, count, samples, p) for p in calls}
        compare(run, rows, calls, right, error, 8)
        print(line(list(rows.values())), flush=True)


def gradient_outer_products(run: Run) -> None:
    """Agop against one backward pass: one output, and ten by a random probe."""
    for place, outputs, probes in collapse.CASES[: 2 if run.quick else None]:
        case = collapse.Case(place, outputs, probes)
        error, right = case.gate()
        calls = case.calls()
        rows = {p: Row("collapse", place, outputs, collapse.SAMPLES, p, data_in=data_in(case.x.nbytes)) for p in calls}
        compare(run, rows, calls, right, error, 24)
        print(line(list(rows.values())), flush=True)


def multimodal_steps(run: Run) -> None:
    """A training step of a multimodal VAE with blocks against one without, and what either has alive at once."""
    for mixture in multimodal.CASES[: 1 if run.quick else None]:
        calls, missing, error, right = multimodal.steps(mixture)
        rows = {p: Row("multimodal", mixture, 3, multimodal.SAMPLES * multimodal.BATCH, p) for p in [*calls, *missing]}
        for p, reason in missing.items():
            rows[p].verdict = reason
        if right:
            for p, call in calls.items():
                rows[p].peak_mb = multimodal.peak(call)
        compare(run, rows, calls, right, error, 40)
        print(line(list(rows.values())), flush=True)


def compile_step(run: Run) -> None:
    """The training step of `heads` under torch.compile, against itself in eager mode; one rule unless others are asked for."""
    if run.quick:
        return  # compiling alone takes longer than all the rest
    k = 13
    for section, (make, plain) in compiled.HEADS.items():
        for samples in [1, 20]:
            for name in [n for n in run.rules if n not in ELEMENTWISE] if len(run.rules) < len(TWELVE) else ["MGDA"]:
                calls, error, right = compiled.steps(k, samples, make(k, RULES[name](k)), plain(k))
                rows = {p: Row(section, name, k, samples, p, data_in=data_in(samples * 128 * 50 * 4)) for p in calls}
                compare(run, rows, calls, right, error, 4)
                print(line(list(rows.values())), flush=True)
