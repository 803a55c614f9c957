"""What the processes of a group do in test_group.py: `python group_ranks.py 2` starts two, each runs every case, and a line of JSON says how it went.

A case compares what its rank gets with one process that has the whole batch, which every rank computes for itself.
"""

import copy
import itertools
import json
import os
import pickle
import signal
import sys
import tempfile
import time
import traceback
import warnings
from datetime import timedelta

import torch
import torch.distributed as dist
from block_model import ByLength
from rule_table import RULES
from torch import nn
from torch.distributed.fsdp import fully_shard

import mmfast as mf

K, D = 5, 7
SIZES = (3, 5, 2, 4)  # samples of each rank
TIMEOUT = timedelta(seconds=60)
MADE = {name: row.make for name, row in RULES.items()} | {
    "GradDrop": lambda k: mf.GradDrop(leak=0.1),
    "TrimmedMean": lambda k: mf.TrimmedMean(1),
    "own": lambda k: mf.Compose(ByLength(), mf.PCGrad()),
}


class Shards:
    """A batch of K gradients that each rank has a part of, the same whole one on every rank."""

    def __init__(self, rank, world, seed=0, dtype=torch.float32, shape=(D,)):
        generator = torch.Generator().manual_seed(seed)
        self.sizes = SIZES[:world]
        self.whole = torch.randn(K, sum(self.sizes), *shape, generator=generator, dtype=torch.float64).to(dtype)
        self.part = slice(sum(self.sizes[:rank]), sum(self.sizes[: rank + 1]))

    def mine(self):
        return self.whole[:, self.part]


def seeded(rank, make):
    """A resolver that draws from a stream of its own on each rank, and one as the first rank has it."""
    torch.manual_seed(100)
    first = make(K)
    torch.manual_seed(100 + rank)
    return make(K), first


def through_fork(grads, rule, **kwargs):
    """The resolved gradient of K given ones, None for one that is missing."""
    y = torch.zeros_like(next(g for g in grads if g is not None)).requires_grad_()
    aliases = mf.fork(y, len(grads), rule, **kwargs)
    sum((a * g).sum().real for a, g in zip(aliases, grads, strict=True) if g is not None).backward()
    return y.grad


def close(ours, expected, scale, tolerance=1e-5):
    """Equal to rounding, relative to the length of the longest of the gradients or of the result."""
    size = max(scale, expected.double().norm().item(), 1e-30)
    error = (ours.double() - expected.double()).norm().item() / size
    assert error <= tolerance, f"differs by {error:.2e} of the gradients' size"


def case_every_rule(rank, world):
    """Four steps, so that states and draws count; lengths change from step to step."""
    for name, make in MADE.items():
        for norm in (False, True) if world == 2 else (True,):
            rule, whole_rule = seeded(rank, make)
            for step in range(4 if norm else 2):
                data = Shards(rank, world, seed=step)
                scale = data.whole.flatten(1).norm(dim=1).max().item()
                ours = through_fork(list((step + 1) * data.mine()), rule, preserve_norm=norm, group=dist.group.WORLD)
                expected = through_fork(list((step + 1) * data.whole), whole_rule, preserve_norm=norm)[data.part]
                try:
                    close(ours, expected, (step + 1) * scale)
                except AssertionError as error:
                    raise AssertionError(f"{name}, preserve_norm={norm}, step {step}: {error}") from None


def case_a_modality_missing_on_one_rank(rank, world):
    """And one on all: where a rank has no gradient, its samples' are zero."""
    for per in ("batch", "batch_sum"):
        rule, whole_rule = seeded(rank, lambda k: mf.Compose(mf.GradVac(), mf.PCGrad()))
        for step in range(3):
            data = Shards(rank, world, seed=step)
            data.whole[1, : data.sizes[0]] = 0
            mine = list(data.mine())
            mine[3] = None
            if rank == 0:
                mine[1] = None
            ours = through_fork(mine, rule, per=per, group=dist.group.WORLD)
            expected = through_fork([None if i == 3 else g for i, g in enumerate(data.whole)], whole_rule, per=per)[data.part]
            close(ours, expected, data.whole.flatten(1).norm(dim=1).max().item())


def case_elementwise_rules(rank, world):
    """Draws belong to places in the whole batch; a row that is zero on one rank is there on another; several tensors."""
    for make in (mf.GradDrop, lambda: mf.TrimmedMean(1)):
        rule, whole_rule = seeded(rank, lambda k, make=make: make())
        for step in range(3):
            data, other = Shards(rank, world, seed=step), Shards(rank, world, seed=10 + step, shape=())
            data.whole[1, : data.sizes[0]] = 0
            data.whole[2] = other.whole[2] = 0
            ours = of_two_tensors(data.mine(), other.mine(), rule, group=dist.group.WORLD)
            expected = of_two_tensors(data.whole, other.whole, whole_rule)
            for one, whole in zip(ours, expected, strict=True):
                close(one, whole[data.part], data.whole.flatten(1).norm(dim=1).max().item())


def of_two_tensors(first, second, rule, **kwargs):
    """The resolved gradients of two tensors; branch 3 has none at the second."""
    ys = [torch.zeros_like(x[0]).requires_grad_() for x in (first, second)]
    aliases = mf.fork(ys, K, rule, **kwargs)
    loss = sum((a * g).sum() for (a, _), g in zip(aliases, first, strict=True))
    (loss + sum((b * g).sum() for i, ((_, b), g) in enumerate(zip(aliases, second, strict=True)) if i != 2)).backward()
    return [y.grad for y in ys]


def case_masks(rank, world):
    for make, per in ((mf.UPGrad, "batch"), (mf.UPGrad, "batch_sum"), (mf.GradDrop, "batch"), (lambda: mf.TrimmedMean(1), "batch")):
        data = Shards(rank, world)
        mask = torch.rand(data.whole.shape[1], K, generator=torch.Generator().manual_seed(1)) < 0.6
        rule, whole_rule = seeded(rank, lambda k, make=make: make())
        ours = through_fork(list(data.mine()), rule, per=per, mask=mask[data.part], group=dist.group.WORLD)
        expected = through_fork(list(data.whole), whole_rule, per=per, mask=mask)[data.part]
        close(ours, expected, data.whole.flatten(1).norm(dim=1).max().item())


def case_batch_sum(rank, world):
    for name in ("PCGrad", "UPGrad", "MGDA", "GradNorm", "PCD", "NashMTL"):
        for norm in (False, True):
            rule, whole_rule = seeded(rank, MADE[name])
            for step in range(3):
                data = Shards(rank, world, seed=step, shape=(2, 3))
                ours = through_fork(list(data.mine()), rule, per="batch_sum", preserve_norm=norm, group=dist.group.WORLD)
                expected = through_fork(list(data.whole), whole_rule, per="batch_sum", preserve_norm=norm)[data.part]
                close(ours, expected, data.whole.flatten(1).norm(dim=1).max().item())


def case_samples_stay_on_their_rank(rank, world):
    data = Shards(rank, world)
    mine = data.mine() if rank else data.mine()[:, :1]  # no other rank waits for what this one does not call
    for _ in range(1 + rank):
        ours = through_fork(list(mine), mf.MGDA(), per="sample", group=dist.group.WORLD)
    assert torch.equal(ours, through_fork(list(mine), mf.MGDA(), per="sample"))


def case_kinds_of_gradients(rank, world):
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.bfloat16, 1e-2), (torch.complex64, 1e-5)):
        data = Shards(rank, world, dtype=dtype)
        ours = through_fork([g.conj() for g in data.mine()], mf.CAGrad(), group=dist.group.WORLD)
        expected = through_fork([g.conj() for g in data.whole], mf.CAGrad())[data.part]
        real = (lambda x: torch.view_as_real(x.resolve_conj())) if dtype.is_complex else (lambda x: x)
        close(real(ours), real(expected), data.whole.flatten(1).abs().double().norm(dim=1).max().item(), tolerance)


def case_several_tensors(rank, world):
    """One problem over two tensors, to one of which a rank sends nothing."""
    for per in ("batch", "batch_sum"):
        rule, whole_rule = seeded(rank, lambda k: mf.PCD())
        for step in range(2):
            data, other = Shards(rank, world, seed=step), Shards(rank, world, seed=10 + step, shape=(2, 2))
            other.whole[:, : other.sizes[0]] = 0
            other.whole[2] = 0

            def resolved(first, second, rule, skip, per=per, **kwargs):
                ys = [torch.zeros_like(x[0]).requires_grad_() for x in (first, second)]
                aliases = mf.fork(ys, K, rule, per=per, **kwargs)
                loss = sum((a * g).sum() for (a, _), g in zip(aliases, first, strict=True))
                if not skip:
                    loss = loss + sum((b * g).sum() for i, ((_, b), g) in enumerate(zip(aliases, second, strict=True)) if i != 2)
                loss.backward()
                return [torch.zeros_like(y) if y.grad is None else y.grad for y in ys]

            ours = resolved(data.mine(), other.mine(), rule, rank == 0, group=dist.group.WORLD)
            expected = resolved(data.whole, other.whole, whole_rule, False)
            for one, whole in zip(ours, expected, strict=True):
                close(one, whole[data.part], data.whole.flatten(1).norm(dim=1).max().item())


def case_a_block_and_its_record(rank, world):
    """Gramian and weights of the record are those of the whole batch, on every rank."""
    torch.manual_seed(3)
    branches = [nn.Linear(D, 2) for _ in range(3)]
    group = mf.ImpartialityBlock(copy.deepcopy(branches), mf.UPGrad(), local=[1.0, 2.0, 0.5], group=dist.group.WORLD)
    alone = mf.ImpartialityBlock(branches, mf.UPGrad(), local=[1.0, 2.0, 0.5])
    data = Shards(rank, world)
    whole = data.whole[0].requires_grad_()
    mine = data.whole[0, data.part].detach().requires_grad_()
    for block, y in ((group, mine), (alone, whole)):
        sum(((i + 1) * out - i).square().sum() for i, out in enumerate(block(y))).backward()
    close(mine.grad, whole.grad[data.part], whole.grad.norm().item())
    torch.testing.assert_close(group.stats().gram, alone.stats().gram, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(group.stats().weights, alone.stats().weights, rtol=1e-4, atol=1e-5)
    assert f"group of {world} ranks" in repr(group)
    again = copy.deepcopy(group)
    sum(out.sum() for out in again(mine)).backward()


class TwoInputs(nn.Module):
    """A branch that also takes a tensor of its own."""

    def __init__(self):
        super().__init__()
        self.one, self.other = nn.Linear(D, 2), nn.Linear(D, 2)

    def forward(self, y, own=None):
        return self.one(y) if own is None else self.one(y) + self.other(own)


def case_attach(rank, world):
    """The first rank does not call the second branch; a tensor that one branch alone takes on all ranks passes."""
    for per, own, norm in itertools.product(("batch", "batch_sum"), (False, True), (False, True)):
        torch.manual_seed(3)
        branches = [TwoInputs() for _ in range(3)]
        blocks = {}
        for name, options in (("group", {"group": dist.group.WORLD}), ("alone", {})):
            nets = copy.deepcopy(branches)
            torch.manual_seed(rank if name == "group" else 0)
            blocks[name] = nets, mf.attach(nets, mf.PCGrad(), per=per, preserve_norm=norm, local=[1.0, 2.0, 0.5], **options)
        for step in range(2):
            data = Shards(rank, world, seed=step)
            got = {}
            for name, part in (("group", data.part), ("alone", slice(None))):
                y, z = (data.whole[i, part].clone().requires_grad_() for i in range(2))
                nets, _ = blocks[name]
                loss = nets[0](y, z if own else None).square().sum() + 3 * nets[2](y).sin().sum()
                if name == "alone":
                    loss = loss - nets[1](y)[data.sizes[0] :].exp().sum()
                elif rank:
                    loss = loss - nets[1](y).exp().sum()
                loss.backward()
                got[name] = [y.grad, *([z.grad] if own else [])]
            for ours, expected in zip(got["group"], got["alone"], strict=True):
                close(ours, expected[data.part], got["alone"][0].norm().item())
            one, other = blocks["group"][1].stats(), blocks["alone"][1].stats()
            torch.testing.assert_close(one.gram, other.gram, rtol=1e-5, atol=1e-4)


def case_attach_to_several_tensors(rank, world):
    """All branches take both; one problem."""
    torch.manual_seed(3)
    branches = [TwoInputs() for _ in range(3)]
    got = {}
    data = Shards(rank, world)
    for part, options in ((data.part, {"group": dist.group.WORLD}), (slice(None), {})):
        y, z = (data.whole[i, part].clone().requires_grad_() for i in range(2))
        with mf.attach(branches, mf.UPGrad(), **options):
            sum(((i + 1) * net(y, own=z) - i).square().sum() for i, net in enumerate(branches)).backward()
        got[bool(options)] = y.grad, z.grad
    for ours, expected in zip(got[True], got[False], strict=True):
        close(ours, expected[data.part], got[False][0].norm().item())
    words = "an elementwise rule, which attach can't serve with group="
    raises(TypeError, words, lambda: mf.attach(branches, mf.GradDrop(), group=dist.group.WORLD))


def case_linear_heads(rank, world):
    for make, per, norm in itertools.product((mf.PCGrad, mf.UPGrad, ByLength), ("batch", "batch_sum"), (False, True)):
        kinds = (("group", make, {"group": dist.group.WORLD}), ("alone", make, {}))
        blocks = {}
        for name, rule, options in kinds:
            torch.manual_seed(rank if name == "group" else 0)
            resolver = rule()
            torch.manual_seed(3)
            blocks[name] = mf.LinearHeads(D, [2, 1, 3], resolver, per=per, preserve_norm=norm, local=[1.0, 2.0, 0.5], **options)
        for step in range(2):
            data = Shards(rank, world, seed=step, shape=(2, D))
            got = {}
            for name, y in (("group", data.whole[0, data.part]), ("alone", data.whole[0])):
                y = y.clone().requires_grad_()
                first, second, third = blocks[name](y)
                if name == "alone":  # the first rank has no second modality
                    second = second[data.sizes[0] :]
                loss = first.square().sum() + 3 * third.sin().sum()
                (loss if name == "group" and rank == 0 else loss - second.exp().sum()).backward()
                got[name] = y.grad
            close(got["group"], got["alone"][data.part], got["alone"].norm().item())
            one, other = blocks["group"].stats(), blocks["alone"].stats()
            torch.testing.assert_close(one.gram, other.gram, rtol=1e-5, atol=1e-4)
            torch.testing.assert_close(one.weights, other.weights, rtol=1e-4, atol=1e-5)


class Model(nn.Module):
    """Two blocks, one behind the other, and a rule that draws and keeps state in each."""

    def __init__(self, group=None):
        super().__init__()
        self.first = nn.Linear(D, D)
        self.inner = nn.ModuleList([nn.Linear(D, 4) for _ in range(3)])
        self.one = mf.ImpartialityBlock(self.inner, mf.Compose(mf.GradVac(), mf.PCGrad()), group=group)
        self.two = mf.LinearHeads(4, [2, 1, 3], mf.PCGrad(), group=group)

    def forward(self, x, last=True):
        a, b, c = self.one(torch.tanh(self.first(x)))
        first, second, third = self.two(torch.tanh(a))
        losses = [first.square().sum(1), second.sin().sum(1), b.exp().sum(1)]
        return [*losses, third.square().sum(1) + c.cos().sum(1)] if last else losses


class Training:
    """The same steps on the ranks and in one process: the mean over a rank's samples of all losses; the first rank lacks the last modality."""

    def __init__(self, rank, world, wrap=lambda model: model):
        self.rank, self.world = rank, world
        torch.manual_seed(3)
        self.alone = Model()
        torch.manual_seed(3)
        self.model = wrap(Model(dist.group.WORLD))
        self.steppers = [torch.optim.SGD(model.parameters(), 0.1) for model in (self.alone, self.model)]

    def loss(self, model, shards, rank, zero=False):
        """A rank's loss; with zero the modality that it lacks is in it, times zero."""
        data = Shards(rank, self.world, seed=shards)
        losses = [loss.mean() for loss in model(data.whole[0, data.part], last=zero or rank > 0)]
        return sum(losses) if rank or not zero else sum(losses[:-1]) + 0 * losses[-1]

    def mean_of_all(self, shards):
        """In one process: the mean over the ranks, whose samples go through the model together."""
        data, losses = Shards(0, self.world, seed=shards), self.alone(Shards(0, self.world, seed=shards).whole[0])
        starts = [sum(data.sizes[:rank]) for rank in range(self.world)]
        total = 0
        for rank, (start, size) in enumerate(zip(starts, data.sizes, strict=True)):
            total = total + sum(loss[start : start + size].mean() for loss in (losses if rank else losses[:-1]))
        return total / self.world

    def step(self):
        for stepper in self.steppers:
            stepper.step()
            stepper.zero_grad()

    def compare(self, of=lambda p: p.detach(), tolerance=1e-5):
        for (name, expected), p in zip(self.alone.named_parameters(), self.model.parameters(), strict=True):
            error = (of(p) - expected).norm() / max(expected.norm(), 1)
            assert error <= tolerance, f"{name} differs by {error:.2e}"


def case_distributed_data_parallel(rank, world):
    """Uneven parts, a modality that one rank lacks, blocks behind one another."""
    wrap = lambda model: nn.parallel.DistributedDataParallel(model, find_unused_parameters=True)
    training = Training(rank, world, wrap)
    for shards in range(3):
        training.loss(training.model, shards, rank).backward()
        training.mean_of_all(shards).backward()
        training.step()
        training.compare()


def case_gradients_accumulated_under_no_sync(rank, world):
    """Each backward pass is a problem of its own, over all ranks, whether or not DDP averages after it."""
    wrap = lambda model: nn.parallel.DistributedDataParallel(model, find_unused_parameters=True)
    training = Training(rank, world, wrap)
    for shards in range(4):
        if shards % 2:
            training.loss(training.model, shards, rank).backward()
        else:
            with training.model.no_sync():
                training.loss(training.model, shards, rank).backward()
        training.mean_of_all(shards).backward()
        if shards % 2:
            training.step()
            training.compare()


def case_compiled(rank, world):
    """The first rank's forward and backward pass are one graph, with the all-reduces in it; the others, for tracing takes seconds, run in eager mode."""
    warnings.filterwarnings("ignore", category=DeprecationWarning, module="torch")  # torch.compile itself uses what torch calls so
    warnings.filterwarnings("ignore", ".*should not be instantiated")
    rule, whole_rule = seeded(rank, lambda k: mf.GradVac())
    blocks = []
    for resolver, options in ((rule, {"group": dist.group.WORLD}), (whole_rule, {})):
        torch.manual_seed(3)
        heads = mf.LinearHeads(D, [2, 1], mf.MGDA(), **options)
        blocks.append(mf.ImpartialityBlock([nn.Sequential(nn.Linear(D, D), heads), nn.Linear(D, 2), nn.Linear(D, 1)], resolver, **options))

    def loss(block, y):
        (a, b), c, d = block(y)
        return a.square().sum() + b.exp().sum() + (c - 1).square().sum() - d.sin().sum()

    group, alone = blocks
    step = lambda y: loss(group, y)
    step = step if rank or world > 2 else torch.compile(step, fullgraph=True, backend="aot_eager")
    for seed in range(3):
        data = Shards(rank, world, seed=seed)
        mine, whole = data.whole[0, data.part].clone().requires_grad_(), data.whole[0].clone().requires_grad_()
        step(mine).backward()
        loss(alone, whole).backward()
        close(mine.grad, whole.grad[data.part], whole.grad.norm().item())
        torch.testing.assert_close(group.stats().gram, alone.stats().gram, rtol=1e-5, atol=1e-4)


def case_fully_sharded(rank, world):
    """FSDP2: every rank has a part of each parameter, and of the batch. FSDP itself asks for a gradient of every parameter on every rank."""

    def wrap(model):
        mesh = dist.device_mesh.init_device_mesh("cpu", (world,))
        for part in (*model.inner, model.two, model):
            fully_shard(part, mesh=mesh)
        return model

    training = Training(rank, world, wrap)
    for shards in range(2):
        training.loss(training.model, shards, rank, zero=True).backward()
        training.mean_of_all(shards).backward()
        training.step()
        training.compare(of=lambda p: p.detach().full_tensor())


def case_parameters(rank, world):
    """mf.backward: gradients of the mean of the ranks' losses, the first rank without the last loss; heads as DDP would leave them."""
    for make, norm in ((mf.UPGrad, False), (lambda: mf.Compose(mf.GradVac(), mf.PCGrad()), True), (mf.GradDrop, False)):
        torch.manual_seed(3)
        trunk, heads = nn.Sequential(nn.Linear(D, D), nn.Tanh()), nn.ModuleList([nn.Linear(D, n) for n in (1, 2, 1)])
        unused = nn.Parameter(torch.ones(2))
        alone, group = nn.ModuleList([trunk, heads]), copy.deepcopy(nn.ModuleList([trunk, heads]))
        rule, whole_rule = seeded(rank, lambda k, make=make: make())

        def losses(net, x, last=True):
            y = net[0](x)
            found = [((i + 1) * head(y) - i).square().mean() for i, head in enumerate(net[1])]
            return found if last else [*found[:-1], None]

        for step in range(3):
            data = Shards(rank, world, seed=step)
            of_rank = lambda r, step=step: Shards(r, world, seed=step).mine()[0]
            every = [losses(alone, of_rank(r), last=r > 0) for r in range(world)]
            means = [sum(x for x in column if x is not None) / world for column in zip(*every, strict=True)]
            expected = mf.backward(means, whole_rule, list(alone[0].parameters()), preserve_norm=norm)
            stats = mf.backward(
                losses(group, data.mine()[0], last=rank > 0),
                rule,
                list(group[0].parameters()),
                preserve_norm=norm,
                group=dist.group.WORLD,
                heads=[*group[1].parameters(), unused],
            )
            for p, q in zip(group.parameters(), alone.parameters(), strict=True):
                close(p.grad, q.grad, max(p.grad.norm().item() for p in alone.parameters()))
            assert unused.grad is None
            if expected is not None:
                torch.testing.assert_close(stats.weights, expected.weights, rtol=1e-3, atol=1e-4)


def case_parameters_that_differ(rank, world):
    """An error on every rank, before anything is written."""
    net = nn.Linear(D, 2)
    losses = [net(torch.ones(1, D)).sum(), net(torch.ones(1, D)).square().sum()]
    given = list(net.parameters())
    calls = (
        (
            given[:1] if rank == 0 else given,
            given[1:] if rank == 0 else [],
            "the ranks of the group were given other losses, params or heads",
        ),
        (given[::-1] if rank == 0 else given, [], "the ranks of the group were given other"),
        (given[:1], [], "1 are in neither"),
        (None, [], "params must name the shared parameters"),
    )
    for params, heads, words in calls:
        options = {"params": params, "heads": heads, "retain_graph": True, "group": dist.group.WORLD}
        raises(ValueError, words, lambda options=options: mf.backward(losses, mf.UPGrad(), **options))
    assert all(p.grad is None for p in given)


def raises(error, words, call):
    try:
        call()
    except error as raised:
        assert words in str(raised), str(raised)
    else:
        raise AssertionError(f"no error: {words}")


def case_what_is_said(rank, world):
    """Without a group of its own a block warns once where one is up; with one it is silent, and refuses what can't be right."""
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        grads = list(Shards(rank, world).mine())
        for per in ("batch", "batch_sum", "sample"):
            through_fork(grads, mf.MGDA(), per=per, group=dist.group.WORLD)
        assert not seen, str(seen[0].message)
        through_fork(grads, mf.MGDA())
        assert "give the block group=" in str(seen[0].message)
    heads, block = (
        mf.LinearHeads(D, [1, 2], mf.MGDA(), group=dist.group.WORLD),
        mf.ImpartialityBlock([nn.Linear(D, 1)] * 2, mf.MGDA(), group=dist.group.WORLD),
    )
    for module in (heads, block):
        loss = lambda y, module=module: sum(out.sum() for out in module(y))
        raises(
            RuntimeError,
            "with group= can't be inside a transformation of torch.func",
            lambda loss=loss: torch.func.grad(loss)(torch.ones(2, D)),
        )
        raises(TypeError, "can't be pickled", lambda module=module: pickle.dumps(module))
    other = dist.new_group([0])
    if rank:
        raises(
            (TypeError, ValueError),
            "expected a torch.distributed.ProcessGroup that this process is in",
            lambda: mf.fork(torch.ones(2), 2, mf.MGDA(), group=other),
        )
    else:
        mf.fork(torch.ones(2), 2, mf.MGDA(), group=other)


def case_ranks_that_were_reset_or_restored_apart_agree_again(rank, world):
    rule, whole_rule = seeded(rank, lambda k: mf.Compose(mf.GradVac(), mf.PCGrad()))
    for step in range(6):
        data = Shards(rank, world, seed=step)
        if step == 2 and rank == 1:
            rule.reset()
        if step == 3 and rank == 1:
            for part in rule.parts:
                part.reset_parameters()
        if step == 4:  # the first rank's checkpoint alone, as where it is sent around
            saved = rule.state_dict() if rank == 0 else None
        if step == 5 and rank == 0:
            rule.load_state_dict(saved)
        ours = through_fork(list(data.mine()), rule, group=dist.group.WORLD)
        expected = through_fork(list(data.whole), whole_rule)[data.part]
        close(ours, expected, data.whole.flatten(1).norm(dim=1).max().item())
    for one, whole in zip(rule.parts[0].buffers(), whole_rule.parts[0].buffers(), strict=True):  # a chain draws from its first stream
        torch.testing.assert_close(one, whole, rtol=1e-5, atol=1e-7)


def case_a_rank_that_sends_nothing(rank, world):
    """Its aliases take part in the loss, with gradients of zero or none at all."""

    class Nothing(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.sum()

        @staticmethod
        def backward(ctx, g):
            return None

    for zero in (lambda a: 0 * a.sum(), Nothing.apply):
        data = Shards(rank, world)
        data.whole[:, : data.sizes[0]] = 0
        y = torch.zeros(data.sizes[rank], D, requires_grad=True)
        aliases = mf.fork(y, K, mf.UPGrad(), group=dist.group.WORLD)
        if rank == 0:
            sum(zero(a) for a in aliases).backward()
        else:
            sum((a * g).sum() for a, g in zip(aliases, data.mine(), strict=True)).backward()
        close(y.grad, through_fork(list(data.whole), mf.UPGrad())[data.part], data.whole.flatten(1).norm(dim=1).max().item())


CASES = {name.removeprefix("case_"): case for name, case in globals().items() if name.startswith("case_")}


def run_rank(rank, world, store):
    torch.set_num_threads(1)
    warnings.simplefilter("error")
    warnings.filterwarnings("ignore", "a process group of .* is up")  # said of the one process that each rank compares with
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world, timeout=TIMEOUT)
    chosen = os.environ.get("GROUP_CASES", "").split() or CASES
    for name in chosen:
        torch.manual_seed(0)
        error = None
        try:
            CASES[name](rank, world)
        except BaseException:  # noqa: BLE001 what went wrong is the other process's to tell
            error = traceback.format_exc()
        os.write(1, (json.dumps({"world": world, "case": name, "rank": rank, "error": error}) + "\n").encode())
        if error:
            os._exit(1)  # the others hear it: their connection is closed
    dist.destroy_process_group()


def run_lost(rank, how, store):
    """The second rank is killed, or gets stuck, after one step; the first says what becomes of its own next one, and when."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2, timeout=timedelta(seconds=3))
    through_fork(list(Shards(rank, 2).mine()), mf.MGDA(), group=dist.group.WORLD)
    if rank:
        os.kill(os.getpid(), signal.SIGKILL if how == "killed" else signal.SIGSTOP)
    start, error = time.monotonic(), None
    try:
        through_fork(list(Shards(rank, 2).mine()), mf.MGDA(), group=dist.group.WORLD)
    except RuntimeError as raised:
        error = str(raised)
    os.write(1, (json.dumps({"how": how, "seconds": time.monotonic() - start, "error": error}) + "\n").encode())


def forked(ranks, call):
    """Processes that call(rank)."""
    children = []
    for rank in range(ranks):
        if not (child := os.fork()):
            try:
                call(rank)
            finally:
                os._exit(0)
        children.append(child)
    return children


def main(what):
    """Forks the ranks, so that torch is imported once."""
    with tempfile.TemporaryDirectory() as folder:
        if what in ("killed", "stuck"):
            first, second = forked(2, lambda rank: run_lost(rank, what, f"{folder}/store"))
            os.waitpid(first, 0)
            os.kill(second, signal.SIGKILL)
            os.waitpid(second, 0)
            return
        world = int(what)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.compile(lambda x: x + 1, backend="aot_eager")(torch.ones(1))  # what it imports, the ranks need not
        for child in forked(world, lambda rank: run_rank(rank, world, f"{folder}/store")):
            os.waitpid(child, 0)


if __name__ == "__main__":
    for what in sys.argv[1:]:
        main(what)
