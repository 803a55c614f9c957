"""Explicit basis reallocation, piece by piece, against the formulas in float64."""

import math

import pytest
import torch
from fusion_models import (
    CLASSES,
    NAMES,
    ROWS,
    SIZES,
    assert_absent_cells_are_never_read,
    assert_same,
    batch,
    encoders,
    grads,
    matrix,
    overfit,
)
from torch import nn
from torch.nn import functional as F

import mmfast as mf
from mmfast.models.fusion import EBR, Concat, reverse
from mmfast.models.fusion.ebr import two_layers

LATENT, HIDDEN = 4, 9


def ebr(dtype=torch.float64, **change):
    torch.manual_seed(1)
    model = EBR(encoders(dtype), Concat(nn.Linear(sum(SIZES.values()), CLASSES).to(dtype)), LATENT, HIDDEN, **change)
    return model.to(dtype)


def by_hand(model, x, target, present):
    """L_sem and L_md sample by sample, and the factors that they are functions of."""
    there = matrix(present)
    g = {n: model.factors[n](model.encoders[n](x[n])) for n in NAMES}
    logits, guesses = [], []
    for row in range(ROWS):
        back = []
        for i, n in enumerate(NAMES):
            first = next((int(j) for j in model.order[i] if there[row, j]), None)
            back.append(torch.zeros(SIZES[n]).double() if first is None else model.mechanisms[n](g[NAMES[first]][row]))
            if there[row, i]:
                guesses.append(-model.discriminator(g[n][row]).log_softmax(0)[i])
        logits.append(model.fusion.network(torch.cat(back)))
    return F.cross_entropy(torch.stack(logits), target), torch.stack(guesses).mean(), list(g.values())


def test_gradient_reversal_is_exact():
    x = torch.randn(5, dtype=torch.float64, requires_grad=True)
    slope = torch.randn(5, dtype=torch.float64)
    y = reverse(x, 0.3)
    assert torch.equal(y, x)
    y.backward(slope)
    assert torch.equal(x.grad, -0.3 * slope)


@pytest.mark.parametrize("weight", [1.0, 0.3, 0.0])
def test_who_minimises_what(weight):
    model = ebr(weight=weight)
    model.order.copy_(torch.tensor([[0, 2, 1], [1, 2, 0], [2, 0, 1]]))
    x, target, present = batch()
    parts = model.losses(x, target, present)
    sem, md, _ = by_hand(model, x, target, present)
    torch.testing.assert_close(parts["task"], sem)
    torch.testing.assert_close(parts["modality"], md)
    of_sem, of_md = grads(model, by_hand(model, x, target, present)[0]), grads(model, by_hand(model, x, target, present)[1])
    expected = {}
    for name in of_sem | of_md:
        part = name.split(".")[0]
        if part == "discriminator":
            expected[name] = of_md[name]
        elif part in ("encoders", "factors"):
            expected[name] = of_sem[name] - weight * of_md[name]
        else:
            assert part in ("mechanisms", "fusion") and name not in of_md
            expected[name] = of_sem[name]
    assert_same(grads(model, model.loss(x, target, present)), expected)


@pytest.mark.parametrize("rule", [mf.PCGrad, mf.MGDA, mf.Sum])
def test_a_block_resolves_task_and_modality_at_the_factors(rule):
    model = ebr(weight=2.0, resolver=rule())
    x, target, present = batch()
    found = grads(model, model.loss(x, target, present))
    sem, md, factors = by_hand(model, x, target, present)
    both = [torch.autograd.grad(sem, factors, retain_graph=True), [-2.0 * g for g in torch.autograd.grad(md, factors, retain_graph=True)]]
    resolved = mf.resolve([list(of) for of in both], rule(), preserve_norm=True)
    model.zero_grad()
    torch.autograd.backward(factors, resolved)
    expected = {n: p.grad for n, p in model.named_parameters() if n.startswith(("encoders", "factors"))}
    assert_same({n: g for n, g in found.items() if n in expected}, expected)
    stats = model.block.stats()
    assert stats.names == ("task", "modality")
    plain = ebr(weight=2.0)
    same = all(torch.allclose(found[n], g) for n, g in grads(plain, plain.loss(x, target, present)).items())
    assert same == (rule is mf.Sum)


def test_without_the_discriminator_the_block_leaves_the_task_alone():
    x, target, present = batch()
    found = []
    for resolver in (None, mf.MGDA()):
        model = ebr(resolver=resolver)
        model.after_epoch(0.5)
        model.after_epoch(0.4)
        found.append(grads(model, model.loss(x, target, present)))
    assert_same(*found)
    assert not any(n.startswith("discriminator") for n in found[0])


def test_it_stops_when_the_score_starts_to_drop():
    model = ebr()
    assert model.active
    assert [model.after_epoch(s) for s in (0.5, 0.6, 0.6, 0.59, 0.9)] == [True, True, True, False, False]
    x, target, present = batch()
    assert set(model.losses(x, target, present)) == {"task"} and not model.active
    patient = ebr(patience=2)
    assert [patient.after_epoch(s) for s in (0.5, 0.4, 0.5, 0.4, 0.4, 0.6)] == [True, True, True, True, False, False]
    falling = ebr(patience=2)
    assert [falling.after_epoch(s) for s in (0.5, 0.3, 0.4)] == [True, True, False]  # both are below the best
    with pytest.raises(ValueError, match="score is nan, expected the task's validation score"):
        falling.after_epoch(math.nan)


def test_phases_alternate():
    model = ebr(alternate=2)
    seen = []
    for epoch in range(8):
        seen.append(model.active)
        model.after_epoch(epoch)
    assert seen == [False, False, True, True] * 2
    assert [model.after_epoch(s) for s in (7, 6.5, 9, 9)] == [False] * 4  # below 7, the best: it stays off
    x, target, present = batch()
    assert set(ebr(alternate=2).losses(x, target, present)) == {"task"}


def test_similarity_and_the_order_of_substitutes():
    model = ebr()
    with torch.no_grad():
        for factors in model.factors.values():
            nn.init.normal_(factors[2].bias)
    batches = [batch(seed=s) for s in (0, 1)]
    found = model.fit_substitutes([(x, present) for x, _, present in batches])
    sums, counts = torch.zeros(3, 3, dtype=torch.float64), torch.zeros(3, 3)
    for x, _, present in batches:
        g = [model.factors[n](model.encoders[n](x[n])) for n in NAMES]
        for i, a in enumerate(NAMES):
            for j, b in enumerate(NAMES):
                for row in range(ROWS):
                    if present[a][row] and present[b][row]:
                        sums[i, j] += (g[i][row] @ g[j][row] / (g[i][row].norm() * g[j][row].norm())).item()
                        counts[i, j] += 1
    torch.testing.assert_close(found, sums / counts)
    assert torch.equal(found, model.similarity)
    for i in range(3):
        others = sorted((j for j in range(3) if j != i), key=lambda j: -found[i, j].item())
        assert model.order[i].tolist() == [i, *others]


def test_a_model_in_bfloat16_counts_on():
    """The sums over 1,200 samples, and the similarity, are in float64: in bfloat16 a count would end at 256."""
    model, (x, _, present) = ebr().bfloat16(), batch()
    x = {name: value.bfloat16() for name, value in x.items()}
    once, often = (model.fit_substitutes([(x, present)] * n) for n in (1, 1200 // ROWS))
    assert once.dtype == model.similarity.dtype == torch.float64
    torch.testing.assert_close(often, once)


def test_modalities_that_are_never_together_come_last():
    model, (x, _, _) = ebr(), batch()
    yes, no = torch.ones(ROWS, dtype=torch.bool), torch.zeros(ROWS, dtype=torch.bool)
    similarity = model.train().fit_substitutes([(x, {"sound": no}), (x, {"image": no, "sound": no, "text": yes})])
    assert similarity.isnan().tolist() == [[False, True, False], [True, True, True], [False, True, False]] and model.training
    assert model.order.tolist() == [[0, 2, 1], [1, 0, 2], [2, 0, 1]]


def test_a_missing_modality_has_the_first_choice_that_is_present():
    model, (x, _, _) = ebr(), batch()
    model.order.copy_(torch.tensor([[0, 2, 1], [1, 2, 0], [2, 1, 0]]))
    g = {n: model.factors[n](model.encoders[n](x[n])) for n in NAMES}

    def logits(*sources):
        return model.fusion.network(torch.cat([model.mechanisms[n](g[s]) for n, s in zip(NAMES, sources, strict=True)], 1))

    def given(*names):
        return model({n: x[n] for n in names})

    torch.testing.assert_close(given("image", "sound", "text"), logits("image", "sound", "text"))
    torch.testing.assert_close(given("image", "sound"), logits("image", "sound", "sound"))
    torch.testing.assert_close(given("sound", "text"), logits("text", "sound", "text"))
    torch.testing.assert_close(given("image", "text"), logits("image", "text", "text"))
    torch.testing.assert_close(given("image"), logits("image", "image", "image"))
    nothing = {n: torch.zeros(ROWS, dtype=torch.bool) for n in NAMES}
    zeros = torch.zeros(ROWS, sum(SIZES.values()), dtype=torch.float64)
    assert torch.equal(model(x, nothing), model.fusion.network(zeros))


def test_what_the_fusion_is_told_to_be_present():
    """Substitutes count as present; a sample with nothing does not."""
    seen = []

    class Head(Concat):
        def forward(self, features, present):
            seen.append(present)
            return super().forward(features, present)

    model = EBR(encoders(), Head(nn.Linear(18, CLASSES).double()), LATENT, HIDDEN).double()
    x, _, present = batch()
    model(x, present)
    assert torch.equal(seen[0], matrix(present).any(1, keepdim=True).expand(-1, 3)) and not seen[0].all()


def test_the_weight_of_the_reconstruction():
    model = ebr(reconstruction=0.7)
    x, target, present = batch()
    each = []
    for n in NAMES:
        f = model.encoders[n](x[n])
        each.append((model.mechanisms[n](model.factors[n](f)) - f).square().mean(1)[present[n]])
    torch.testing.assert_close(model.losses(x, target, present)["reconstruction"], 0.7 * torch.cat(each).mean())
    torch.testing.assert_close(model.loss(x, target, present), sum(model.losses(x, target, present).values()))


def test_first_weights():
    made = two_layers(300, 400, 50)
    assert (made[0].weight.std() - (2 / 400) ** 0.5).abs() < 2e-3 and (made[2].weight.std() - (2 / 50) ** 0.5).abs() < 4e-3
    assert (made[0].bias == 0).all() and (made[2].bias == 0).all()


@pytest.mark.parametrize("change", [{}, {"resolver": mf.PCGrad, "reconstruction": 0.1}])
def test_absent_cells_are_never_read(change):
    assert_absent_cells_are_never_read(ebr(**change))


def test_the_factors_of_modalities_become_alike():
    """The reversed gradient does what it is for: the discriminator tells them apart less well than where nobody works against it."""
    chances = {}
    for weight in (0.0, 1.0):
        torch.manual_seed(0)
        model = EBR(encoders(torch.float32), Concat(nn.Linear(18, CLASSES)), LATENT, 32, weight)
        x, target, _ = batch(64, torch.float32)
        adam = torch.optim.Adam(model.parameters(), 3e-3)
        for _ in range(150):
            adam.zero_grad()
            model.loss(x, target).backward()
            adam.step()
        chances[weight] = model.losses(x, target)["modality"].item()
    assert chances[0.0] < 0.3 and chances[1.0] > 0.5, chances  # log 3 = 1.1 at most


@pytest.mark.parametrize("resolver", [None, "pcgrad"])
def test_overfits_32_samples(resolver):
    assert overfit(EBR(encoders(torch.float32), Concat(nn.Linear(18, CLASSES)), 8, 64, weight=0.1, resolver=resolver), 200, 1e-2) == 1


def test_a_checkpoint_goes_on_where_it_was():
    x, target, present = batch()
    a, b = ebr(resolver=mf.PCGrad()), ebr(resolver=mf.PCGrad())
    a.fit_substitutes([(x, present)])
    a.after_epoch(0.9)
    with torch.no_grad():
        for p in a.parameters():
            p.add_(0.1)
    b.load_state_dict(a.state_dict())
    assert torch.equal(b.order, a.order) and torch.equal(b.similarity, a.similarity)
    assert torch.equal(a.loss(x, target, present), b.loss(x, target, present))
    assert b.after_epoch(0.8) is False


def test_what_is_refused():
    for change, message in [
        ({"latent": 0}, "latent is 0, expected a whole number, 1 at least"),
        ({"hidden": 2.5}, "hidden is 2.5, expected a whole number"),
        ({"patience": 0}, "patience is 0, expected a whole number, 1 at least"),
        ({"alternate": -1}, "alternate is -1, expected a whole number, 0 at least"),
        ({"weight": -1.0}, "weight is -1.0, expected a number, 0 at least"),
        ({"weight": math.nan}, "weight is nan"),
        ({"reconstruction": math.inf}, "reconstruction is inf"),
        ({"resolver": "pcgard"}, "there is no resolver 'pcgard'; did you mean PCGrad"),
    ]:
        with pytest.raises(ValueError, match=message):
            EBR(encoders(), Concat(nn.Linear(18, 3)), **change)
    with pytest.raises(TypeError, match="batches holds a dict, expected pairs"):
        EBR({"a": nn.Linear(2, 2), "b": nn.Linear(2, 2)}, Concat(nn.Linear(4, 2)), 4, 4).fit_substitutes([{"a": None, "b": None}])
    with pytest.raises(ValueError, match="inputs has 'x'"):
        ebr()({"x": torch.ones(2, 2)})
