"""What becomes of a VAE that is changed after it was made."""

import pytest
import torch
from test_vae import batch, hivae, vae

from mmfast.models.vae import VAE


@pytest.mark.parametrize("compiled", [False, True])
def test_dreg_decodes_with_the_parameters_that_were_assigned(compiled, monkeypatch):
    """Loading by assignment gives each of the two decoders tensors of its own."""
    models = [vae("dreg", 4), vae("dreg", 4, seed=1)]
    models[1].load_state_dict({name: t.clone() for name, t in models[0].state_dict().items()}, assign=True)
    if compiled:
        monkeypatch.setattr(VAE, "_decodes", lambda self, *a: self._tie() or self._decode_twice(*a))
    x, seen = batch()
    for model in models:
        optimizer = torch.optim.SGD(model.parameters(), 1e-4)
        for step in range(5):
            torch.manual_seed(step)
            optimizer.zero_grad()
            model.loss(x, seen).backward()
            optimizer.step()
    for name, p in models[0].named_parameters():
        assert torch.equal(p, models[1].get_parameter(name)), name


def test_the_elbo_of_more_samples_is_their_mean():
    model, (x, seen) = vae().eval(), batch()
    model.samples = 500
    torch.manual_seed(0)
    many = model.loss(x, seen)
    model.samples = 1
    assert many.item() == pytest.approx(sum(model.loss(x, seen).item() for _ in range(500)) / 500, rel=0.01)
    model.samples, model.objective = 500, "iwae"
    assert model.loss(x, seen) < 0.97 * many  # which is another bound


@pytest.mark.parametrize("make", [vae, lambda: vae("dreg", 3), hivae])
def test_inputs_of_another_shape_or_kind_are_refused(make):
    model, (x, seen) = make(), batch()
    k, rows = x.shape[1], len(x)
    for given, error, message in [
        ((x[:, 1:], seen[:, 1:]), ValueError, rf"x has shape \({rows}, {k - 1}\), expected \(rows, {k}\): a column for each likelihood"),
        ((x[0], seen[0]), ValueError, rf"x has shape \({k},\), expected \(rows, {k}\)"),
        ((x.expand(2, *x.shape), seen.expand(2, *x.shape)), ValueError, "x has shape"),
        ((x, seen[1:]), ValueError, rf"seen has shape \({rows - 1}, {k}\), expected \({rows}, {k}\) as x"),
        ((x, None), TypeError, rf"seen is a NoneType, expected a tensor \[rows, {k}\]"),
        ((x.numpy(), seen), TypeError, "x is a ndarray"),
        ((x.long(), seen), TypeError, "x is torch.int64, expected floating-point numbers"),
    ]:
        for call in (model.loss, model.reconstruct):
            with pytest.raises(error, match=message):
                call(*given)
