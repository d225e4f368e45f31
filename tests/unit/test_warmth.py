"""What a worker does before it is ready: once, alone, and without a trace."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import torch
import torch.distributed as dist

from ray_dr.train import collectives
from ray_dr.train.warmth import rehearse


def test_a_rehearsal_leaves_no_group_and_the_same_random_numbers(tmp_path: Path) -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    store = collectives.host_store("127.0.0.1")
    for number in range(2):
        rehearse(store, f"file://{tmp_path}", number=number)
    assert torch.equal(torch.rand(3), expected)
    assert not dist.is_initialized()
    collectives.join(f"127.0.0.1:{store.port}", store, attempt=1, rank=0, world=1, backend="gloo")
    collectives.leave()


def test_nothing_is_left_to_be_imported_by_a_first_step(tmp_path: Path) -> None:
    program = f"""
import sys, torch
import ray_dr.train.session
from ray_dr.train import collectives
from ray_dr.train.warmth import rehearse
from torch.nn.parallel import DistributedDataParallel
torch.use_deterministic_algorithms(False)
store = collectives.host_store("127.0.0.1")
rehearse(store, "file://{tmp_path}", number=0)
before = set(sys.modules)
from ray_dr.stores.open import open_store
open_store("file://{tmp_path}")
collectives.join("", store, attempt=1, rank=0, world=1, backend="gloo")
model = DistributedDataParallel(torch.nn.Linear(4, 4))
for optimizer in (torch.optim.AdamW(model.parameters(), fused=True), torch.optim.SGD(model.parameters())):
    model(torch.ones(1, 4)).sum().backward()
    optimizer.step()
collectives.leave()
print(sorted(set(sys.modules) - before))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=False)
    assert done.stdout == "[]\n", done.stderr
