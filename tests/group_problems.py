"""Cases of test_group.py: one problem, by each way into it. Each rank compares what it gets with one process that has the whole batch."""

import copy
import itertools
import pickle
import warnings

import torch
import torch.distributed as dist
from block_model import ByLength
from group_shards import D, K, Shards, close, raises, seeded, through_fork
from rule_table import RULES
from torch import nn

import mmfast as mf

MADE = {name: row.make for name, row in RULES.items()} | {
    "GradDrop": lambda k: mf.GradDrop(leak=0.1),
    "TrimmedMean": lambda k: mf.TrimmedMean(1),
    "own": lambda k: mf.Compose(ByLength(), mf.PCGrad()),
}


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
    for make in (lambda: mf.GradDrop(leak=[0.0, 0.2, 0.5, 0.1, 0.3]), lambda: mf.TrimmedMean(1)):
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


class Times(nn.Module):
    """A branch whose gradient is conj(factor)."""

    def __init__(self, factor):
        super().__init__()
        self.factor = factor

    def forward(self, y):
        return (y * self.factor).sum().real


def case_attached_to_a_complex_tensor(rank, world):
    """Doubles among them are as exact as real ones are."""
    for per in ("batch", "batch_sum"):
        data = Shards(rank, world, dtype=torch.complex128)
        found = []
        for grads, options in ((data.mine(), {"group": dist.group.WORLD}), (data.whole, {})):
            y = torch.zeros_like(grads[0]).requires_grad_()
            branches = [Times(g) for g in grads]
            with mf.attach(branches, mf.MGDA(), per=per, **options):
                sum(branch(y) for branch in branches).backward()
            found.append(torch.view_as_real(y.grad.resolve_conj()))
        close(found[0], found[1][data.part], data.whole.abs().flatten(1).norm(dim=1).max().item(), 1e-12)


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


def case_a_rank_without_samples(rank, world):
    for per, make in itertools.product(("batch", "batch_sum"), (mf.UPGrad, mf.GradDrop, lambda: mf.TrimmedMean(1))):
        data = Shards(rank, world)
        there = slice(data.sizes[0], None)  # the first rank's samples are left out
        rule, whole_rule = seeded(rank, lambda k, make=make: make())
        mine = data.mine() if rank else data.mine()[:, :0]
        ours = through_fork(list(mine), rule, per=per, group=dist.group.WORLD)
        expected = through_fork(list(data.whole[:, there]), whole_rule, per=per)
        if rank:
            part = slice(data.part.start - data.sizes[0], data.part.stop - data.sizes[0])
            close(ours, expected[part], data.whole.flatten(1).norm(dim=1).max().item())
        else:
            assert ours.shape == (0, D)


def case_lengths_where_the_sum_cancels(rank, world):
    """There the Gramian does not know the length of the plain sum: it is measured on the elements of all ranks."""
    for per in ("batch", "batch_sum"):
        data = Shards(rank, world)
        data.whole[1] = 1e-4 * data.whole[1] - data.whole[0]
        data.whole = data.whole[:2]
        ours = through_fork(list(data.mine()), mf.Constant([1.0, 2.0]), per=per, group=dist.group.WORLD)
        expected = through_fork(list(data.whole), mf.Constant([1.0, 2.0]), per=per)[data.part]
        assert expected.norm() < 1e-3 * data.mine()[0].norm()
        close(ours, expected, 0)


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
