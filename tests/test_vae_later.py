"""What becomes of a VAE that is changed after it was made."""

import pytest
import torch
from test_vae import batch, vae

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
