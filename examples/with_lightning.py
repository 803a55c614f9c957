"""Lightning: one line in the module, in its constructor. `python examples/with_lightning.py`"""

import lightning
import torch
from torch.utils.data import DataLoader, TensorDataset
from toy import Model, losses, targets, worst, x

import mmfast as mf


class Module(lightning.LightningModule):
    def __init__(self, resolver: mf.Resolver | None) -> None:
        super().__init__()
        self.model = Model()
        if resolver is not None:
            self.block = mf.attach(self.model.heads, resolver)  # as a part of the module, it is saved and moved with it

    def training_step(self, batch: list[torch.Tensor]) -> torch.Tensor:
        x, targets = batch
        return sum(losses(self.model(x), targets))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), 5e-2)


for resolver in (None, mf.IMTLG()):
    module = Module(resolver)
    trainer = lightning.Trainer(
        max_epochs=40, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False
    )
    trainer.fit(module, DataLoader(TensorDataset(x, targets), batch_size=256))
    print(f"worst task with {resolver}: {worst(module.model):.3f}")
