"""What multimodal VAEs make of their inputs: missing modalities, absent cells, and what is refused."""

import math

import pytest
import torch
from multimodal_models import ROWS, SIZES, absences, assert_same, batch, grads, loss_of, make, noise_of
from torch import nn

import mmfast as mf
from mmfast.models.multimodal import Modality, MultimodalVAE
from mmfast.models.multimodal.inputs import filled

MIXTURES = ("poe", "moe", "mopoe")


@pytest.mark.parametrize("mixture", MIXTURES)
def test_a_missing_modality_gives_the_posterior_without_it_exactly(mixture):
    vae, x = make(mixture), batch()
    absent = {"sound": torch.zeros(ROWS, dtype=torch.bool)}
    without = {name: x[name] for name in ("image", "text")}
    found = [vae.posterior(x, present=absent), vae.posterior(without), vae.posterior(x, ["text", "image"])]
    assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other, strict=True))
    some = {"sound": torch.arange(ROWS) % 2 == 0}
    whole, mixed = vae.posterior(x), vae.posterior(x, present=some)
    for a, b, c in zip(mixed, whole, found[1], strict=True):
        assert torch.equal(a, torch.where(some["sound"].unsqueeze(1), b, c)) and not torch.equal(b, c)


@pytest.mark.parametrize("mixture", MIXTURES)
def test_a_modality_absent_everywhere_is_one_that_is_not_given(mixture):
    vae, x = make(mixture), batch()
    noise, absent = noise_of(vae, 2), {"text": torch.zeros(ROWS, dtype=torch.bool)}
    found, without = (grads(vae, loss_of(vae, *given, noise)) for given in ((x, absent), ({n: x[n] for n in ("image", "sound")}, None)))
    other = {name for name in found if "text" in name}
    assert all((found[name] == 0).all() for name in other) and not other & without.keys()
    assert_same({n: g for n, g in found.items() if n not in other}, without)


@pytest.mark.parametrize("poison", [math.nan, math.inf, 1e300])
@pytest.mark.parametrize("blocks", ["", "pqs"])
@pytest.mark.parametrize("mixture", MIXTURES)
def test_what_an_absent_cell_holds_is_never_read(mixture, blocks, poison):
    vae = make(mixture, blocks=blocks, resolver=mf.IMTLG if blocks else None)
    x, present = batch(), absences()
    present["sound"] = torch.zeros(ROWS, dtype=torch.bool)  # and one of which nothing is there
    poisoned = {name: torch.where(present[name].unsqueeze(1), value, poison) for name, value in x.items()}
    found = []
    for inputs in (x, poisoned):
        leaves = {name: value.clone().requires_grad_() for name, value in inputs.items()}
        torch.manual_seed(2)
        own = grads(vae, vae.loss(leaves, present))
        own |= {f"x {name}": leaf.grad for name, leaf in leaves.items()}
        assert all((leaf.grad[~present[name]] == 0).all() for name, leaf in leaves.items())
        own |= dict(enumerate(vae.posterior(inputs, present=present)))
        torch.manual_seed(2)
        own |= {"z": vae.sample(inputs, None, 3, present), "log p": vae.log_likelihood(inputs, 9, present)}
        found.append(own)
    assert found[0].keys() == found[1].keys()
    assert all(torch.equal(found[0][key], found[1][key]) and found[0][key].isfinite().all() for key in found[0])


@pytest.mark.parametrize("mixture", MIXTURES)
def test_a_nan_in_a_cell_that_is_present_stays_in_its_row(mixture):
    """It stands in absent cells, too, whose results are left out."""
    vae, x, present = make(mixture), batch(), absences()
    x["sound"][0] = math.nan
    assert present["sound"][0] and torch.equal(
        filled(x["sound"], present["sound"]).isnan().any(1).nonzero().flatten(), torch.tensor([0, 4])
    )
    for found in (*vae.posterior(x, present=present), vae.log_likelihood(x, 9, present), vae.sample(x, None, 1, present)[0]):
        assert found[0].isnan().all() and found[1:].isfinite().all()


@pytest.mark.parametrize("mixture", MIXTURES)
def test_where_nothing_is_present_the_posterior_is_the_prior(mixture):
    vae, x = make(mixture), batch()
    nothing = {name: torch.zeros(ROWS, dtype=torch.bool) for name in SIZES}
    mean, std = vae.posterior(x, present=nothing)
    assert (mean == 0).all() and (std == 1).all()
    loss = vae.loss(x, nothing)
    assert abs(loss.item()) < 1e-12 and all((g == 0).all() for g in grads(vae, loss).values())
    assert vae.log_likelihood(x, 5, nothing).abs().max() < 1e-12
    z = vae.sample({n: v[:1] for n, v in x.items()}, None, 4000, {n: m[:1] for n, m in nothing.items()})
    assert z.mean().abs() < 0.06 and (z.std() - 1).abs() < 0.06


def test_an_absent_cell_has_a_present_one_in_its_place():
    """So that a likelihood sees what suits it, and a batch norm what the modality looks like."""
    x = torch.arange(1.0, 6.0).unsqueeze(1)
    assert filled(x, torch.tensor([True, False, True, False, False])).flatten().tolist() == [1, 3, 3, 3, 1]
    assert filled(x, torch.zeros(5, dtype=torch.bool)).flatten().tolist() == [1] * 5
    assert torch.equal(filled(x, torch.ones(5, dtype=torch.bool)), x)


def test_a_modality_that_no_row_has_takes_nothing_from_the_others():
    """Where it is asked all the same it sees ones: of zeros a logarithm and a norm have derivatives that are no numbers, and zero times those is none either."""

    class Unit(nn.Module):
        def __init__(self):
            super().__init__()
            self.out = nn.Linear(3, 2)

        def forward(self, x):
            return self.out(x / x.norm(dim=-1, keepdim=True)), torch.ones(len(x), 2)

    def amount(raw, x):
        return torch.distributions.LogNormal(raw, 1.0).log_prob(x).sum(-1)

    torch.manual_seed(0)
    both = {"a": Modality(Unit(), nn.Linear(2, 3), amount), "b": Modality(Unit(), nn.Linear(2, 3), amount)}
    vae = MultimodalVAE(both, 2, "mopoe", "siwae", 2, "pqs", mf.MGDA)
    x, nowhere = {name: torch.rand(5, 3) + 0.1 for name in both}, {"b": torch.zeros(5, dtype=torch.bool)}
    vae.loss(x, nowhere).backward()
    assert all((p.grad == 0).all() for p in vae.modalities["b"].parameters())
    assert all(p.grad.isfinite().all() and (p.grad != 0).any() for p in vae.modalities["a"].parameters())


# What is refused

GOOD = {"encoder": lambda x: (x[:, :2], x[:, :2].exp()), "decoder": nn.Linear(2, 5), "log_prob": lambda raw, x: raw.sum(-1)}


@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"mixture": "sum"}, ValueError, "mixture is 'sum', expected one of poe, moe, mopoe"),
        ({"objective": "dreg"}, ValueError, "objective is 'dreg', expected one of elbo, iwae, siwae"),
        ({"samples": 0}, ValueError, "samples is 0, expected a whole number, 1 at least"),
        ({"latent": 2.0}, ValueError, "latent is 2.0, expected a whole number"),
        ({"blocks": "px"}, ValueError, "blocks is 'px', expected some of the letters p, q and s"),
        ({"blocks": "pp"}, ValueError, "blocks is 'pp'"),
        ({"blocks": "p"}, TypeError, "resolver is None, expected a function that makes the rule of each block"),
        ({"blocks": "p", "resolver": mf.MGDA()}, TypeError, r"resolver is MGDA\(.*expected a function that makes"),
        ({"blocks": "p", "resolver": "mgad"}, ValueError, "there is no resolver 'mgad'; did you mean"),
        ({"resolver": mf.MGDA}, ValueError, "blocks is ''"),
        ({"blocks": None}, TypeError, "blocks is None, expected a string of the letters p, q and s"),
        ({"blocks": "p", "resolver": "krum"}, TypeError, "Krum needs arguments; expected .*lambda: mf.Krum"),
        ({"blocks": "p", "resolver": mf.Krum}, TypeError, "Krum needs arguments; expected .*lambda: mf.Krum"),
        ({"modalities": {}}, TypeError, "modalities is not as expected"),
        ({"modalities": {"a": nn.Linear(2, 2)}}, TypeError, "modalities is not as expected"),
        ({"modalities": {"a.b": Modality(**GOOD)}}, ValueError, "modalities has 'a.b', expected names without a dot or a plus"),
        ({"modalities": {"type": Modality(**GOOD)}}, ValueError, "modalities has 'type', which torch.nn.ModuleDict has as an attribute"),
        ({"samples": True}, ValueError, "samples is True, expected a whole number"),
        (
            {"modalities": {"a": Modality(**GOOD | {"decoder": abs})}, "blocks": "pqs", "resolver": "mgda"},
            TypeError,
            "the decoder of 'a' is a builtin_function_or_method, expected an nn.Module for blocks with 's'",
        ),
    ],
)
def test_bad_arguments(change, error, message):
    with pytest.raises(error, match=message):
        MultimodalVAE(**{"modalities": {"a": Modality(**GOOD)}, "latent": 2} | change)


def test_bad_modalities():
    for scale in (0, -1.0, math.nan, math.inf, "1"):
        with pytest.raises(ValueError, match="scale is .*, expected a positive number"):
            Modality(**GOOD, scale=scale)
    with pytest.raises(TypeError, match="decoder is a str, expected a function or an nn.Module"):
        Modality(**GOOD | {"decoder": "linear"})
    x = {"a": torch.randn(4, 5)}

    def loss(**change):
        return MultimodalVAE({"a": Modality(**GOOD | change)}, 2).loss(x)

    assert loss().isfinite()
    with pytest.raises(
        ValueError, match=r"the encoder of 'a' gives \[\(4, 2\), \(4, 3\)\], expected \(mean, std\), each of shape \(4, 2\)"
    ):
        loss(encoder=lambda x: (x[:, :2], x[:, :3]))
    with pytest.raises(ValueError, match="the encoder of 'a' gives a Tensor"):
        loss(encoder=lambda x: x)
    with pytest.raises(ValueError, match=r"log_prob of 'a' gives shape \(1, 1, 4, 5\), expected \(1, 1, 4\)"):
        loss(log_prob=lambda raw, x: raw)


def test_bad_inputs():
    vae, x = make(), batch()
    yes = torch.ones(ROWS, dtype=torch.bool)
    for call, error, message in [
        (lambda: vae.loss(x["text"]), TypeError, "inputs is a Tensor, expected a dict"),
        (lambda: vae.loss({}), ValueError, "inputs has no modality, expected at least one of image, sound, text"),
        (lambda: vae.loss({"txt": x["text"]}), ValueError, "inputs has 'txt', expected names among image, sound, text"),
        (lambda: vae.loss({"text": [1.0]}), TypeError, r"inputs\['text'\] is a list, expected a tensor"),
        (lambda: vae.loss(x | {"text": x["text"][1:]}), ValueError, r"inputs\['text'\] has 5 rows, expected 6 like the others"),
        (lambda: vae.loss({"text": x["text"]}, {"image": yes}), ValueError, "present has 'image', expected names among text"),
        (lambda: vae.loss(x, {"text": yes[1:]}), ValueError, r"present\['text'\] is torch.bool \(5,\), expected bool \(6,\)"),
        (lambda: vae.loss(x, {"text": yes.float()}), ValueError, r"present\['text'\] is torch.float32 \(6,\), expected bool"),
        (lambda: vae.loss(x, {"text": True}), ValueError, r"present\['text'\] is a bool, expected bool \(6,\)"),
        (lambda: vae.posterior(x, ["txt"]), ValueError, "subset has 'txt', expected names among"),
        (lambda: vae.posterior(x, "text"), TypeError, r"subset is the string 'text', expected several names, such as \['text'\]"),
        (lambda: vae.posterior({"text": x["text"]}, ["image"]), ValueError, "inputs has text, expected at least one of image"),
        (lambda: vae.posterior(x, []), ValueError, "subset is empty, expected names among image, sound, text, or None for all"),
        (lambda: vae.log_likelihood(x, 0), ValueError, "samples is 0, expected a whole number, 1 at least"),
        (lambda: vae.sample(x, samples=0), ValueError, "samples is 0, expected a whole number, 1 at least"),
        (lambda: vae.sample(x, samples=2.0), ValueError, "samples is 2.0, expected a whole number, 1 at least"),
    ]:
        with pytest.raises(error, match=message):
            call()
    with torch.inference_mode(), pytest.raises(RuntimeError, match="terms are made of gradients, which inference mode has none of"):
        vae.terms(x)
