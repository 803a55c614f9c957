"""Cases of test_group.py: training steps under DDP, FSDP2 and torch.compile, and mf.backward, against one process that has the whole batch."""

import copy
import warnings

import torch
import torch.distributed as dist
from group_shards import D, Shards, close, raises, seeded
from torch import nn

import mmfast as mf


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
    warnings.filterwarnings("ignore", "Guards may run slower")  # on Python 3.13.0
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
    from torch.distributed.fsdp import fully_shard

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
    for make, norm in ((mf.UPGrad, False), (lambda: mf.Compose(mf.GradVac(), mf.PCGrad()), True), (mf.GradDrop, False), (mf.MoCo, False)):
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
    named = dict(zip(("a", "b") if rank == 0 else ("b", "a"), losses, strict=True))  # each rank's first row another loss's
    options = {"params": given, "retain_graph": True, "group": dist.group.WORLD}
    raises(ValueError, "the ranks of the group were given other losses", lambda: mf.backward(named, mf.UPGrad(), **options))
    assert all(p.grad is None for p in given)


def case_sharded_parameters(rank, world):
    """What FSDP2 gathers is not what its optimizer sees: mf.backward says so, and nothing is written."""
    from torch.distributed.fsdp import fully_shard

    mesh = dist.device_mesh.init_device_mesh("cpu", (world,))
    for whole in (True, False):  # one group of parameters, or one for each layer
        net = nn.Sequential(nn.Linear(D, 4), nn.Tanh(), nn.Linear(4, 2))
        for layer in () if whole else (net[0], net[2]):
            fully_shard(layer, mesh=mesh)
        fully_shard(net, mesh=mesh)
        for params, low_memory in ((None, False), (None, True), (list(net.parameters()), False)):
            losses = list(net(Shards(rank, world).mine()[0]).square().sum(0))
            raises(
                RuntimeError,
                "are sharded",
                lambda losses=losses, options={"params": params, "low_memory": low_memory}: mf.backward(losses, mf.UPGrad(), **options),
            )
        assert all(p.grad is None for p in net.parameters())


def case_buckets_that_are_ready_early(rank, world):
    """DDP sends a bucket of unused parameters at once, before the block's all-reduce: in a group of its own the block meets the other ranks' blocks alone."""
    own = dist.new_group()

    class Uneven(nn.Module):
        """The first rank lacks one of the encoders."""

        def __init__(self, group=None):
            super().__init__()
            torch.manual_seed(3)
            self.shared, self.other = nn.Linear(D, D), nn.Linear(D, D)
            self.block = mf.ImpartialityBlock([nn.Linear(D, 1), nn.Linear(D, 2)], mf.GradVac(), group=group)

        def latent(self, x, rank):
            return self.shared(x) + (self.other(x) if rank else 0)

        def loss(self, a, b):
            return a.square().mean() - 3 * b.mean()

        def forward(self, x):
            return self.loss(*self.block(self.latent(x, rank)))

    net, alone = Uneven(own), Uneven()
    wrapped = nn.parallel.DistributedDataParallel(net, find_unused_parameters=True, bucket_cap_mb=1e-5)
    for step in range(3):
        data = Shards(rank, world, seed=step)
        wrapped.zero_grad(), alone.zero_grad()
        wrapped(data.whole[0, data.part]).backward()
        parts = data.whole[0].split(data.sizes)
        a, b = alone.block(torch.cat([alone.latent(x, r) for r, x in enumerate(parts)]))
        (sum(map(alone.loss, a.split(data.sizes), b.split(data.sizes))) / world).backward()
        for p, q in zip(net.parameters(), alone.parameters(), strict=True):
            close(p.grad, q.grad, max(q.grad.norm().item() for q in alone.parameters()))
