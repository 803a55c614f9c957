"""Gradient modulation: each formula against plain loops in float64, and its laws."""

import itertools
import math

import pytest
import torch
from modulation_models import KINDS, C, N, batch
from torch import nn
from torch.nn import functional as F

import mmfast as mf


def probability(row, label):
    largest = max(row)
    return math.exp(row[label] - largest) / sum(math.exp(x - largest) for x in row)


def probabilities(logits, labels):
    return [[probability(row, label) for row, label in zip(x.double().tolist(), labels.tolist(), strict=True)] for x in logits]


class OGMOracle:
    """As the paper has it, with the weakest other modality in place of the other one."""

    def __call__(self, logits, labels):
        mass = [sum(p) for p in probabilities(logits, labels)]
        beta = []
        for i, own in enumerate(mass):
            rho = own / min(other for j, other in enumerate(mass) if j != i)
            beta.append(1 - math.tanh(0.4 * max(rho, 0)) if rho > 1 else 1.0)
        return beta


class AGMOracle:
    def __init__(self):
        self.scores = []

    def ahead(self, scores):
        return [math.exp(sum(s for j, s in enumerate(scores) if j != i) / (len(scores) - 1) - own) for i, own in enumerate(scores)]

    def __call__(self, logits, labels):
        now = [sum(-math.log(max(p, 1e-8)) for p in row) / len(row) for row in probabilities(logits, labels)]
        usual = [sum(column) / len(column) for column in zip(*self.scores, strict=True)] if self.scores else [0.0] * len(now)
        self.scores.append(now)
        return [math.exp(0.7 * min(tau - r, 7)) for tau, r in zip(self.ahead(usual), self.ahead(now), strict=True)]


class CGGMOracle:
    before = None

    def __call__(self, logits, labels):
        now = [sum(row.index(max(row)) == label for row, label in zip(x.tolist(), labels.tolist(), strict=True)) / len(x) for x in logits]
        gains = [max(a - b, 0.0) for a, b in zip(now, self.before or [0.0] * len(now), strict=True)]
        self.before, k = now, len(now)
        return [k / (k - 1) * (sum(gains) - gain) / sum(gains) if sum(gains) else 1.0 for gain in gains]


ORACLES = {"OGM": OGMOracle, "AGM": AGMOracle, "CGGM": CGGMOracle}


@pytest.mark.parametrize("k", [2, 3, 5])
@pytest.mark.parametrize("kind", KINDS)
def test_the_formula_over_steps(kind, k):
    scale, oracle, uneven = KINDS[kind](k), ORACLES[kind](), 0
    for seed in range(6):
        logits, labels = batch(k, seed)
        scale.update(logits, labels)
        torch.testing.assert_close(scale.beta, torch.tensor(oracle(logits, labels), dtype=torch.float64), rtol=1e-12, atol=1e-14)
        uneven += scale.beta.min() < scale.beta.max()
    assert uneven >= 4


def test_ogm_of_two_modalities_is_the_papers():
    """One ratio and its inverse; only the modality ahead is held back."""
    for seed in range(8):
        (a, v), labels = batch(2, seed)
        s_a, s_v = (x.double().softmax(1).gather(1, labels[:, None]).sum() for x in (a, v))
        ratio_v = s_v / s_a
        k_a, k_v = (1.0, 1 - torch.tanh(0.4 * ratio_v)) if ratio_v > 1 else (1 - torch.tanh(0.4 / ratio_v), 1.0)
        ogm = mf.OGM(alpha=0.4)
        ogm.update([a, v], labels)
        torch.testing.assert_close(ogm.beta, torch.tensor([k_a, k_v], dtype=torch.float64), rtol=1e-12, atol=0.0)


def test_ogm_far_ahead():
    """Where 1 - tanh would cancel it keeps its digits; where nothing is left the gradient is zero, and what is not a number stays so."""
    labels = torch.zeros(1, dtype=torch.int64)
    beta = []
    for behind in (-3.0, -1e4, math.nan):
        ogm = mf.OGM(alpha=1.0)
        ogm.update([torch.tensor([[0.0, -1e4]]), torch.tensor([[behind, 0.0]])], labels)
        beta.append(ogm.beta)
    rho = 1 + math.exp(3.0)
    assert beta[0][0].item() == pytest.approx(2 / (1 + math.exp(2 * rho)), rel=1e-12) and beta[0][1] == 1
    assert beta[1].tolist() == [0.0, 1.0]
    assert beta[2].isnan().all()


def test_agm_of_two_modalities_is_the_papers():
    """exp of one loss less the other; the mean over the steps before, which the step itself is not part of."""
    agm, sums, steps = mf.AGM(alpha=0.7), torch.zeros(2, dtype=torch.float64), 0
    for seed in range(5):
        logits, labels = batch(2, seed)
        s_a, s_v = (F.cross_entropy(x.double(), labels) for x in logits)
        usual = sums / max(steps, 1)
        tau = torch.stack([usual[1] - usual[0], usual[0] - usual[1]]).exp()
        expected = (0.7 * (tau - torch.stack([s_v - s_a, s_a - s_v]).exp())).exp()
        agm.update(logits, labels)
        torch.testing.assert_close(agm.beta, expected, rtol=1e-12, atol=0.0)
        sums, steps = sums + torch.stack([s_a, s_v]), steps + 1


def test_agm_at_its_bounds():
    """A modality that was sure and now is not: no more than exp(7 alpha); a step that is not finite passes and leaves no trace."""
    right, wrong, labels = torch.tensor([[0.0, -1e4]]), torch.tensor([[-1e4, 0.0]]), torch.zeros(1, dtype=torch.int64)
    agm = mf.AGM(alpha=0.5)
    agm.update([right, wrong], labels)
    assert agm.mean.tolist() == pytest.approx([0.0, -math.log(1e-8)])
    kept = [agm.mean.clone(), agm.steps.clone()]
    agm.update([right * math.nan, wrong], labels)
    assert agm.beta.isnan().all() and torch.equal(agm.mean, kept[0]) and torch.equal(agm.steps, kept[1])
    agm.update([wrong, right], labels)
    assert agm.beta.tolist() == pytest.approx([math.exp(3.5), 0.0])


def test_shapley_values_of_logits():
    """By the average over all orders in which modalities may come; they add up, and where a linear layer fuses they are its parts."""
    k, g = 3, torch.Generator().manual_seed(0)
    features, weight, bias = torch.randn(k, 5, 4, generator=g), torch.randn(C, 4 * k, generator=g), torch.randn(C, generator=g)

    def linear(there):
        return torch.cat([x * present for x, present in zip(features, there, strict=True)], 1) @ weight.T + bias

    def deep(there):
        return linear(there).tanh() * linear(there)

    for predict in (linear, deep):
        parts = mf.AGM.shapley_logits(predict, k)
        expected = torch.zeros(k, 5, C)
        for order in itertools.permutations(range(k)):
            there, before = [False] * k, torch.zeros(5, C)
            for i in order:
                there[i] = True
                now = predict(tuple(there))
                expected[i] += (now - before) / math.factorial(k)
                before = now
        torch.testing.assert_close(torch.stack(parts), expected, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(sum(parts), predict((True,) * k), rtol=1e-5, atol=1e-5)
    own = [x @ w.T + bias / k for x, w in zip(features, weight.split(4, 1), strict=True)]
    torch.testing.assert_close(mf.AGM.shapley_logits(linear, k), own, rtol=1e-5, atol=1e-5)


def test_cggm_where_all_gain_and_where_none_does():
    """The published quotient while every modality gains; where it would divide by nothing, or turn a gradient round, none does."""
    labels = torch.arange(C).repeat(3)

    def right(*counts):
        return [F.one_hot(torch.where(torch.arange(N) < n, labels, (labels + 1) % C), C).float() for n in counts]

    cggm = mf.CGGM(3)
    for counts, gains in (((2, 4, 6), (2, 4, 6)), ((3, 6, 9), (1, 2, 3))):
        cggm.update(right(*counts), labels)
        published = [1.3 * (sum(gains) - gain) / sum(gains) for gain in gains]
        torch.testing.assert_close(cggm.beta, torch.tensor(published, dtype=torch.float64), rtol=1e-12, atol=0.0)
    cggm.update(right(3, 5, 1), labels)
    assert cggm.beta.tolist() == pytest.approx([1.3 * 2 / 3] * 3)
    cggm.update(right(4, 2, 1), labels)
    assert cggm.beta.tolist() == pytest.approx([0.0, 1.3, 1.3])


@pytest.mark.parametrize("kind", KINDS)
def test_equal_modalities_are_left_alone(kind):
    scale = KINDS[kind](3)
    for seed in range(3):
        (logits, *_), labels = batch(3, seed)
        scale.update([logits] * 3, labels)
        torch.testing.assert_close(scale.beta, torch.ones(3, dtype=torch.float64), rtol=1e-15, atol=0.0)


@pytest.mark.parametrize("kind", KINDS)
def test_modalities_in_another_order(kind):
    one, other, order = KINDS[kind](4), KINDS[kind](4), [2, 0, 3, 1]
    for seed in range(4):
        logits, labels = batch(4, seed)
        one.update(logits, labels)
        other.update([logits[i] for i in order], labels)
        torch.testing.assert_close(other.beta, one.beta[order], rtol=1e-13, atol=0.0)


@pytest.mark.parametrize("kind", KINDS)
def test_forms_of_logits_and_labels(kind):
    """A list, a tensor, a dict, more dimensions, other dtypes: one result."""
    logits, labels = batch(3)
    betas = []
    for given, classes in (
        (logits, labels),
        (torch.stack(logits), labels),
        (dict(zip("abc", logits, strict=True)), labels.int()),
        ([x.reshape(3, 4, C) for x in logits], labels.reshape(3, 4)),
        ([x.requires_grad_() for x in logits], labels),
    ):
        scale = KINDS[kind](3)
        scale.update(given, classes)
        assert not scale.beta.requires_grad
        betas.append(scale.beta)
    assert all(torch.equal(beta, betas[0]) for beta in betas)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("attached", [False, True])
def test_logits_by_the_names_of_the_branches(kind, attached):
    """A dict in another order than the block's branches: its names count."""
    logits, labels = batch(3)
    branches = nn.ModuleDict({name: nn.Linear(5, C) for name in ("text", "image", "sound")})
    scale, plain = KINDS[kind](3), KINDS[kind](3)
    (mf.attach if attached else mf.ImpartialityBlock)(branches, "mgda", local=scale)
    plain.update(logits, labels)
    given = dict(zip(branches, logits, strict=True))
    scale.update({name: given[name] for name in sorted(given)}, labels)
    assert torch.equal(scale.beta, plain.beta)
    with pytest.raises(ValueError, match="logits has the names a, image, sound, expected those of the branches: text, image, sound"):
        scale.update({"a": logits[0], "image": logits[1], "sound": logits[2]}, labels)


@pytest.mark.parametrize(
    "call, error, message",
    [
        (lambda: mf.OGM(1), ValueError, "k is 1, expected the number of modalities, 2 to 256"),
        (lambda: mf.OGM(2.0), ValueError, "k is 2.0"),
        (lambda: mf.OGM(alpha=0.0), ValueError, "alpha is 0.0, expected a positive"),
        (lambda: mf.OGM(alpha=math.nan), ValueError, "alpha is nan"),
        (lambda: mf.AGM(alpha=-1.0), ValueError, "alpha is -1.0"),
        (lambda: mf.CGGM(rho=math.inf), ValueError, "rho is inf"),
        (lambda: mf.OGM(3).update(*batch(2)), ValueError, "logits has 2 entries, expected 3"),
        (lambda: mf.OGM().update(batch(2)[0], torch.zeros(N)), TypeError, "labels is torch.float32, expected .* whole numbers"),
        (lambda: mf.OGM().update(batch(2)[0], [0] * N), TypeError, "labels is a list"),
        (lambda: mf.OGM().update(batch(2)[0], torch.zeros(N + 1).long()), ValueError, r"logits\[0\] has shape \(12, 4\), expected \(13, 'C'\)"),
        (lambda: mf.OGM().update([torch.zeros(2, 3), torch.zeros(2, 4)], torch.zeros(2).long()), ValueError, r"logits\[1\] has shape \(2, 4\)"),
        (lambda: mf.OGM().update([torch.zeros(2, 3), None], torch.zeros(2).long()), TypeError, r"logits\[1\] is NoneType"),
        (lambda: mf.OGM().update([torch.zeros(0, 3)] * 2, torch.zeros(0).long()), ValueError, "labels is empty"),
        (lambda: mf.OGM().update([torch.zeros(2, 3, device="meta")] * 2, torch.zeros(2).long()), ValueError, "on meta, but OGM on cpu"),
        (lambda: mf.OGM()(torch.zeros(2, 3)), ValueError, "features has a Tensor, expected a list of 2"),
        (lambda: mf.OGM()([torch.zeros(2)]), ValueError, "features has 1 entries"),
        (lambda: mf.OGM()([torch.zeros(2), {1}]), TypeError, "encoder 1 returned a set"),
        (lambda: mf.LinearHeads(3, [1, 2, 3], "mean", local=mf.OGM()), ValueError, r"local is OGM\(2, alpha=0.1\), for 2 modalities, expected one for 3"),
        (lambda: torch.func.grad(lambda x: mf.OGM().update([x, x], torch.zeros(2).long()))(torch.zeros(2, 3)), RuntimeError, "torch.func"),
    ],
)  # fmt: skip
def test_errors(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_one_label():
    """Without a batch dimension it is a batch of one."""
    logits, labels = batch(2)
    one, other = mf.OGM(), mf.OGM()
    one.update([x[0] for x in logits], labels[0])
    other.update([x[:1] for x in logits], labels[:1])
    assert torch.equal(one.beta, other.beta) and one.beta.min() < 1
