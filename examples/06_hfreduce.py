"""HFReduce: one word sends DDP's gradients through gloo or HFReduce.

torchrun --nproc-per-node 2 examples/06_hfreduce.py [gloo|hfreduce]
"""

import sys

import torch
import torch.distributed as dist

dist.init_process_group((sys.argv[1:] or ["hfreduce"])[0])
torch.manual_seed(0)
held_out = torch.randn(512, 64)
model = torch.nn.Sequential(torch.nn.Linear(64, 256), torch.nn.Tanh(), torch.nn.Linear(256, 1))
ddp, optimizer = torch.nn.parallel.DistributedDataParallel(model), torch.optim.AdamW(model.parameters(), lr=1e-3)
torch.manual_seed(1 + dist.get_rank())
for samples in torch.randn(100, 256, 64):
    torch.nn.functional.mse_loss(ddp(samples)[:, 0], samples[:, :8].sum(1)).backward()
    optimizer.step()
    optimizer.zero_grad()
loss = torch.nn.functional.mse_loss(model(held_out)[:, 0], held_out[:, :8].sum(1)).item()
print(f"rank {dist.get_rank()} of {dist.get_world_size()} with {dist.get_backend()}: loss {loss:.6f}")
dist.destroy_process_group()
