"""Eight models with a block each, trained in one process: their parameters are stacked, torch.func.vmap runs them at once, and one call of the solver serves all."""

import copy

import torch
from torch import nn
from torch.func import functional_call, stack_module_state

import mmfast as mf

torch.manual_seed(0)
MODELS, x = 8, torch.randn(64, 20)
targets = torch.stack([(x @ torch.randn(20, 3)).sin() for _ in range(3)])  # of three tasks
models = [
    nn.Sequential(nn.Linear(20, 64), nn.Tanh(), mf.ImpartialityBlock([nn.Linear(64, 3) for _ in range(3)], mf.MGDA()))
    for _ in range(MODELS)
]
params, buffers = stack_module_state(models)  # [8, ...]
frame = copy.deepcopy(models[0]).to("meta")  # one model's code, without its numbers
optimizer = torch.optim.Adam(params.values(), lr=1e-2)


def loss(params: dict[str, torch.Tensor], buffers: dict[str, torch.Tensor]) -> torch.Tensor:
    outputs = functional_call(frame, (params, buffers), (x,))
    return torch.stack([(y - t).square().mean() for y, t in zip(outputs, targets, strict=True)])


for step in range(100):
    optimizer.zero_grad()
    losses = torch.vmap(loss)(params, buffers)  # [8, 3]
    losses.sum().backward()
    optimizer.step()
print("the worst task of each model:", losses.max(1).values.tolist())
