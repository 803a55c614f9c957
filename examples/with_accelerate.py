"""Accelerate: one line after `prepare`. `python examples/with_accelerate.py`, or `accelerate launch examples/with_accelerate.py`"""

import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader, TensorDataset
from toy import Model, losses, targets, worst, x

import mmfast as mf

accelerator = Accelerator(cpu=True)
for resolver in (None, mf.IMTLG()):
    model = Model()
    optimizer = torch.optim.Adam(model.parameters(), 5e-2)
    model, optimizer, loader = accelerator.prepare(model, optimizer, DataLoader(TensorDataset(x, targets), batch_size=256))
    if resolver is not None:
        mf.attach(accelerator.unwrap_model(model).heads, resolver)
    for _ in range(40):
        for inputs, labels in loader:
            optimizer.zero_grad()
            accelerator.backward(sum(losses(model(inputs), labels)))
            optimizer.step()
    accelerator.print(f"worst task with {resolver}: {worst(accelerator.unwrap_model(model)):.3f}")
