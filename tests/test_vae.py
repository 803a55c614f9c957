"""The VAE with ELBO, IWAE and DReG, its blocks, and HI-VAE, against the formulas written out."""

import copy
import math

import pytest
import torch
from torch.distributions import Normal as N
from torch.distributions import OneHotCategorical as OneHot
from torch.distributions import kl_divergence
from torch.nn import functional as F

import mmfast as mf
from mmfast import data
from mmfast.data.files import find
from mmfast.data.prepare import prepare
from mmfast.experiments.run import make_model
from mmfast.experiments.settings import settings
from mmfast.models.hivae import HIVAE
from mmfast.models.likelihoods import Bernoulli, Categorical, Joint, LogNormal, Normal, Poisson
from mmfast.models.vae import VAE

LIKELIHOODS = [Normal(), LogNormal(), Categorical(3), Poisson(), Bernoulli(), Normal()]
K, ROWS, HIDDEN, LATENT = len(LIKELIHOODS), 12, 8, 3


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    x = torch.stack(
        [
            torch.randn(ROWS, generator=g),
            torch.randn(ROWS, generator=g).exp(),
            torch.randint(3, (ROWS,), generator=g),
            torch.randint(5, (ROWS,), generator=g),
            torch.randint(2, (ROWS,), generator=g),
            torch.randn(ROWS, generator=g),
        ],
        1,
    ).double()
    seen = (torch.rand(ROWS, K, generator=g) > 0.2).double()
    return x, seen


def joint() -> Joint:
    return Joint(LIKELIHOODS, torch.tensor([0.5, 2.0, 1, 1, 1, 1.5]))


def vae(objective="elbo", samples=1, resolvers=None, seed=0) -> VAE:
    torch.manual_seed(seed)
    model = VAE(joint(), HIDDEN, LATENT, resolvers, objective, samples).double()
    model.encoder[0].p = 0.0  # one forward pass like the other
    return model


def hivae(resolvers=None) -> HIVAE:
    torch.manual_seed(0)
    return HIVAE(joint(), LATENT, 2, 4, resolvers).double()


def gradients(model, loss) -> dict[str, torch.Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys() and a
    for name, value in a.items():
        torch.testing.assert_close(value, b[name], rtol=1e-8, atol=1e-10, msg=name)


def log_weights(model, x, seen, z, mean, std, decode=None):
    """log p(x, z) - log q(z | x), every term by torch.distributions."""
    raw = (decode or model.decoder)(z)
    log_x = (model.joint.log_prob(raw, x.expand(len(z), -1, -1)) * seen).sum(-1)
    return log_x, log_x + N(0.0, 1.0).log_prob(z).sum(-1) - N(mean, std).log_prob(z).sum(-1)


@pytest.mark.parametrize("samples", [1, 5])
def test_elbo_and_iwae(samples):
    x, seen = batch()
    model = vae("elbo" if samples == 1 else "iwae", samples)
    torch.manual_seed(1)
    found = model.loss(x, seen)
    torch.manual_seed(1)
    mean, std = model.posterior(x, seen)
    z = mean + std * torch.randn(samples, *mean.shape, dtype=mean.dtype)
    _, log_w = log_weights(model, x, seen, z, mean, std)
    bound = (log_w.logsumexp(0) - math.log(samples)).sum()
    torch.testing.assert_close(found, -bound)
    assert_same(gradients(model, model.loss(x, seen) * 0 + found), gradients(model, -bound))


def test_dreg_is_the_formula():
    x, seen = batch()
    model = vae("dreg", 4)
    torch.manual_seed(1)
    found = gradients(model, model.loss(x, seen))
    torch.manual_seed(1)
    mean, std = model.posterior(x, seen)
    z = mean + std * torch.randn(4, *mean.shape, dtype=mean.dtype)
    # the decoder: gradient of sum_k w_k log p(x | z_k); the encoder: of sum_k w_k^2 log w_k through z alone
    _, log_w = log_weights(model, x, seen, z, mean.detach(), std.detach())
    weight = log_w.detach().softmax(0)
    model.zero_grad()
    (dz,) = torch.autograd.grad(-(weight.square() * log_w).sum(), z, retain_graph=True)
    log_x, _ = log_weights(model, x, seen, z.detach(), mean, std)
    (-(weight * log_x).sum()).backward()
    z.backward(dz)
    assert_same(found, {name: p.grad for name, p in model.named_parameters() if p.grad is not None})


@pytest.mark.parametrize(("objective", "samples"), [("elbo", 1), ("iwae", 3), ("dreg", 3)])
def test_the_noise_of_a_narrow_posterior_is_not_lost_beside_its_mean(objective, samples, monkeypatch):
    """A std of 1e-6 at a mean of 20, whose next number in float32 is 2e-6 away."""
    noise, found = torch.randn(samples, ROWS, LATENT, generator=torch.Generator().manual_seed(2)).double(), []
    x, seen = batch()
    monkeypatch.setattr(torch, "randn", lambda *shape, dtype, **_: noise.to(dtype))
    for dtype in (torch.float64, torch.float32):
        model = vae(objective, samples).to(dtype)
        with torch.no_grad():
            for p in model.decoder.parameters():
                p.mul_(1e-3)  # of a z so far away they would make everything of the loss
            model.mean.weight.mul_(0)
            model.mean.bias.fill_(20.0)
            model.std.weight.mul_(0)
            model.std.bias.fill_(-14.0)  # softplus of which is 8e-7, and 1e-6 is added
        loss = model.loss(x.to(dtype), seen.to(dtype))
        loss.backward()
        found.append([loss.detach().double(), model.mean.bias.grad.double(), model.std.bias.grad.double()])
    for exact, value in zip(*found, strict=True):
        assert (value - exact).norm() < 1e-4 * exact.norm()


def test_the_value_of_dreg_is_the_iwae_bound():
    x, seen = batch()
    a, b = vae("dreg", 4), vae("iwae", 4)
    b.load_state_dict(a.state_dict(), strict=False)
    values = []
    for model in (a, b):
        torch.manual_seed(1)
        values.append(model.loss(x, seen))
    torch.testing.assert_close(*values)


def test_dreg_of_one_sample_is_the_iwae_gradient_of_the_decoder():
    x, seen = batch()
    a, b = vae("dreg", 1), vae("iwae", 1)
    b.load_state_dict(a.state_dict(), strict=False)
    torch.manual_seed(1)
    found = gradients(a, a.loss(x, seen))
    torch.manual_seed(1)
    expected = gradients(b, b.loss(x, seen))
    assert_same({n: g for n, g in found.items() if "decoder" in n}, {n: g for n, g in expected.items() if "decoder" in n})


@pytest.mark.parametrize(("objective", "samples"), [("elbo", 1), ("iwae", 3), ("dreg", 3)])
def test_a_block_with_sum_changes_nothing(objective, samples):
    x, seen = batch()
    plain = vae(objective, samples)
    block = vae(objective, samples, [mf.Sum() for _ in range(2 if objective == "dreg" else 1)])
    found = []
    for model in (plain, block):
        torch.manual_seed(1)
        found.append(gradients(model, model.loss(x, seen)))
    assert_same(*found)


def test_the_first_weights_do_not_depend_on_the_block():
    a, b = vae(), vae(resolvers=[mf.MGDA()])
    assert_same(dict(a.named_parameters()), dict(b.named_parameters()))


def test_the_block_resolves_where_the_heads_begin():
    x, seen = batch()
    model = vae(resolvers=[mf.IMTLG()])
    torch.manual_seed(1)
    found = gradients(model, model.loss(x, seen))
    torch.manual_seed(1)
    mean, std = model.posterior(x, seen)
    z = mean + std * torch.randn(1, *mean.shape, dtype=mean.dtype)
    y = model.decoder.body(z)
    leaf = y.detach().requires_grad_()
    heads = model.decoder.heads
    raw = F.linear(leaf, heads.weight, heads.bias)
    terms = -(model.joint.log_prob(raw, x.expand(1, -1, -1)) * seen).sum((0, 1))
    grads = [torch.autograd.grad(term, leaf, retain_graph=True)[0] for term in terms]
    resolved = mf.resolve(grads, mf.IMTLG(), preserve_norm=True)
    model.zero_grad()
    y.backward(resolved)
    body = {name: p.grad for name, p in model.named_parameters() if name.startswith("decoder.body")}
    assert_same({n: found[n] for n in body}, body)


def test_each_of_the_blocks_of_dreg_has_its_own_rule():
    rules = [mf.GradNorm(), mf.GradNorm()]
    model = vae("dreg", 2, rules)
    assert model.decoder.heads.resolver is rules[0] and model.through.heads.resolver is rules[1]
    assert model.through.heads.weight is model.decoder.heads.weight
    x, seen = batch()
    model.loss(x, seen).backward()
    first, second = (heads.stats().norms for heads in (model.decoder.heads, model.through.heads))
    assert not torch.allclose(first, second)


def both_dregs(model, x, seen):
    """The gradients through one decode and through two, from the same state of rules and of chance."""
    found = []
    for once in (True, False):
        one = copy.deepcopy(model)
        torch.manual_seed(1)
        if not once:
            one._decodes = one._decode_twice
        found.append(gradients(one, one.loss(x, seen)))
    return found


@pytest.mark.parametrize("rule", [None, mf.Sum, mf.MGDA, mf.GradNorm, mf.PCGrad, mf.IMTLG])
def test_dreg_through_one_decode_is_dreg_through_two(rule):
    """Bit for bit: only the ways back differ, and they are those of two decodes."""
    x, seen = batch()
    once, twice = both_dregs(vae("dreg", 4, rule and [rule(), rule()]), x, seen)
    assert once.keys() == twice.keys() and all(torch.equal(once[name], twice[name]) for name in once)


@pytest.mark.parametrize("name", sorted(data.SETS))
def test_dreg_through_one_decode_on_the_data(name):
    if find(data.SETS[name].file) is None:
        pytest.skip(f"{name} is not here; set MMFAST_DATA")
    parts = prepare(data.load(name), 0)
    for rule in ("none", "MGDA"):
        model = make_model(settings("dreg", name, rule), parts)
        x, seen = parts.train.x[:128], parts.train.seen[:128]
        once, twice = both_dregs(model, x, seen)
        for key, grad in once.items():
            assert (grad - twice[key]).norm() <= 1e-5 * twice[key].norm(), key


def test_dreg_goes_back_again_and_leaves_out_what_is_frozen():
    x, seen = batch()
    model = vae("dreg", 3, [mf.MGDA(), mf.MGDA()])
    model.decoder.body[0].weight.requires_grad_(False)
    model.decoder.heads.bias.requires_grad_(False)
    loss = model.loss(x, seen)
    loss.backward(retain_graph=True)
    first = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    assert "decoder.body.0.weight" not in first and "decoder.heads.bias" not in first and "decoder.body.0.bias" in first
    again = gradients(model, loss)
    assert all(torch.equal(first[name], again[name]) for name in first)
    for p in model.encoder.parameters():
        p.requires_grad_(False)
    gradients(model, model.loss(x, seen))


@pytest.mark.parametrize("held", [math.nan, math.inf, -math.inf, -1.0, -999.0, 1e9, 0.0, 1.0])
@pytest.mark.parametrize("make", [vae, lambda: vae("iwae", 3), lambda: vae("dreg", 3), hivae], ids=["elbo", "iwae", "dreg", "hivae"])
def test_a_missing_cell_has_no_influence(make, held):
    """Whatever it holds: a mark such as -1 or NaN, too."""
    x, seen = batch()
    other = torch.where(seen > 0, x, held)
    first, found, values = make(), [], []
    for cells in (x, other):
        model = copy.deepcopy(first)  # a batch norm that has seen neither
        torch.manual_seed(1)
        loss = model.loss(cells, seen)
        found.append(gradients(model, loss))
        values.append((loss, *model.reconstruct(cells, seen)))
    assert all(torch.equal(a, b) for a, b in zip(*values, strict=True)) and values[0][0].isfinite()
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])
    assert (values[0][2][seen == 0] == 0).all() and (values[0][2][seen == 1] != 0).all()


def test_reconstruction_does_not_depend_on_the_other_rows():
    x, seen = batch()
    for model in (vae(), hivae()):
        whole, _ = model.reconstruct(x, seen)
        part, _ = model.reconstruct(x[:3], seen[:3])
        torch.testing.assert_close(part, whole[:3])
        assert model.training


def test_the_inputs_of_hivae():
    x, seen = batch()
    model = hivae()
    found = model.inputs(x, torch.ones_like(seen))
    w = model.joint.w
    numbers = [w[0] * x[:, 0], w[5] * x[:, 5], w[1] * x[:, 1].log(), x[:, 3].log1p()]
    expected = torch.cat([torch.stack(numbers, 1), F.one_hot(x[:, 2].long(), 3), F.one_hot(x[:, 4].long(), 2)], 1)
    torch.testing.assert_close(found, expected)
    assert (model.inputs(x, seen)[:, :4][seen[:, [0, 5, 1, 3]] == 0] == 0).all()
    assert (model.inputs(x, seen)[:, 4:].sum(1) == seen[:, [2, 4]].sum(1)).all()


def test_the_heads_of_hivae_read_y_for_their_first_parameter_alone():
    model = hivae()
    outer, inner = model.z_heads.parametrizations.weight.original0, model.z_heads.parametrizations.weight.original1
    z, s = torch.randn(ROWS, LATENT, dtype=torch.float64), F.one_hot(torch.arange(ROWS) % 4, 4).double()
    expected, row = [], 0
    for d, part in enumerate(LIKELIHOODS):
        y = z @ inner[2 * d : 2 * d + 2].T  # y_d
        for output in range(part.n_outputs):
            value = s @ model.s_heads.weight[row] + model.z_heads.bias[row]
            if output == 0 or isinstance(part, Categorical):
                value = value + y @ outer[row, 2 * d : 2 * d + 2]
            expected.append(torch.zeros_like(value) if output == 0 and isinstance(part, Categorical) else value)
            row += 1
    torch.testing.assert_close(model.decode(z, s), torch.stack(expected, 1))


def test_hivae_is_the_bound():
    x, seen = batch()
    model = hivae()
    model.set_epoch(40)
    assert model.tau == pytest.approx(0.6)
    torch.manual_seed(1)
    found = model.loss(x, seen)
    torch.manual_seed(1)
    h = model.inputs(x, seen)
    log_q = model.to_s(h).log_softmax(-1)
    s = F.gumbel_softmax(log_q, 0.6)
    mean, std = model.to_mean(torch.cat([h, s], -1)), model.to_log_std(torch.cat([h, s], -1)).exp()
    z = mean + std * torch.randn_like(mean)
    log_x = (model.joint.log_prob(model.decode(z, s), x) * seen).sum()
    log_z = N(model.prior(s), 1.0).log_prob(z).sum() - N(mean, std).log_prob(z).sum()
    kl_s = kl_divergence(OneHot(logits=log_q), OneHot(torch.full_like(log_q, 1 / 4))).sum()
    torch.testing.assert_close(found, -(log_x + log_z - kl_s))


def test_the_temperature_falls_to_a_thousandth():
    model = hivae()
    taus = []
    for epoch in (0, 50, 99, 100, 5000):
        model.set_epoch(epoch)
        taus.append(model.tau)
    assert taus == pytest.approx([1, 0.5, 0.01, 1e-3, 1e-3])


def test_the_two_blocks_of_hivae():
    x, seen = batch()
    rules = [mf.IMTLG(), mf.IMTLG()]
    plain, block = hivae(), hivae(rules)
    block.load_state_dict(plain.state_dict(), strict=False)
    z = torch.randn(ROWS, LATENT, dtype=torch.float64, requires_grad=True)
    s = torch.rand(ROWS, 4, dtype=torch.float64).softmax(-1).requires_grad_()
    raw = plain.decode(z, s)
    terms = -(plain.joint.log_prob(raw, x) * seen).sum(0)
    grads = [torch.autograd.grad(term, (z, s), retain_graph=True) for term in terms]
    expected = [mf.resolve([g[i] for g in grads], mf.IMTLG(), preserve_norm=True) for i in range(2)]
    loss = -(block.joint.log_prob(block.decode(z, s), x) * seen).sum()
    found = torch.autograd.grad(loss, (z, s))
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-10)


def test_every_row_of_a_binary_feature_learns():
    x, seen = batch()
    model = hivae()
    raw = model.decode(torch.randn(ROWS, LATENT, dtype=torch.float64), F.one_hot(torch.arange(ROWS) % 4, 4).double())
    raw.retain_grad()
    (-(model.joint.log_prob(raw, x) * torch.ones_like(seen)).sum()).backward()
    column = sum(model.joint.sizes[:4])
    assert (raw.grad[:, column] != 0).all() and (raw[:, column] != 0).all()


def test_training_lowers_the_loss():
    x, seen = batch()
    for model in (vae(resolvers=[mf.PCGrad()]), vae("dreg", 3, [mf.MGDA(), mf.MGDA()]), hivae([mf.MGDA(), mf.MGDA()])):
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
        _, before = model.reconstruct(x, seen)
        for _ in range(150):
            optimizer.zero_grad()
            model.loss(x, seen).backward()
            optimizer.step()
        _, after = model.reconstruct(x, seen)
        assert (after * seen).sum() > (before * seen).sum() + 0.2 * seen.sum()


@pytest.mark.parametrize("make", [vae, hivae])
def test_everything_moves_with_the_model(make):
    x, seen = (t.to("meta") for t in batch())
    assert make().to("meta").loss(x, seen).device.type == "meta"


def test_bad_arguments():
    with pytest.raises(ValueError, match="objective is 'vae', expected one of elbo, iwae, dreg"):
        vae("vae")
    with pytest.raises(ValueError, match="samples is 2, expected 1 for the ELBO"):
        vae("elbo", 2)
    with pytest.raises(ValueError, match="resolvers has 1 rules, expected 2 for 'dreg'"):
        vae("dreg", 2, [mf.MGDA()])
    with pytest.raises(ValueError, match="resolvers has 1 rules, expected 2, for the blocks at z and at s"):
        hivae([mf.MGDA()])
    for rules in (mf.MGDA(), "mgda", mf.MGDA):
        with pytest.raises(TypeError, match=r"resolvers is .*, expected a list with a rule for each block, such as \[mf.PCGrad\(\)\]"):
            vae("elbo", 1, rules)
        with pytest.raises(TypeError, match="expected a list with a rule for each block"):
            hivae(rules)
    with pytest.raises(TypeError, match=r"joint is a list, expected a Joint"):
        VAE([Normal()], 4, 1)
    with pytest.raises(TypeError, match=r"joint has \[Gamma\(\)\]; .* for Normal, LogNormal, Poisson, Bernoulli and Categorical alone"):
        HIVAE(Joint([mf.models.likelihoods.Gamma()]))


@pytest.mark.parametrize("make", [vae, hivae])
def test_what_is_seen_may_be_bool(make):
    x, seen = batch()
    model = make().eval()
    for found, expected in zip(model.reconstruct(x, seen > 0), model.reconstruct(x, seen), strict=True):
        assert torch.equal(found, expected)
