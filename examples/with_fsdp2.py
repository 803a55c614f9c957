"""FSDP2: the parameters are sharded, the block's tensor is not. `torchrun --nproc-per-node 2 examples/with_fsdp2.py`"""

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from toy import Model, losses, targets, worst, x

import mmfast as mf

dist.init_process_group("gloo")
rank, ranks = dist.get_rank(), dist.get_world_size()
mesh = init_device_mesh("cpu", (ranks,))
for resolver in (None, mf.IMTLG()):
    model = Model()
    for part in (model.encoder, *model.heads, model):
        fully_shard(part, mesh=mesh)
    if resolver is not None:
        mf.attach(model.heads, resolver, group=dist.group.WORLD)
    optimizer = torch.optim.Adam(model.parameters(), 5e-2)
    for _ in range(40):
        optimizer.zero_grad()
        sum(losses(model(x[rank::ranks]), targets[rank::ranks])).backward()
        optimizer.step()
    error = worst(model)  # a call in which all ranks take part
    if rank == 0:
        print(f"worst task with {resolver} on {ranks} processes: {error:.3f}")
dist.barrier()  # no rank ends while another still hears from it
dist.destroy_process_group()
