"""What a process does once in its life and only when it is first needed, done before it counts as ready.

The first process group, the first DDP model, backward pass and optimizer step load libraries and start threads, and with a GPU
make a context: tenths of a second on a CPU, seconds on a GPU. A worker that takes a lost one's place would spend them while all
others wait. So each makes a step of a tiny model, alone, in a group of one.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import nn
from torch._C._distributed_c10d import TCPStore
from torch.nn.parallel import DistributedDataParallel

from ray_dr.stores.open import open_store
from ray_dr.train import collectives
from ray_dr.train.state import Flattener

WIDTH = 8


def rehearse(own: TCPStore, store_url: str, *, number: int) -> None:
    """Make one step, and leave nothing behind: no group, no changed random numbers. Raises RuntimeError where the machine
    can't, e.g. a GPU that lets one process in at a time.

    own        this process's rendezvous store
    store_url  of the job: its library is loaded, it is not asked anything
    number     of the process on its node: with several GPUs in sight, processes choose different ones
    """
    open_store(store_url)
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", number % torch.cuda.device_count()) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    backend = "cpu:gloo,cuda:nccl" if cuda else "gloo"
    with torch.random.fork_rng(devices=[device] if cuda else []):
        collectives.join("", own, attempt=0, rank=0, world=1, backend=backend)
        try:
            _step(device)
        finally:
            collectives.leave()
    if cuda:
        torch.cuda.empty_cache()


def _step(device: torch.device) -> None:
    model = DistributedDataParallel(nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.ReLU()).to(device))
    for fused in (False, True):
        optimizer = torch.optim.AdamW(model.parameters(), fused=fused)
        model(torch.ones(1, WIDTH, device=device)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        Flattener(0, 1).flatten({"model": model, "optimizer": optimizer})
    dist.all_reduce(torch.ones(1, device=device))
