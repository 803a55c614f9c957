"""Hugging Face's Trainer: a callback that streams what the blocks see into a file. `python examples/with_trainer_monitor.py`, then `mmfast plot run.csv`"""

import tempfile

import torch
from toy import Model, losses, targets, worst, x
from transformers import Trainer, TrainerCallback, TrainingArguments

import mmfast as mf


class Monitor(TrainerCallback):
    def on_train_begin(self, args, state, control, model, **_) -> None:
        self.monitor = mf.Monitor(model, "run.csv", every=10)

    def on_step_end(self, args, state, control, **_) -> None:
        self.monitor.step(state.global_step)

    def on_train_end(self, *_, **__) -> None:
        self.monitor.remove()


class Returning(Model):
    def forward(self, x: torch.Tensor, labels: torch.Tensor) -> dict:  # its loss, as the Trainer wants it
        outputs = super().forward(x)
        return {"loss": sum(losses(outputs, labels)), "logits": outputs}


model = Returning()
block = mf.attach(model.heads, mf.IMTLG())
with tempfile.TemporaryDirectory() as folder:
    quiet = {"lr_scheduler_type": "constant", "max_grad_norm": 0, "save_strategy": "no", "report_to": [], "disable_tqdm": True}
    arguments = TrainingArguments(folder, num_train_epochs=40, per_device_train_batch_size=256, learning_rate=5e-2, use_cpu=True, **quiet)
    data = [{"x": one, "labels": label} for one, label in zip(x, targets, strict=True)]
    Trainer(model, arguments, train_dataset=data, callbacks=[Monitor()]).train()
print(f"worst task: {worst(model):.3f}; wrote run.csv")
