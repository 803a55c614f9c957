"""Hugging Face's Trainer: one line before it. `python examples/with_trainer.py`"""

import tempfile

import torch
from toy import Model, losses, targets, worst, x
from transformers import Trainer, TrainingArguments

import mmfast as mf


class Returning(Model):
    """Returns its loss, as the Trainer wants it."""

    def forward(self, x: torch.Tensor, labels: torch.Tensor | None = None) -> list[torch.Tensor] | dict:
        outputs = super().forward(x)
        return outputs if labels is None else {"loss": sum(losses(outputs, labels)), "logits": outputs}


data = [{"x": one, "labels": label} for one, label in zip(x, targets, strict=True)]
for resolver in (None, mf.IMTLG()):
    model = Returning()
    if resolver is not None:
        mf.attach(model.heads, resolver)
    with tempfile.TemporaryDirectory() as folder:
        options = {"lr_scheduler_type": "constant", "max_grad_norm": 0, "save_strategy": "no", "report_to": [], "disable_tqdm": True}
        arguments = TrainingArguments(
            folder, num_train_epochs=40, per_device_train_batch_size=256, learning_rate=5e-2, use_cpu=True, **options
        )
        Trainer(model, arguments, train_dataset=data).train()
    print(f"worst task with {resolver}: {worst(model):.3f}")
