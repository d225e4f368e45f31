"""What a rank of a mesh holds is what torch says it holds, for every small size, mesh and order of cuts."""

from __future__ import annotations

import itertools

import pytest
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor._utils import _compute_local_shape_and_global_offset as of_torch
from torch.distributed.tensor.placement_types import _StridedShard

from ray_dr.checkpoint.mesh import Cut, held

MESHES = ((1, 4), (2, 2), (2, 3), (3, 2), (4, 2))


@pytest.mark.parametrize("mesh", MESHES)
@pytest.mark.parametrize("kind", ["one dim twice", "strided", "two dims", "replicas"])
def test_the_box_of_every_rank_is_the_one_torch_gives_it(mesh: tuple[int, int], kind: str) -> None:
    outer, inner = mesh
    placements = {
        "one dim twice": (Shard(0), Shard(0)), "strided": (_StridedShard(0, split_factor=inner), Shard(0)),
        "two dims": (Shard(1), Shard(0)), "replicas": (Replicate(), Shard(1)),
    }[kind]  # fmt: skip
    for rows, coordinate in itertools.product(range(14), itertools.product(range(outer), range(inner))):
        cuts = [Cut(place.dim, size, where, getattr(place, "split_factor", 1))
                for place, size, where in zip(placements, mesh, coordinate, strict=True)
                if not isinstance(place, Replicate)]  # fmt: skip
        found = held((rows, 5), cuts)
        lengths, offsets = of_torch((rows, 5), mesh, list(coordinate), placements)
        if found is None:
            assert kind == "strided"
            assert rows % (outer * inner)
            continue
        assert found[1] == lengths
        if all(lengths):
            assert found[0] == offsets


def test_indices_that_are_not_one_stretch_are_no_box() -> None:
    assert held((8,), [Cut(0, 2, 0, splits=4)]) is None
    assert held((8,), [Cut(0, 2, 0, splits=4), Cut(0, 4, 1)]) == ((2,), (1,))
