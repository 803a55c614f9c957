"""MultiVae's MMVAE on pairs of 28 x 28 pictures, as it stands: one line puts a block at each latent. `python examples/with_multivae.py`"""

import torch
from multivae.data.datasets.base import MultimodalBaseDataset
from multivae.models import MMVAE, MMVAEConfig

import mmfast as mf

torch.manual_seed(0)
torch.set_num_threads(1)
code = torch.randn(64, 4)  # what the two pictures of a pair have in common
pictures = {
    name: contrast * torch.sigmoid(2 * code @ torch.randn(4, 784)).view(-1, 1, 28, 28) for name, contrast in (("bright", 1), ("faint", 0.1))
}
data = MultimodalBaseDataset(pictures)
model = MMVAE(MMVAEConfig(n_modalities=2, input_dims={name: (1, 28, 28) for name in pictures}, latent_dim=4, K=1))

out = model(data, detailed_output=True)  # where does what the pictures teach meet?
terms = {name: -sum(model.recon_log_probs[name](recon[name], x).sum() for recon in out.recon.values()) for name, x in pictures.items()}
print(mf.find_blocks(terms, model))

block = mf.attach(model.decoders, mf.IMTLG())
optimizer = torch.optim.Adam(model.parameters(), 1e-3)
for step in range(21):
    optimizer.zero_grad()
    loss = model(data).loss
    loss.backward()
    optimizer.step()
    if step % 20 == 0:
        print(
            f"loss {loss:.0f}, weights of the decoders' gradients:",
            ", ".join(f"{name} {w:.2f}" for name, w in zip(block.names, block.stats().weights)),
        )
