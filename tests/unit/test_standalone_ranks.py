"""Saving and loading with several real ranks and no cluster: sharded, at another world size, all or nothing everywhere."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from click.testing import CliRunner
from torch import nn

import ray_dr
from ray_dr.cli.main import main
from ray_dr.errors import RayDrError
from ray_dr.train.context import Context
from ray_dr.train.state import bytes_of
from tests.unit.train_programs import RankError, Ranks, digest, network, optimizer_of, whole_tensors, wrap

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ranks]:
    started = Ranks(3, f"file://{tmp_path_factory.mktemp('unused')}")
    yield started
    started.close()


def trained(ctx: Context, seed: int) -> dict[str, Any]:
    """A sharded model (or, on one rank, as `kind` says) and its optimizer after a step that depends on the seed."""
    model = network()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(seed)
    sharded = wrap(model, str(ctx.settings.get("kind", "fsdp")))
    optimizer = optimizer_of(sharded, "adamw")
    torch.manual_seed(seed)
    sharded(torch.randn(4, 6)).square().sum().backward()
    optimizer.step()
    return {"model": sharded, "optimizer": optimizer, "epoch": seed, "mine": {"a": torch.full((2,), float(seed))}}


def save(ctx: Context) -> dict[str, bytes]:
    objects = trained(ctx, 2)
    saved = ray_dr.save(objects, str(ctx.settings["url"]), step=7)
    assert (saved.step, saved.attempt) == (7, 1)
    return tensors_of(ctx, objects)


def load(ctx: Context) -> tuple[dict[str, bytes], int]:
    objects = trained(ctx, 3)
    assert ray_dr.load(objects, str(ctx.settings["url"])) == 7
    assert objects["mine"]["a"].tolist() == [2, 2]
    return tensors_of(ctx, objects), objects["epoch"]


def tensors_of(ctx: Context, objects: dict[str, Any]) -> dict[str, bytes]:
    return whole_tensors(ctx, {"model": objects["model"], "optimizer": objects["optimizer"]})


def test_what_two_ranks_saved_one_and_three_load(ranks: Ranks, tmp_path: Path) -> None:
    url = f"file://{tmp_path}/store"
    before = ranks.play(2, save, url=url)
    for world, kind in ((1, "ddp"), (1, "fsdp"), (3, "fsdp"), (2, "ddp")):
        for found, epoch in ranks.play(world, load, url=url, kind=kind):
            assert digest(found) == digest(before[0])
            assert epoch == 2
    told = CliRunner().invoke(main, ["restore", "main", "--store", url, "--to", str(tmp_path / "out.safetensors")])
    assert told.exit_code == 0, told.output


def save_behind(ctx: Context) -> list[float]:
    """Saves in the background while the group sums, three times; what the middle save kept."""
    weight = torch.zeros(1000)
    for step in range(3):
        weight.fill_(step)
        saving = ray_dr.save_async({"w": weight}, str(ctx.settings["url"]), step=step)
        for _ in range(20):
            dist.all_reduce(weight)
    saving.wait(60)
    ray_dr.load({"w": weight}, str(ctx.settings["url"]), step=1)
    return sorted(set(weight.tolist()))


def test_saving_in_the_background_does_not_mix_with_the_programs_collectives(ranks: Ranks, tmp_path: Path) -> None:
    assert ranks.play(3, save_behind, url=f"file://{tmp_path}/store") == [[1.0]] * 3


def one_fails(ctx: Context) -> list[str]:
    """What each rank hears when rank 1 cannot take part; and afterwards all goes well."""
    url, heard = str(ctx.settings["url"]), []
    odd = ctx.world.rank == 1
    weight = torch.zeros(4 if odd else 3)
    ray_dr.save({"w": torch.ones(3)}, url, step=1)
    attempts = (
        lambda: ray_dr.save({"w": object() if odd else weight}, url, step=2),
        lambda: ray_dr.save({"w": weight}, url, step=3 if odd else 2),
        lambda: ray_dr.load({"w": weight}, url),
    )
    for attempt in attempts:
        try:
            attempt()
        except RayDrError as error:
            heard.append(f"{type(error).__name__}: {error}")
    assert not weight.any()
    ray_dr.save({"w": torch.ones(3)}, url)
    return heard


def test_an_error_on_one_rank_is_an_error_on_all_and_nothing_changes(ranks: Ranks, tmp_path: Path) -> None:
    first, second = ranks.play(2, one_fails, url=f"file://{tmp_path}/store")
    assert first[0].startswith("CheckpointError: rank 1 could not go on: UnsupportedState: w: a object cannot")
    assert second[0].startswith("UnsupportedState: w: a object cannot be stored")
    assert all(told[1].startswith("ConfigError: the ranks asked for different saves") for told in (first, second))
    assert first[2].startswith("CheckpointError: rank 1 could not go on: IncompatibleState")
    assert second[2].startswith("IncompatibleState")


def apart(ctx: Context) -> None:
    """Each rank has a store of its own under the same name."""
    ray_dr.save({"w": torch.ones(3 + ctx.world.size)}, f"memory://{ctx.settings['url']}")


def test_ranks_that_do_not_share_the_store_cannot_commit(ranks: Ranks, tmp_path: Path) -> None:
    with pytest.raises(RankError, match=r"does not hold what ranks \[1\] put there.*use a store that all ranks share"):
        ranks.play(2, apart, url=tmp_path.name)


def save_dcp(ctx: Context) -> dict[str, bytes]:
    objects = trained(ctx, 2)
    dcp.save({"model": objects["model"].state_dict()}, checkpoint_id=str(ctx.settings["url"]))
    return tensors_of(ctx, objects)


def test_what_two_ranks_saved_with_dcp_comes_in_to_the_bit(ranks: Ranks, tmp_path: Path) -> None:
    before = ranks.play(2, save_dcp, url=str(tmp_path / "theirs"))[0]
    url = f"file://{tmp_path}/store"
    told = CliRunner().invoke(main, ["import", str(tmp_path / "theirs"), "--store", url])
    assert told.exit_code == 0, told.output
    model: nn.Module = network()
    ray_dr.load({"model": model}, url)
    for key, value in model.state_dict().items():
        assert bytes(bytes_of(value)) == before[f"model/{key}"]


