"""64 bits that tell whether two ranks hold the same parameters, in one pass over their memory.

    hash = sum over blocks b of  odd(b) * (sum over the block's 8-byte words)        mod 2^64

Words are added as they lie in memory, so every single flipped bit changes the hash; blocks have odd factors of their own, so
that the same words in another block, or in another tensor, count otherwise. It finds damage, not a forger.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch
from numpy.typing import NDArray

BLOCK_WORDS = 4096
WORD = 8


def parameter_hash(tensors: Iterable[torch.Tensor]) -> int:
    """The hash of plain tensors, in their order. On a device one pass there, and one wait for it per device."""
    total, blocks = 0, 0
    waiting: dict[torch.device, torch.Tensor] = {}
    for tensor in tensors:
        flat = _bytes(tensor)
        if flat.device.type == "cpu":
            sums = _sums(flat.numpy())
            total += int((sums * _factors(blocks, len(sums))).sum(dtype=np.uint64))
            count = len(sums)
        else:
            part, count = _on_device(flat, blocks)
            waiting[flat.device] = part + waiting[flat.device] if flat.device in waiting else part
        blocks += count
    return (total + sum(int(part.item()) for part in waiting.values())) % 2**64


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    """Its bytes, densely, as (n,) of uint8; the memory itself where it lies so already."""
    plain = tensor.detach()
    if plain.is_complex():
        plain = torch.view_as_real(plain)
    return plain.contiguous().reshape(-1).view(torch.uint8)


def _sums(data: NDArray[np.uint8]) -> NDArray[np.uint64]:
    """Of each block of words; what is left at the end counts as a block of its own, filled up with zeros."""
    whole = len(data) // (WORD * BLOCK_WORDS) * WORD * BLOCK_WORDS
    sums: NDArray[np.uint64] = data[:whole].view(np.uint64).reshape(-1, BLOCK_WORDS).sum(1, dtype=np.uint64)
    if whole == len(data):
        return sums
    rest = np.zeros(-(-(len(data) - whole) // WORD) * WORD, np.uint8)
    rest[: len(data) - whole] = data[whole:]
    return np.append(sums, rest.view(np.uint64).sum(dtype=np.uint64))


def _on_device(flat: torch.Tensor, first: int) -> tuple[torch.Tensor, int]:
    """The tensor's share of the hash as a number on its device, and how many blocks it has."""
    size = WORD * BLOCK_WORDS
    padded = torch.nn.functional.pad(flat, (0, -len(flat) % size))
    if padded.data_ptr() % WORD:
        padded = padded.clone()
    sums = padded.view(torch.int64).reshape(-1, BLOCK_WORDS).sum(1)
    factors = torch.from_numpy(_factors(first, len(sums)).view(np.int64)).to(flat.device)
    return (sums * factors).sum(), len(sums)


def _factors(first: int, count: int) -> NDArray[np.uint64]:
    """Odd numbers for blocks first, first + 1, ...: splitmix64 (Steele, Lea, Flood, OOPSLA 2014)."""
    word = (np.arange(first + 1, first + 1 + count, dtype=np.uint64)) * np.uint64(0x9E3779B97F4A7C15)
    word = (word ^ (word >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    word = (word ^ (word >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return (word ^ (word >> np.uint64(31))) | np.uint64(1)
