"""The blocks p, q and s of multimodal VAEs against blocks made by hand: every branch's gradient by itself, resolved by a rule written here."""

import itertools

import pytest
import torch
from multimodal_models import ROWS, SIZES, absences, assert_same, batch, grads, log_prob, loss_of, make, noise_of
from torch.distributions import Independent, Normal

import mmfast as mf
from mmfast.models.multimodal import MultimodalVAE


def imtlg(gradients):
    """Weights under which the sum projects equally on every gradient (Liu et al., 2021), then the length of the plain sum."""
    rows = torch.stack([g.flatten() for g in gradients])
    units = rows / rows.norm(dim=1, keepdim=True)
    differences, of_units = rows[:1] - rows[1:], units[:1] - units[1:]
    rest = rows[0] @ of_units.T @ torch.linalg.pinv(differences @ of_units.T)
    found = torch.cat([1 - rest.sum().unsqueeze(0), rest]) @ rows
    return (found * rows.sum(0).norm() / found.norm()).view_as(gradients[0])


def plain(gradients):
    return sum(gradients)


def absent_left_out(rule):
    """A branch that sends nothing is not part of the problem."""

    def of(gradients):
        there = [g for g in gradients if (g != 0).any()]
        return rule(there) if len(there) > 1 else plain(gradients)

    return of


def by_hand(vae, x, present, noise, letters, rule):
    """Gradients of all parameters, from those of the single densities at each component's z and, for "s", at each decoder for each component."""
    rule = absent_left_out(rule)
    rules = {letter: rule if letter in letters else plain for letter in "pqs"}
    q = vae._encode(x, present)  # held to closed forms in test_multimodal.py
    own = [0] if vae.mixture == "poe" else [vae.components.index(c) for c in q.components]
    zs = [(mean + std * noise[i]) for mean, std, i in zip(q.mean, q.std, own, strict=True)]
    leaves = [z.detach().requires_grad_() for z in zs]
    valid = torch.ones(len(zs), ROWS, dtype=torch.bool) if q.valid is None else q.valid
    log_x, log_q = [], []
    for z in leaves:
        each = {}
        for name in q.batch.names:
            m = vae.modalities[name]
            value = m.scale * log_prob(m.decoder(z), q.batch.x[name])
            each[name] = value if present is None or name not in present else value * present[name]
        log_x.append(each)
        log_q.append([Independent(Normal(m, s), 1).log_prob(z) for m, s in zip(q.mean.detach(), q.std.detach(), strict=True)])
    # log-weights, the softmax over the index set, and the parts of each component's density in the mixture's
    weights = []
    mixtures = []
    for s in range(len(zs)):
        stacked = torch.stack(log_q[s]).masked_fill(~valid.unsqueeze(1), -torch.inf).detach()
        mixtures.append(stacked.softmax(0))
        log_prior = Normal(0.0, 1.0).log_prob(leaves[s]).sum(-1)
        weights.append((log_prior + sum(log_x[s].values())).detach() - stacked.logsumexp(0) + valid.sum(0).log())
    w, count = torch.stack(weights), valid.sum(0).double()
    if vae.objective == "elbo":
        wt = valid.unsqueeze(1) / (count * w.shape[1])
    elif vae.objective == "iwae":
        wt = w.softmax(1) * valid.unsqueeze(1) / count
    else:
        wt = w.masked_fill(~valid.unsqueeze(1), -torch.inf).flatten(0, 1).softmax(0).view_as(w)

    found = {}
    of_z = []
    for s, z in enumerate(leaves):
        decoders = [torch.autograd.grad(-(wt[s] * value).sum(), z, retain_graph=True)[0] for value in log_x[s].values()]
        experts = [torch.autograd.grad((wt[s] * part * value).sum(), z)[0] for part, value in zip(mixtures[s], log_q[s], strict=True)]
        prior = wt[s].unsqueeze(-1) * z.detach()  # of -wt log N(z; 0, I)
        of_z.append(rules["p"](decoders) + rules["q"](experts) + prior)
    for name in q.batch.names:
        params = dict(vae.modalities[name].decoder.named_parameters())
        each = [torch.autograd.grad(-(wt[s] * log_x[s][name]).sum(), params.values(), retain_graph=True) for s in range(len(zs))]
        flat = rules["s"]([torch.cat([g.flatten() for g in of]) for of in each])
        parts = flat.split([p.numel() for p in params.values()])
        found |= {f"modalities.{name}.decoder.{key}": g.view_as(p) for (key, p), g in zip(params.items(), parts, strict=True)}
    encoders = {name: p for name, p in vae.named_parameters() if ".encoder." in name and name.split(".")[1] in q.batch.names}
    found |= dict(zip(encoders, torch.autograd.grad(zs, list(encoders.values()), of_z), strict=True))
    return {name: found[name] for name, _ in vae.named_parameters() if name in found}


CASES = [
    *itertools.product(["poe", "moe", "mopoe"], ["siwae"], ["p", "pq", "pqs"], [False]),
    *itertools.product(["moe"], ["elbo", "iwae"], ["q", "s"], [False]),
    *itertools.product(["poe", "moe", "mopoe"], ["siwae"], ["pqs"], [True]),
]


@pytest.mark.parametrize("mixture, objective, letters, absent", CASES)
def test_blocks_are_those_made_by_hand(mixture, objective, letters, absent):
    vae, x, present = make(mixture, objective, blocks=letters, resolver=mf.IMTLG), batch(), absences() if absent else None
    noise = noise_of(vae, 2)
    found = grads(vae, loss_of(vae, x, present, noise))
    assert_same(found, by_hand(vae, x, present, noise, letters, imtlg), rtol=1e-7, atol=1e-10)
    without = by_hand(vae, x, present, noise, "", imtlg)
    if mixture != "poe":
        assert any(not torch.allclose(found[name], without[name], rtol=1e-3) for name in found)
    assert_same(grads(vae, loss_of(make_plain(vae), x, present, noise)), without, rtol=1e-9)


@pytest.mark.parametrize("spread", [3.0, 4.5])
@pytest.mark.parametrize("mixture, objective, letters", [("moe", "elbo", "q"), ("mopoe", "siwae", "pqs")])
def test_components_far_apart_are_branches_too(mixture, objective, letters, spread):
    """Their densities' shares are as small as 1e-100, and to a rule of directions a short gradient is as good as a long one."""

    def of_units(gradients):
        found = sum(g / g.norm() for g in gradients)
        return found * sum(gradients).norm() / found.norm()

    vae, x = make(mixture, objective, blocks=letters, resolver=mf.Unit), batch()
    with torch.no_grad():
        for i, name in enumerate(vae.names):
            vae.modalities[name].encoder.out.bias[:2] += spread * (i - 1)
    noise = noise_of(vae, 2)
    q = vae._encode(x, None)
    apart = ((q.mean.unsqueeze(1) - q.mean) / q.std).square().sum(-1) / 2
    assert 60 < apart.max() < 300
    assert_same(grads(vae, loss_of(vae, x, None, noise)), by_hand(vae, x, None, noise, letters, of_units), rtol=1e-7, atol=1e-10)


def make_plain(vae):
    """The same model, with the same parameters, without blocks."""
    modalities = {name: vae.modalities[name] for name in vae.names}
    return MultimodalVAE(modalities, vae.latent, vae.mixture, vae.objective, vae.samples)


@pytest.mark.parametrize("left", [("image", "text"), ("sound",)])
@pytest.mark.parametrize("mixture", ["poe", "moe", "mopoe"])
def test_a_modality_that_is_not_given_leaves_its_places_empty(mixture, left):
    vae, x = make(mixture, blocks="pqs", resolver=mf.IMTLG), {name: batch()[name] for name in left}
    noise = noise_of(vae, 2)
    assert_same(grads(vae, loss_of(vae, x, None, noise)), by_hand(vae, x, None, noise, "pqs", imtlg), rtol=1e-7, atol=1e-10)


@pytest.mark.parametrize("letters", ["p", "q", "s", "pq", "pqs"])
@pytest.mark.parametrize("mixture", ["poe", "moe", "mopoe"])
def test_a_sum_changes_nothing_nor_does_the_value_of_the_loss(mixture, letters):
    vae, x = make(mixture, blocks=letters, resolver="sum"), batch()
    noise = noise_of(vae, 2)
    loss, other = loss_of(vae, x, absences(), noise), loss_of(make_plain(vae), x, absences(), noise)
    torch.testing.assert_close(loss, other, rtol=1e-12, atol=0)
    assert_same(grads(vae, loss), grads(vae, other))


def test_each_block_has_a_rule_of_its_own_and_says_what_it_saw():
    made = []

    def factory():
        made.append(mf.GradNorm())
        return made[-1]

    vae = make("mopoe", blocks="pqs", resolver=factory)
    parts = ["image", "sound", "text", "image+sound", "image+text", "sound+text", "image+sound+text"]
    assert [list(of) for of in vae.blocks.values()] == [parts, parts, list(SIZES)]
    assert len(made) == 7 + 7 + 3 == len(set(map(id, made)))
    vae.loss(batch()).backward()
    for letter, names in (("p", tuple(SIZES)), ("q", tuple(parts)), ("s", tuple(parts))):
        for block in vae.blocks[letter].values():
            assert block.stats().names == names and (block.stats().norms > 0).all()


def test_what_rules_keep_is_in_the_state_dict():
    vae, x = make("moe", blocks="pqs", resolver=mf.GradNorm), batch()
    start = {name: value.clone() for name, value in vae.state_dict().items() if name.startswith("blocks.")}
    assert len(start) >= 9  # three of each letter
    for _ in range(3):
        vae.loss(x).backward()
    assert all(not torch.equal(vae.state_dict()[name], value) for name, value in start.items() if name.endswith("state"))
    other = make("moe", blocks="pqs", resolver=mf.GradNorm)
    fresh = grads(other, loss_of(other, x, None, noise_of(other, 2)))
    other.load_state_dict(vae.state_dict())
    vae.zero_grad()
    noise = noise_of(vae, 2)
    found = [grads(model, loss_of(model, x, None, noise)) for model in (vae, other)]
    assert_same(*found, rtol=0, atol=0)
    assert any(not torch.equal(found[0][name], fresh[name]) for name in fresh)


@pytest.mark.parametrize("mixture, components", [("poe", 1), ("moe", 3), ("mopoe", 7)])
def test_find_blocks_finds_the_places(mixture, components):
    """Without a block: at each component's z its decoders meet (p), and its densities (q)."""
    vae = make(mixture, samples=4)
    terms = vae.terms(batch())
    experts = tuple(f"q({'+'.join(c)})" for c in vae.components)
    assert tuple(terms) == (*SIZES, "prior", *experts)
    for names in (tuple(SIZES), experts):
        found = mf.find_blocks({name: terms[name] for name in names}, vae)
        assert len(found) == (components if len(names) > 1 else 0)
        assert all(block.terms == names and block.shape == (4, ROWS, 2) for block in found)
        assert all(block.norms.min() > 0 for block in found)


@pytest.mark.parametrize("blocks", ["", "pq"])
def test_find_blocks_finds_them_where_blocks_stand(blocks):
    vae = make("moe", samples=4, blocks=blocks, resolver=mf.MGDA if blocks else None)
    torch.manual_seed(5)
    terms = vae.terms(batch())
    found = mf.find_blocks({name: terms[name] for name in SIZES}, vae)
    assert [block.terms for block in found] == [tuple(SIZES)] * 3
    if blocks:  # what was found is what they see
        torch.manual_seed(5)
        vae.loss(batch()).backward()
        seen = sorted(tuple(block.stats().norms.tolist()) for block in vae.blocks["p"].values())
        for a, b in zip(seen, sorted(tuple(block.norms.tolist()) for block in found), strict=True):
            assert a == pytest.approx(b, rel=1e-9)


@pytest.mark.parametrize("objective", ["elbo", "iwae", "siwae"])
@pytest.mark.parametrize("mixture", ["poe", "moe", "mopoe"])
def test_the_terms_have_the_gradient_of_the_loss(mixture, objective):
    vae, x, present, found = make(mixture, objective), batch(), absences(), []
    for loss in (lambda: vae.loss(x, present), lambda: sum(vae.terms(x, present).values())):
        torch.manual_seed(2)
        found.append(grads(vae, loss()))
    assert_same(*found)


# torch.compile itself uses what torch calls deprecated
@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch", "ignore::FutureWarning:torch", "ignore:.*should not be instantiated")
@pytest.mark.parametrize(
    "mixture, objective, letters, absent", [("moe", "iwae", "", False), ("moe", "siwae", "pqs", True), ("poe", "elbo", "", False)]
)
def test_one_graph_under_torch_compile(mixture, objective, letters, absent):
    """Of two modalities: compiling takes most of the time of these tests. Where nothing is missing a mean within the logarithm is taken in another way."""
    names = ("image", "text")
    vae = make(mixture, objective, samples=2, blocks=letters, resolver=mf.MGDA if letters else None, names=names)
    x = batch(names=names)
    present = {"text": absences()["text"]} if absent else None
    torch.manual_seed(3)
    expected = grads(vae, vae.loss(x, present))
    torch._dynamo.reset()
    compiled = torch.compile(vae.loss, fullgraph=True, backend="aot_eager")
    torch.manual_seed(3)
    assert_same(grads(vae, compiled(x, present)), expected, rtol=1e-7, atol=1e-9)
