"""Lightning: a callback that streams what the blocks see into a file. `python examples/with_lightning_monitor.py`, then `mmfast plot run.csv`"""

import lightning
import torch
from torch.utils.data import DataLoader, TensorDataset
from toy import Model, losses, targets, worst, x

import mmfast as mf


class Monitor(lightning.Callback):
    def on_train_start(self, trainer, module) -> None:
        self.monitor = mf.Monitor(module, "run.csv", every=10)  # or trainer.logger.experiment, for TensorBoard

    def on_train_batch_end(self, trainer, *_) -> None:
        self.monitor.step(trainer.global_step)

    def teardown(self, trainer, module, stage) -> None:  # comes behind an exception too
        self.monitor.remove()


class Module(lightning.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.model = Model()
        self.block = mf.attach(self.model.heads, mf.IMTLG())

    def training_step(self, batch: list[torch.Tensor]) -> torch.Tensor:
        return sum(losses(self.model(batch[0]), batch[1]))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), 5e-2)


module, quiet = Module(), {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
trainer = lightning.Trainer(max_epochs=40, accelerator="cpu", callbacks=[Monitor()], **quiet)
trainer.fit(module, DataLoader(TensorDataset(x, targets), batch_size=256))
print(f"worst task: {worst(module.model):.3f}; wrote run.csv")
