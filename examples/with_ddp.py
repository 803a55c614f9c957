"""DistributedDataParallel: `group=` makes the Gramian that of the whole batch. `torchrun --nproc-per-node 2 examples/with_ddp.py`"""

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from toy import Model, losses, targets, worst, x

import mmfast as mf

dist.init_process_group("gloo")
rank, ranks = dist.get_rank(), dist.get_world_size()
for resolver in (None, mf.IMTLG()):
    model = Model()
    parallel = DistributedDataParallel(model)
    if resolver is not None:
        mf.attach(model.heads, resolver, group=dist.group.WORLD)
    optimizer = torch.optim.Adam(model.parameters(), 5e-2)
    for _ in range(40):
        optimizer.zero_grad()
        sum(losses(parallel(x[rank::ranks]), targets[rank::ranks])).backward()
        optimizer.step()
    if rank == 0:
        print(f"worst task with {resolver} on {ranks} processes: {worst(model):.3f}")
dist.barrier()  # no rank ends while another still hears from it
dist.destroy_process_group()
