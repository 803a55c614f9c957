"""What the processes of a group do in test_group.py: `python group_ranks.py` starts them, each runs every case, and a line of JSON says how it went.

A case compares what its rank gets with one process that has the whole batch, which every rank computes for itself.
"""

import copy
import json
import os
import sys
import tempfile
import traceback
import warnings
from datetime import timedelta

import torch
import torch.distributed as dist
from rule_table import RULES
from torch import nn

import mmfast as mf

K, D = 5, 7
SIZES = (3, 5, 2, 4)  # samples of each rank
TIMEOUT = timedelta(seconds=60)
MADE = {name: row.make for name, row in RULES.items()}


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
        for norm in (False, True):
            rule, whole_rule = seeded(rank, make)
            for step in range(4):
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


def case_masks(rank, world):
    for per in ("batch", "batch_sum"):
        data = Shards(rank, world)
        mask = torch.rand(data.whole.shape[1], K, generator=torch.Generator().manual_seed(1)) < 0.6
        ours = through_fork(list(data.mine()), mf.UPGrad(), per=per, mask=mask[data.part], group=dist.group.WORLD)
        expected = through_fork(list(data.whole), mf.UPGrad(), per=per, mask=mask)[data.part]
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


def main(worlds):
    """Forks the ranks of each group, so that torch is imported once."""
    for world in worlds:
        with tempfile.TemporaryDirectory() as folder:
            children = []
            for rank in range(world):
                if not (child := os.fork()):
                    run_rank(rank, world, f"{folder}/store")
                    os._exit(0)
                children.append(child)
            for child in children:
                os.waitpid(child, 0)


if __name__ == "__main__":
    main([int(world) for world in sys.argv[1:]])
