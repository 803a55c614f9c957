"""Distillation (KD) and SMIL: systems that are trained in stages."""

import math

import pytest
import torch
from fusion_models import CLASSES, NAMES, ROWS, SIZES, assert_absent_cells_are_never_read, assert_same, batch, encoders, grads, overfit
from torch import nn
from torch.func import functional_call
from torch.nn import functional as F

from mmfast.models.fusion import KD, SMIL, Concat, FusionModel
from mmfast.models.fusion.smil import STEPS

# KD


def kd(dtype=torch.float64, sizes=SIZES, **change):
    torch.manual_seed(1)
    made = {n: nn.Sequential(nn.Linear(i, sizes[n]), nn.Tanh()) for n, i in (("image", 5), ("sound", 4), ("text", 3))}
    return KD(made, Concat(nn.Linear(sum(sizes.values()), CLASSES)), CLASSES, **change).to(dtype)


def test_kd_goes_from_the_best_teacher_to_the_student():
    model = kd()
    assert model.stage == "unimodal"
    assert model.next_stage({"image": 0.7, "sound": 0.2, "text": 0.9}) == "text"
    assert (
        model.order == ("text", "image", "sound") and model.student == "sound" and model.stages == ("unimodal", "text", "image", "fusion")
    )
    assert [model.next_stage(), model.next_stage()] == ["image", "fusion"]
    with pytest.raises(ValueError, match="the stage is 'fusion', the last one"):
        model.next_stage()
    model = kd()
    model.next_stage(["sound", "text", "image"])
    assert model.student == "image" and model.stage == "sound"


def test_kd_first_trains_each_modality_alone():
    model = kd()
    x, target, present = batch()
    logits = model.unimodal(x, present)
    expected = sum(F.cross_entropy(logits[n][present[n]], target[present[n]]) for n in NAMES)
    torch.testing.assert_close(model.loss(x, target, present), expected)
    torch.testing.assert_close(
        logits["text"][present["text"]], model.classifiers["text"](model.encoders["text"](x["text"]))[present["text"]]
    )
    assert not any(n.startswith("fusion") for n in grads(model, model.loss(x, target, present)))


@pytest.mark.parametrize("equal", [False, True])
@pytest.mark.parametrize("distance", ["mse", "cosine"])
def test_kd_then_draws_the_student_to_each_teacher(distance, equal):
    model = kd(sizes=dict.fromkeys(NAMES, 4) if equal else SIZES, weight=0.4, distance=distance)
    x, target, present = batch()
    model.next_stage(["text", "sound", "image"])
    for teacher in ("text", "sound"):
        assert model.stage == teacher
        student, goal = model.encoders["image"](x["image"]), model.encoders[teacher](x[teacher]).detach()
        mapped = model.maps["image"][teacher](student)
        assert isinstance(model.maps["image"][teacher], nn.Identity) == equal
        both = present["image"] & present[teacher]
        if distance == "mse":
            apart = ((mapped - goal) ** 2).mean(1)
        else:
            apart = 1 - (mapped * goal).sum(1) / mapped.norm(dim=1) / goal.norm(dim=1)
        task = F.cross_entropy(model.classifiers["image"](student)[present["image"]], target[present["image"]])
        expected = task + 0.4 * apart[both].mean()
        torch.testing.assert_close(model.loss(x, target, present), expected)
        found = grads(model, model.loss(x, target, present))
        assert_same({n: g for n, g in found.items() if (g != 0).any()}, {n: g for n, g in grads(model, expected).items() if (g != 0).any()})
        taught = {n for n, g in found.items() if (g != 0).any()}
        assert taught and all(n.startswith(("encoders.image", "classifiers.image", f"maps.image.{teacher}")) for n in taught)
        model.next_stage()
    assert model.stage == "fusion"
    torch.testing.assert_close(model.loss(x, target, present), F.cross_entropy(model(x, present), target))


def test_kd_gives_the_student_what_the_teacher_knows():
    """The class is in the teacher alone, but the student's features can be mapped to the teacher's: the distance falls."""
    model = kd(torch.float32)
    x, target, _ = batch(32, torch.float32)
    x["image"] = torch.cat([x["sound"], x["text"][:, :1]], 1)
    model.next_stage(["sound", "text", "image"])
    adam = torch.optim.Adam(model.parameters(), 1e-2)
    losses = []
    for _ in range(100):
        adam.zero_grad()
        loss = model.loss(x, target)
        loss.backward()
        adam.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]


def test_kd_absent_cells_and_checkpoints():
    for stage in range(4):
        model = kd()
        for s in range(stage):
            model.next_stage(None if s else ["text", "sound", "image"])
        assert_absent_cells_are_never_read(model, (math.nan,))
    other = kd()
    other.load_state_dict(model.state_dict())
    assert other.stage == "fusion" and other.order == ("text", "sound", "image")


def test_kd_overfits_32_samples():
    model = kd(torch.float32)
    for scores in (["image", "text", "sound"], None, None):
        model.next_stage(scores)
    assert overfit(model) == 1


@pytest.mark.parametrize("name", ["a", "b", "c"])
def test_kd_refuses_a_score_that_is_no_number(name):
    """NaN compares as false with all: the order would be that of the dict."""
    model = kd()
    scores = {n: 0.5 for n in model.names} | {model.names["abc".index(name) % len(model.names)]: float("nan")}
    with pytest.raises(ValueError, match="expected numbers: nan has no place in an order"):
        model.next_stage(scores)
    assert model.stage == "unimodal" and model.order == model.names


def test_kd_refuses():
    for change, message in [
        ({"distance": "l1"}, "distance is 'l1', expected one of mse, cosine"),
        ({"weight": -1}, "weight is -1, expected"),
    ]:
        with pytest.raises(ValueError, match=message):
            kd(**change)
    with pytest.raises(ValueError, match="encoders has a, expected two modalities at least"):
        KD({"a": nn.Linear(2, 2)}, Concat(nn.Linear(2, 2)), 2)
    model = kd()
    with pytest.raises(ValueError, match="scores is None at the end of stage 'unimodal', expected them after 'unimodal' and there alone"):
        model.next_stage()
    with pytest.raises(ValueError, match="scores has image, text, expected each of image, sound, text"):
        model.next_stage({"image": 1.0, "text": 0.5})
    model.next_stage(NAMES)
    with pytest.raises(ValueError, match="at the end of stage 'image'"):
        model.next_stage(NAMES)
    assert model.stage == "image"


# SMIL


def smil(dtype=torch.float64, **change):
    torch.manual_seed(1)
    return SMIL(encoders(dtype), "sound", CLASSES, 10, 3, 0.0, **change).to(dtype)


def meta(**change):
    pytest.importorskip("sklearn")
    model, (x, _, present) = smil(**change), batch()
    model.fit_centres([(x, present)])
    return model


def softplus(x):
    return (1 + x.exp()).log()


def by_hand(model, f, hide, noise=None, head=None):
    """Logits, joint and hidden features of SMIL's network, from features by name."""
    net = model.fusion
    head = dict(net.named_parameters()) | (head or {})
    known = torch.cat([f["image"], f["text"]], 1)
    weights = softplus(net.impute(known))
    made = torch.stack([sum(w * c for w, c in zip(row, net.centres, strict=True)) / row.sum() for row in weights])
    joint = torch.cat([known, torch.where(hide.unsqueeze(1), made, f["sound"])], 1)
    noises = noise or (0, 0)
    x = joint + softplus(net.disturb_joint(known) + noises[0])
    h = (x @ head["fuse.weight"].T + head["fuse.bias"]).relu()
    return (h + softplus(net.disturb_hidden(joint) + noises[1])) @ head["classify.weight"].T + head["classify.bias"], joint, h


def test_smil_first_is_plain_fusion():
    model = smil()
    x, target, present = batch()
    f = torch.cat([model.encoders[n](x[n]) * present[n].unsqueeze(1) for n in ("image", "text", "sound")], 1)
    expected = model.fusion.classify(model.fusion.fuse(f).relu())
    torch.testing.assert_close(model(x, present), expected)
    torch.testing.assert_close(model.loss(x, target, present), F.cross_entropy(expected, target))


def test_smil_finds_its_prototypes():
    cluster = pytest.importorskip("sklearn.cluster")
    model = smil()
    batches = [batch(seed=s) for s in (0, 1)]
    found = model.fit_centres([(x, p) for x, _, p in batches], seed=3)
    points = torch.cat([model.encoders["sound"](x["sound"])[p["sound"]] for x, _, p in batches]).detach().numpy()
    expected = cluster.KMeans(3, n_init=10, random_state=3).fit(points).cluster_centers_
    torch.testing.assert_close(found, torch.as_tensor(expected))
    assert torch.equal(found, model.fusion.centres)


def test_smil_imputes_without_noise_when_it_predicts():
    model, (x, _, present) = meta(), batch()
    f = {n: model.encoders[n](x[n]) * present[n].unsqueeze(1) for n in NAMES}
    torch.testing.assert_close(model(x, present), by_hand(model, f, ~present["sound"])[0])


@pytest.mark.parametrize("step", [0, STEPS])
@pytest.mark.parametrize("some", [True, False])
def test_smil_takes_a_step_inside_of_a_step(some, step):
    """The loss and its gradient, second order included, with the inner step written out."""
    model, (x, target, present) = meta(inner_rate=0.5, match=0.2), batch()
    model.steps = step
    if not some:
        present["sound"] = torch.ones(ROWS, dtype=torch.bool)
    has = present["sound"]
    lacks = ~has if some else torch.ones_like(has)
    torch.manual_seed(4)
    found = grads(model, model.loss(x, target, present))
    torch.manual_seed(4)
    noise = [torch.randn(ROWS, d, dtype=torch.float64) for d in (sum(SIZES.values()), 10)]
    everywhere = torch.ones_like(has)

    def features(of):
        own = {n: functional_call(model.encoders[n], of.get(n, {}), (x[n],)) for n in NAMES}
        return {n: torch.where(present[n].unsqueeze(1), f, 0.0) for n, f in own.items()}

    inner = F.cross_entropy(by_hand(model, features({}), everywhere, noise)[0][lacks], target[lacks])
    moved = {n: dict(model.encoders[n].named_parameters()) for n in ("image", "text")}
    moved["head"] = {n: p for n, p in model.fusion.named_parameters() if n.startswith(("fuse", "classify"))}
    fast = {}
    for part, params in moved.items():
        slopes = torch.autograd.grad(inner, list(params.values()), create_graph=True)
        rate = 0.5 if step == 0 else 0.05
        fast[part] = {n: p - rate * g for (n, p), g in zip(params.items(), slopes, strict=True)}
    f = features(fast)
    logits, joint, h = by_hand(model, f, ~has, head=fast["head"])
    _, joint_made, h_made = by_hand(model, f, everywhere, head=fast["head"])
    outer = F.cross_entropy(logits[has], target[has])
    outer = outer + 0.2 * ((joint - joint_made)[has].square().mean() + (h - h_made)[has].square().mean())
    assert_same(found, grads(model, inner + outer))
    assert model.steps == step + 1


def test_smil_absent_cells_and_checkpoints():
    model = meta()
    assert_absent_cells_are_never_read(model, (math.nan, math.inf))
    other, (x, _, present) = smil(), batch()
    other.load_state_dict(model.state_dict())
    assert torch.equal(other(x, present), model(x, present)) and other.fusion.meta and other.steps == model.steps > 0
    with torch.no_grad():  # a validation loss asks for no gradient
        torch.testing.assert_close(model.loss(x, batch()[1], present), F.cross_entropy(model(x, present), batch()[1]))


def test_smil_overfits_32_samples():
    pytest.importorskip("sklearn")
    model = smil(torch.float32)
    x, _, present = batch(32, torch.float32)
    overfit(model, 60, 1e-2)
    model.train().fit_centres([(x, present)])
    assert overfit(model, 150, 1e-2) > 0.95


def test_smil_refuses():
    with pytest.raises(ValueError, match="missing is 'video', expected one of image, sound, text, with another beside it"):
        SMIL(encoders(), "video", CLASSES)
    with pytest.raises(ValueError, match="missing is 'a', expected one of a, with another"):
        SMIL({"a": nn.Linear(2, 2)}, "a", 2)
    model, (x, _, _) = smil(), batch()
    pytest.importorskip("sklearn")
    with pytest.raises(ValueError, match="batches has 2 samples with 'sound', expected 3 at least, the number of prototypes"):
        model.fit_centres([({n: v[:2] for n, v in x.items()}, None)])
    assert isinstance(model, FusionModel) and not model.fusion.meta
