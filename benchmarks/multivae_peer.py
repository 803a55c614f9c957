"""MultiVae's MMVAE (version 1.0.3) with the networks and likelihoods of a model of ours, so that its loss is our "iwae"."""

from benchmarks.providers import Unavailable
from mmfast.models.multimodal import MultimodalVAE


def mmvae(vae: MultimodalVAE, shapes: dict[str, tuple[int, ...]]):  # type: ignore[no-untyped-def]
    """The model; raises Unavailable where MultiVae, or what it needs, is not installed."""
    try:
        from multivae.models import MMVAE, MMVAEConfig
        from multivae.models.base import BaseDecoder, BaseEncoder
        from pythae.models.base.base_utils import ModelOutput
    except (ImportError, RuntimeError) as reason:
        raise Unavailable(f"no multivae: {reason}") from None

    class Encoder(BaseEncoder):
        def __init__(self, network):  # type: ignore[no-untyped-def]
            super().__init__()
            self.network, self.latent_dim = network, vae.latent

        def forward(self, x):  # type: ignore[no-untyped-def]
            mean, std = self.network(x)
            return ModelOutput(embedding=mean, log_covariance=2 * std.log())

    class Decoder(BaseDecoder):
        def __init__(self, network):  # type: ignore[no-untyped-def]
            super().__init__()
            self.network, self.latent_dim = network, vae.latent

        def forward(self, z):  # type: ignore[no-untyped-def]
            return ModelOutput(reconstruction=self.network(z))

    parts = {name: vae.modalities[name] for name in vae.names}
    config = MMVAEConfig(
        n_modalities=len(parts),
        latent_dim=vae.latent,
        input_dims=shapes,
        K=vae.samples,
        prior_and_posterior_dist="normal",
        learn_prior=False,
        loss="iwae_looser",
        uses_likelihood_rescaling=True,
        rescale_factors={name: m.scale for name, m in parts.items()},
        decoders_dist=dict.fromkeys(parts, "laplace"),
        decoder_dist_params={name: {"scale": 0.75} for name in parts},
    )
    model = MMVAE(config, {name: Encoder(m.encoder) for name, m in parts.items()}, {name: Decoder(m.decoder) for name, m in parts.items()})
    model.recon_log_probs["text"] = lambda recon, x: recon * x  # one-hot characters under log-probabilities
    return model
