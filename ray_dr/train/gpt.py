"""The demo's program: a small GPT that learns Python from the standard library's own source, byte by byte.

The text is on every machine that runs Python, so nothing is downloaded. `ctx.settings` may change the sizes below.
"""

from __future__ import annotations

import sysconfig
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel

if TYPE_CHECKING:
    from ray_dr.train.context import Context

TEXT_BYTES = 4 * 2**20


class GPT(nn.Module):
    """A decoder-only transformer over bytes (A. Radford et al., 2019). Input (batch, length) int64, output
    (batch, length, 256) logits."""

    def __init__(self, *, width: int, layers: int, heads: int, length: int) -> None:
        super().__init__()
        self.token = nn.Embedding(256, width)
        self.place = nn.Embedding(length, width)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, 256, bias=False)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        hidden = self.token(tokens) + self.place(torch.arange(tokens.shape[1], device=tokens.device))
        for block in self.blocks:
            hidden = block(hidden)
        logits: torch.Tensor = self.head(self.norm(hidden))
        return logits


class Block(nn.Module):
    """Attention and a feed-forward layer, each with its residual."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.mix = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.feed = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        batch, length, width = hidden.shape
        q, k, v = self.mix(self.norm1(hidden)).view(batch, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        seen = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        hidden = hidden + self.out(seen.transpose(1, 2).reshape(batch, length, width))
        result: torch.Tensor = hidden + self.feed(self.norm2(hidden))
        return result


class Text(Sequence[torch.Tensor]):
    """Windows of `length` + 1 bytes of the standard library's sources, side by side: int64 tensors."""

    def __init__(self, length: int, limit: int = TEXT_BYTES) -> None:
        self.length = length
        data = bytearray()
        for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
            data += path.read_bytes()
            if len(data) >= limit:
                break
        self.bytes = torch.frombuffer(data[:limit], dtype=torch.uint8)

    def __len__(self) -> int:
        return (len(self.bytes) - 1) // self.length

    def __getitem__(self, index: Any) -> Any:
        start = index * self.length
        return self.bytes[start : start + self.length + 1].long()


def train(ctx: Context) -> None:
    """Train until `ctx.settings["steps"]` steps are done."""
    size = {"width": 96, "layers": 3, "heads": 4, "length": 128, "batch": 24, "micro_batches": 6, "steps": 200}
    size |= {key: int(value) for key, value in ctx.settings.items() if key in size}
    torch.manual_seed(1)
    model = GPT(width=size["width"], layers=size["layers"], heads=size["heads"], length=size["length"])
    model = model.to(ctx.world.device)
    wrapped = DistributedDataParallel(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=float(ctx.settings.get("lr", 1e-3)))
    data = ctx.data(Text(size["length"]), global_batch=size["batch"], micro_batches=size["micro_batches"])
    state = ctx.restore(model=wrapped, optimizer=optimizer, data=data)
    for batch in ctx.steps(state, until=size["steps"]):
        total = 0.0
        passes = 0
        for micro in ctx.micro_batches(batch):
            tokens = micro.to(ctx.world.device)
            logits = wrapped(tokens[:, :-1])
            loss = functional.cross_entropy(logits.reshape(-1, 256), tokens[:, 1:].reshape(-1))
            loss.backward()  # type: ignore[no-untyped-call]
            total, passes = total + loss.item(), passes + 1
        optimizer.step()
        optimizer.zero_grad()
        ctx.log(loss=total / passes)
