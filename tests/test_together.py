"""Many models trained together against each by itself."""

import copy

import pytest
import torch

import mmfast as mf
from mmfast.models.likelihoods import Bernoulli, Categorical, Exponential, Gamma, Joint, LogNormal, Normal, Poisson
from mmfast.models.together import Together
from mmfast.models.vae import VAE

FEATURES = [Normal(), LogNormal(), Categorical(3), Poisson(), Bernoulli(), Normal()]
ROWS, BATCH = 200, 32


def models(rules, objective="elbo", samples=1, hidden=16):
    made = []
    for seed, rule in enumerate(rules):
        torch.manual_seed(seed)
        joint = Joint(FEATURES, torch.rand(len(FEATURES)) + 0.5)
        own = [] if rule is None else [copy.deepcopy(rule)]
        for part in (part for of in own for part in of.chain()):
            part.reset_parameters()  # draws its seed, which else depends on what else the process has drawn
        made.append(VAE(joint, hidden, 3, own or None, objective, samples))
    return made


def data(n):
    """x and seen [E, rows, K]"""
    g = torch.Generator().manual_seed(1)
    x = torch.randn(n, ROWS, len(FEATURES), generator=g)
    x[..., 1] = x[..., 1].exp()
    for column, classes in ((2, 3), (3, 5), (4, 2)):
        x[..., column] = torch.randint(classes, (n, ROWS), generator=g).float()
    return x, (torch.rand(n, ROWS, len(FEATURES), generator=g) > 0.1).float()


def alone(model, seed, x, seen, steps, lr):
    """The losses of a model that is trained by itself."""
    torch.manual_seed(seed)
    optimizer = torch.optim.Adam(model.parameters(), lr=lr, fused=True)
    losses = []
    while len(losses) < steps:
        for places in torch.randperm(ROWS)[: ROWS // BATCH * BATCH].view(-1, BATCH):
            optimizer.zero_grad()
            loss = model.loss(x[places], seen[places])
            loss.backward()
            optimizer.step()
            losses.append(loss.detach())
    return torch.stack(losses[:steps])


def train(together, x, seen, steps):
    losses = []
    while len(losses) < steps:
        for places in together.batches(ROWS, BATCH):
            which = torch.arange(len(x)).unsqueeze(1)
            losses.append(together.step(x[which, places], seen[which, places]))
    return torch.stack(losses[:steps], 1)


@pytest.mark.parametrize("held", [torch.nan, torch.inf, -1.0, 0.0, 1e9])
def test_a_missing_cell_has_no_influence(held):
    x, seen = data(2)
    losses = []
    for cells in (x, torch.where(seen > 0, x, held)):
        together = Together(models([mf.MGDA()] * 2), seeds=[0, 1])
        losses.append(train(together, cells, seen, 20))
    assert torch.equal(*losses) and losses[0].isfinite().all()
    x[0, 5, 1], seen[0, 5, 1] = -1.0, 1.0  # a value that is seen and that its likelihood does not take
    try:
        assert Together(models([None] * 2), seeds=[0, 1]).step(x, seen)[0].isnan()
    except RuntimeError as error:
        assert "feature 1 that its likelihood" in str(error)


def test_autocast_changes_nothing():
    x, seen = data(2)
    losses = []
    for on in (False, True):
        together = Together(models([mf.MGDA()] * 2), seeds=[0, 1])
        with torch.autocast("cpu", torch.bfloat16, enabled=on):
            losses.append(train(together, x, seen, 5))
    assert torch.equal(*losses)


@pytest.mark.parametrize("objective, samples", [("elbo", 1), ("iwae", 5)])
@pytest.mark.parametrize(
    "rules",
    [
        [None] * 3,
        [mf.MGDA()] * 3,
        [mf.GradNorm(alpha=0.0)] * 2 + [mf.Compose(mf.GradNorm(), mf.PCGrad(order="fixed"))] + [None, mf.IMTLG(), mf.UPGrad()],
        [mf.NSGD(every=3)] * 2,
        [mf.PCGrad()] * 2 + [mf.Random(), mf.Compose(mf.GradNorm(), mf.PCGrad(every=2))],
    ],
    ids=["none", "MGDA", "many", "state", "draws"],
)
def test_each_is_what_it_is_by_itself(rules, objective, samples):
    """100 steps: losses, parameters, running means and what rules keep, to 1e-5 of what they are. 30 of rules that draw: of 400 seeds of theirs some three in a
    hundred lead a hidden unit within rounding of its ReLU's bend, where each of the two goes its own way by up to 1e-3."""
    steps = 30 if any(isinstance(rule, mf.PCGrad) for rule in rules) else 100
    made = models(rules, objective, samples)
    single = copy.deepcopy(made)
    x, seen = data(len(rules))
    rates = [1e-3 * (1 + i) for i in range(len(rules))]
    together = Together(made, range(20, 20 + len(rules)), rates)
    losses = train(together, x, seen, steps)
    for e, model in enumerate(single):
        torch.testing.assert_close(losses[e], alone(model, 20 + e, x[e], seen[e], steps, rates[e]), rtol=1e-5, atol=1e-3)
        for (name, mine), right in zip(made[e].state_dict().items(), model.state_dict().values(), strict=True):
            if mine.is_floating_point():
                assert (mine - right).norm() <= 2e-5 * right.norm() + 1e-6, (name, e)


def test_what_cannot_be_trained_together_is_said():
    one, two = models([None, None])
    (dreg,), (wide,), (iwae,) = models([None], "dreg", 2), models([None], hidden=8), models([None], "iwae", 2)
    for arguments, message in (
        (([], []), "models is empty"),
        (([one, one], [0, 1]), "models holds a model twice"),
        (([one, two], [0]), "seeds has 1 numbers, expected one for each of 2 models"),
        (([one, two], [0, 1], [1e-3] * 3), "lr has 3 numbers, expected one or one for each of 2 models"),
        (([dreg], [0]), "objective 'dreg'"),
        (([one, wide], [0, 1]), r"models\[1\] is of another shape"),
        (([one, iwae], [0, 1]), r"models\[1\] is of another shape, objective"),
    ):
        with pytest.raises(ValueError, match=message):
            Together(*arguments)
    with pytest.raises(TypeError, match=r"models\[1\] is a Linear, expected a VAE of mmfast.models.vae"):
        Together([one, torch.nn.Linear(2, 2)], [0, 1])


def test_a_batch_of_another_shape_is_said():
    together, k = Together(models([None, None]), [0, 1]), len(models([None])[0].joint.sizes)
    good = torch.ones(2, 4, k)
    for x, seen, message in (
        (good[0], good, rf"x has shape \(4, {k}\), expected \(2, rows, {k}\)"),
        (good, good[:1], rf"seen has shape \(1, 4, {k}\), expected \(2, rows, {k}\)"),
        (good[..., 1:], good, rf"x has shape \(2, 4, {k - 1}\)"),
    ):
        with pytest.raises(ValueError, match=message):
            together.step(x, seen)
    for size in (0, 9):
        with pytest.raises(ValueError, match=f"batch is {size}, expected a whole number from 1 to 8, the number of rows"):
            together.batches(8, size)


@pytest.mark.parametrize("scale, w", [(1e-3, 10.0), (1e3, 20.0), (1e5, 9.0), (1e-9, 4.0), (0.5, 300.0), (1.0, 1.0)])
def test_powers_that_leave_the_range_of_float32_and_every_kind_are_scaled(scale, w):
    """A positive feature of w is x^w, which a narrow column takes beyond 1e38 or below 1e-20; the losses are those of single models all the same."""
    features = [LogNormal(), Gamma(), Exponential(), Normal(), Poisson()]
    made = []
    for seed in range(2):
        torch.manual_seed(seed)
        made.append(VAE(Joint(features, torch.tensor([w, 3.0, 0.25, 0.5, 7.0])), 8, 2, [mf.MGDA()]))
    single = copy.deepcopy(made)
    x = torch.rand(2, BATCH, len(features)) + 0.5
    x[..., 0] = scale * x[..., 0] ** (1 / w)
    x[..., 4] = x[..., 4].round()
    seen = (torch.rand_like(x) > 0.1).float()
    losses = Together(made, [3, 4]).step(x, seen)
    for e, model in enumerate(single):
        torch.manual_seed(3 + e)
        expected = model.loss(x[e], seen[e])
        assert expected.isfinite()
        torch.testing.assert_close(losses[e], expected.detach(), rtol=1e-5, atol=1e-3)


def test_models_in_double_precision_are_theirs_alone():
    ours, theirs = ([model.double() for model in models([mf.PCGrad(order="fixed"), None], "iwae", 3)] for _ in range(2))
    x, seen = (t.double() for t in data(2))
    found = train(Together(ours, [4, 5]), x, seen, 5)
    for e in range(2):
        torch.testing.assert_close(found[e], alone(theirs[e], 4 + e, x[e], seen[e], 5, 1e-3), rtol=1e-10, atol=0)


def frozen(made):
    made[1].decoder.requires_grad_(False)


def dropped(made):
    made[1].encoder[0].p = 0.0


def averaged(made):
    made[0].encoder[1].momentum = made[1].encoder[1].momentum = None


def halved(made):
    made[1].bfloat16()


@pytest.mark.parametrize(
    "change, message",
    [
        (frozen, r"models\[1\].decoder.body.0.weight has requires_grad=False, but Together trains all parameters"),
        (dropped, r"models\[1\] begins with dropout of 0.0 .*, expected dropout of 0.1"),
        (averaged, "models have a batch norm of momentum None"),
        (halved, r"models\[1\] is of torch.bfloat16 on cpu, expected float32 or float64 on the CPU, all models alike"),
    ],
)
def test_models_that_it_would_train_otherwise_are_refused(change, message):
    made = models([None, None])
    change(made)
    before = [p.data_ptr() for model in made for p in model.parameters()]
    with pytest.raises(ValueError, match=message):
        Together(made, [0, 1])
    assert before == [p.data_ptr() for model in made for p in model.parameters()]  # they are as they were


def test_scales_that_are_loaded_later_are_seen():
    made, (x, seen) = models([None, None]), data(2)
    together, other = Together(made, [0, 1]), models([None, None])[0].state_dict()
    made[1].load_state_dict(other)
    twin = models([None, None])
    assert not torch.equal(twin[1].joint.w, other["joint.w"])
    twin[1].load_state_dict(other)
    assert torch.equal(together.step(x, seen), Together(twin, [0, 1]).step(x, seen))


def assigned(model):
    model.load_state_dict({name: t.clone() for name, t in model.state_dict().items()}, assign=True)


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda model: model.mean.requires_grad_(False), r"models\[1\].mean.weight has requires_grad=False"),
        (assigned, r"models\[1\] got another tensor for encoder.1.weight, which is not trained here"),
        (lambda model: model.double(), r"models\[1\] got another tensor"),
    ],
)
def test_models_that_were_changed_later_are_refused(change, message):
    made, (x, seen) = models([None, mf.MGDA()]), data(2)
    together = Together(made, [0, 1])
    made[1].load_state_dict({name: t.clone() for name, t in made[1].state_dict().items()})  # into the same tensors
    together.step(x, seen)
    change(made[1])
    before = together.flat.clone()
    with pytest.raises(ValueError, match=message):
        together.step(x, seen)
    assert torch.equal(together.flat, before)


@pytest.mark.parametrize("scale", [0.7, 1.0, 2.0])
def test_a_value_that_a_likelihood_does_not_take_is_refused(scale):
    made, (x, seen) = models([None, None]), data(2)
    for model in made:
        model.joint.w[1] = scale  # the square of a negative number is one that a log-normal takes
    together, before = Together(made, [0, 1]), [p.clone() for model in made for p in model.parameters()]
    x[1, 3, 1] = -0.5
    seen[1, 3, 1] = 1
    with pytest.raises(
        RuntimeError, match=r"x of models\[1\] has a value in feature 1 that its likelihood, LogNormal, does not take, expected"
    ):
        together.step(x, seen)
    assert all(torch.equal(a, b) for a, b in zip(before, (p for model in made for p in model.parameters()), strict=True))
    seen[1, 3, 1] = 0
    assert together.step(x, seen).isfinite().all()
