"""The benchmarks' front ends and what they sum up; the benchmarks themselves are run by hand."""

from __future__ import annotations

import argparse
import json
import operator
import os
import subprocess
import sys
import threading
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from torch.distributed.checkpoint.api import CheckpointException, _wrap_exception

from benchmarks import (
    alone,
    incremental,
    overhead,
    program,
    ray_train_peer,
    recovery,
    restore,
    restore_plans,
    save,
    save_peers,
    state,
    stores,
)
from benchmarks.kills import Case, Measured
from ray_dr.stores.memory import MemoryStore

ROOT = Path(__file__).parents[2]


FRONT_ENDS = ("recovery", "overhead", "save", "restore", "incremental", "stores", "campaign", "beacon")
ASK = """
import contextlib, io, json, runpy, sys
said = {}
for name in sys.argv[1:]:
    sys.argv = [name, "--help"]
    with contextlib.redirect_stdout(io.StringIO()) as out:
        try:
            runpy.run_module(f"benchmarks.{name}", run_name="__main__")
        except SystemExit as end:
            said[name] = [end.code, out.getvalue()]
print(json.dumps(said))
"""


@pytest.fixture(scope="module")
def helps() -> dict[str, tuple[int, str]]:
    """Exit code and output of each front end with --help; of one process, as what they import takes seconds."""
    command = [sys.executable, "-c", ASK, *FRONT_ENDS]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    found: dict[str, tuple[int, str]] = json.loads(done.stdout)
    return found


@pytest.mark.parametrize("name", FRONT_ENDS)
def test_each_benchmark_says_its_question_when_asked_for_help(name: str, helps: dict[str, tuple[int, str]]) -> None:
    code, said = helps[name]
    assert code == 0
    assert "?" in said
    assert "--quick" in said
    assert "--json" in said


def measured(name: str, first_step: list[float], *, spare: bool = False) -> Measured:
    kind = "worker" if name == "worker" else "node"
    case = Case(name, kind, spare, recovery.SMALL, len(first_step))
    found = Measured(case)
    for seconds in first_step:
        found.add(detected_s=0.1, first_step_s=seconds, steps_lost=2)
    return found


def test_the_last_line_of_recovery_has_the_promised_keys_and_they_are_medians() -> None:
    ours = [measured("worker", [1.0, 3.0, 2.0]), measured("node", [2.0, 2.5, 9.0])]
    theirs = [measured("node", [30.0, 40.0, 50.0]), measured("node, spare", [10.0, 30.0, 12.5], spare=True)]
    found = json.loads(json.dumps(recovery.result(ours, theirs)))
    assert (found["worker_killed_s"], found["node_killed_s"], found["steps_lost"]) == (2.0, 2.5, 2)
    assert found["ray_train_node_killed_s"] == 12.5, "its best case"
    assert found["ratio"] == 5.0


def test_a_case_without_detection_times_still_fits_the_table() -> None:
    found = measured("node", [1.0, 2.0])
    found.detected = [float("nan"), float("nan")]
    assert recovery.row("Ray Train", found)[4] == "-"
    assert recovery.lists(found)["detected_s"] == []


def test_quick_kills_a_worker_and_a_node_at_200_mb_only() -> None:
    quick = recovery.cases(True, 3)
    assert {case.kind for case in quick} == {"worker", "node"}
    assert {case.state_bytes // 10**6 for case in quick} == {201}
    assert {case.state_bytes // 10**6 for case in recovery.cases(False, 5)} == {201, 1007}


def test_overhead_counts_every_second_of_every_round() -> None:
    bare = [overhead.Turn([1.0, 1.0], 2.0), overhead.Turn([1.0, 1.0], 2.0)]
    slower = [overhead.Turn([1.0, 1.0], 2.0), overhead.Turn([1.0, 2.0], 2.2)]
    taken = {overhead.BARE: bare, "off": bare, "memory": slower, "all": slower}
    found = json.loads(json.dumps(overhead.result({"10 MB": taken})))
    assert (found["off_ratio"], found["memory_ratio"], found["all_ratio"], found["step_s"]) == (1.0, 1.25, 1.25, 1.0)
    memory = found["sizes"]["10 MB"]["memory"]
    assert memory["rounds"] == [1.0, 1.5]
    assert memory["cpu_ratio"] == pytest.approx(1.05)


def test_what_is_saved_is_of_every_size_and_of_the_size_asked_for() -> None:
    state = save.make_state(300 * 2**20)
    sizes = sorted(tensor.nbytes for tensor in state.values())
    assert sum(sizes) == pytest.approx(300 * 2**20, rel=1e-3)
    assert sizes[0] < 100_000
    assert sizes[-1] > 10 * 2**20


def test_a_first_save_has_a_figure_of_its_own() -> None:
    def one(stall_s: float) -> dict[str, float]:
        return {"stall_s": stall_s, "durable_s": 1.0, "lost_s": 0.5}

    told = [{"saves": [one(9.0), one(1.0), one(2.0), one(3.0)], "peak_bytes": 10, "cpu_s": 0.1, "alone_s": 0.8, "raw_put_s": 0.0}]
    found = save.sum_up(told)
    assert (found["first_stall_s"], found["stall_s"]) == (9.0, 2.0)


@pytest.mark.parametrize("case", list(incremental.CASES))
def test_a_case_says_how_many_bytes_it_changed(case: str) -> None:
    state, change = incremental.CASES[case](3 * 2**20)
    before = {name: tensor.clone() for name, tensor in state.items()}
    counted = change()
    differing = {name: int((tensor != before[name]).sum()) * tensor.element_size() for name, tensor in state.items()}
    assert counted == sum(differing.values())
    assert sum(tensor.nbytes for tensor in state.values()) >= 3 * 2**20 - 100
    expected = {"everything changed": len(state), "1 % of the tensors": 1, "nothing changed": 0}
    assert sum(map(bool, differing.values())) == expected.get(case, sum(map(bool, differing.values())))


def test_incremental_counts_what_was_put_and_keeps_one_checkpoint(tmp_path: Path) -> None:
    found = list(incremental.saves("1 % of the tensors", 3 * 2**20, 3, tmp_path / "saved"))
    assert len(found) == 3
    assert all(each.changed <= each.sent < 2**21 and 2 <= each.objects <= 3 for each in found)
    summed = incremental.sum_up(found, full_s=1.0)
    assert summed["sent_ratio"] == sum(each.sent for each in found) / sum(each.changed for each in found)
    steps = {path.name for path in (tmp_path / "saved/jobs/save/parts").iterdir()}
    assert len(steps) == 2


class Way:
    """A way to save whose state must not be updated before `fence` was called, and that is durable after two steps."""

    def __init__(self, model: save.Model) -> None:
        self.model, self.said, self.done = model, list[tuple[str, float]](), threading.Event()

    def __getattr__(self, name: str) -> Any:
        return lambda: self.tell(name)

    def tell(self, name: str) -> None:
        """Note the call, with the state's first number as it is then."""
        self.said.append((name, float(self.model["t0000"][0].detach() - self.first)))
        if name == "prepare":
            self.done.clear()
        if [said for said, _ in self.said].count("fence") == 2:
            self.done.set()
        if name == "wait":
            assert self.done.wait(60)

    first = 0.0


def test_a_save_is_between_updates_of_the_whole_state_and_each_update_asks_the_fence_first() -> None:
    model = save.Model(2**20)
    trainer = save.Trainer(model, 2**20)
    way = Way(model)
    way.first = float(model["t0000"][0].detach()) + save.CALM_STEPS
    before = [parameter.detach().clone() for parameter in model.parameters()]
    found = save._one_save(way, trainer)
    assert found["durable_s"] > 0
    order = [said for said in way.said if said[0] != "wait"]
    assert [name for name, _ in order[:4]] == ["prepare", "save", "fence", "fence"]
    assert [value for _, value in order] == pytest.approx([0, 0, *range(len(order) - 2)], abs=1e-3)
    assert all(bool((new > old + save.CALM_STEPS).all()) for new, old in zip(model.parameters(), before, strict=True))


def test_the_peers_recovery_counts_only_steps_done_by_a_whole_group_begun_after_the_kill() -> None:
    def line(rank: int, world: int, entered: float, at: float) -> dict[str, object]:
        return {"kind": "step", "rank": rank, "world": world, "entered": entered, "at": at, "step": 7}

    old = [line(0, 2, 1.0, 11.0), line(1, 2, 1.0, 11.0)]
    half = line(0, 2, 12.0, 13.0)
    assert ray_train_peer.first_whole_step([*old, half], 10.0, 1) is None
    assert ray_train_peer.first_whole_step([*old, half, line(1, 2, 12.0, 14.0)], 10.0, 1) == (7, 14.0, 2)


def test_a_gate_times_the_steps_of_its_turn_only(tmp_path: Path) -> None:
    gate = program.Gate(str(tmp_path), "all", rank=1)
    program.write(tmp_path / "turn", {"name": "all", "round": 0, "steps": 3})
    for _ in range(4):
        gate.enter()
    program.write(tmp_path / "turn", {"name": "all", "round": 1, "steps": 3})
    gate.enter()
    times = json.loads((tmp_path / "all.0.1").read_text())
    assert len(times) == 3
    assert all(seconds >= 0 for seconds in times)


def test_the_contestants_of_stores_move_the_same_bytes_and_their_ratio_is_to_the_fastest_raw_one(tmp_path: Path) -> None:
    pieces = stores.make_pieces(2 * stores.CHUNK_BYTES)
    assert pieces.source(0) != pieces.source(1)
    contestants = {
        stores.OURS: stores.of_store(MemoryStore(), pieces),
        stores.RAW: stores.of_disk(tmp_path, pieces),
        stores.MEMCPY: stores.of_memory(pieces),
    }
    taken = stores.compete(contestants, pieces, 1, 2)
    assert {len(turns.wall_s) for each in taken.values() for turns in each.values()} == {1}
    made = {name: stores.Turns([seconds], [1.0]) for name, seconds in
            ((stores.OURS, 2.0), (stores.PLAIN, 5.0), (stores.TUNED, 1.0), (stores.MEMCPY, 0.1))}  # fmt: skip
    found = json.loads(json.dumps(stores.result({("s3", 4, "put"): made}, 100)))
    assert (found["s3_put_ratio"], found["s3_put_s"], found["s3_raw_put_s"], found["memcpy_s"]) == (0.5, 2.0, 1.0, 0.1)


def test_a_contestant_of_stores_that_gives_other_bytes_is_not_measured() -> None:
    pieces = stores.make_pieces(stores.CHUNK_BYTES)
    liar = {stores.OURS: {"put": stores.nothing, "get": stores.nothing}}
    with pytest.raises(AssertionError, match="other bytes"):
        stores.compete(liar, pieces, 1, 1)


def test_the_last_line_of_restore_has_the_promised_keys_and_ratios_to_its_floors() -> None:
    names = (*restore.FLOORS, restore.MEMCPY, restore.TCP, restore.RAW_GET)
    took = {name: {"wall_s": [2.0, 4.0, 3.0], "cpu_s": [1.0, 1.0, 1.0]} for name in names}
    took[restore.MEMCPY]["wall_s"] = [1.5, 1.5, 9.0]
    for name in restore.FLOORS:
        took[name]["floor_s"] = [1.5]
    worlds = [restore_plans.World(4, 3, kind, [1.0], ratio) for kind, ratio in (("memory", 1.2), ("store", 2.5), ("S3", 1.1))]
    manifests = [restore_plans.Manifests(1, [(0.5, 0.25), (0.5, 0.75)])]
    ways = restore.result(took, {"hashed_ahead_s": [0.2]}, 2**30)
    told = {**ways, **restore.of_worlds(worlds), **restore.of_manifests(manifests)}
    found = json.loads(json.dumps(told))
    assert (found["memory_s"], found["memcpy_s"], found["memory_ratio"]) == (3.0, 1.5, 0.5)
    assert (found["other_world_ratio"], found["other_world_store_ratio"], found["manifest_100k_s"]) == (1.2, 2.5, 1.0)
    assert {"peer_s", "tcp_s", "s3_s", "raw_get_s", "dcp_s3_s"} <= found.keys()
    assert len(list(restore.rows(took, 2**30, {}))) == len(names) - 2, "the fastest of several is no row"


def test_restore_tells_what_was_measured_when_it_was_not_all_and_why_the_rest_failed() -> None:
    took = {name: {"wall_s": [2.0], "cpu_s": [1.0]} for name in (restore.MEMCPY, restore.SAFE_OPEN)}
    took[restore.SAFE_OPEN]["floor_s"] = [1.0]  # that of its group, in which memcpy was faster
    found = restore.result(took, {}, 2**30)
    assert (found["memcpy_s"], found["all"]) == (2.0, took)
    assert not {"memory_s", "memory_ratio", "hashed_ahead_s"} & found.keys()
    rows = list(restore.rows(took, 2**30, {restore.NVRX: "failed: why"}))
    assert [row[0] for row in rows] == [restore.MEMCPY, restore.SAFE_OPEN, restore.NVRX]
    assert (rows[1][-1], rows[2][1]) == ("0.50 of memcpy", "failed: why")


def test_restore_measures_what_fits_into_memory_together_and_each_group_with_its_floors() -> None:
    together, large = restore.divide([*restore.FLOORS], 100.0)
    assert not large
    assert [set(group) for group in together] == [set(restore.WAYS)]
    groups, large = restore.divide([*restore.FLOORS], 5.2)
    assert not large
    assert {name for group in groups for name in group} == set(restore.WAYS)
    assert all(restore.takes(group) <= 5.2 for group in groups)
    for group in groups:
        floors = {floor for name in group if (floor := restore.FLOORS.get(name))}
        assert all(set(restore.SEVERAL[floor]) <= set(group) for floor in floors)
    assert "slots" in {restore.KEEPS[name][0] for name in restore.divide([*restore.FLOORS], 4.2)[1]}


@pytest.mark.parametrize("name", [restore.MEMCPY, restore.TORCH, restore.DCP])
def test_a_way_to_restore_gives_what_the_tensors_held_and_one_that_gives_other_bytes_fails(name: str, tmp_path: Path) -> None:
    with ExitStack() as stack:
        setting = restore.Setting("", tmp_path, 2**20, stack)
        ways = {name: restore.WAYS[name](setting), "liar": restore.Way(lambda: None)}
        failures = restore.compete(ways, setting, 2)
        assert not restore.compete({}, setting, 2)
    assert list(failures) == ["liar"]
    assert "other bytes" in failures["liar"]
    assert len(ways[name].took["wall_s"]) == 2


def test_a_peers_way_to_save_is_told_like_ours(tmp_path: Path) -> None:
    name = "torch.save"
    told = save._measure(name, str(tmp_path), 2**20, 0, 2)
    found = save.sum_up([told])
    assert found["durable_s"] >= found["stall_s"] > 0
    assert len(save.row(name, found, {"memcpy_s": 1.0, "raw_put_s": 1.0}, 2**20)) == len(save.HEAD)


def test_a_way_to_save_that_fails_says_so_in_the_table_and_the_others_count() -> None:
    one = {"stall_s": 1.0, "durable_s": 2.0, "lost_s": 0.5}
    good = save.sum_up([{"saves": [one, one], "peak_bytes": 1, "cpu_s": 0.1, "alone_s": 0.8, "raw_put_s": 0.0}])
    bad = save.sum_up([{"saves": [one, one], "peak_bytes": 1, "cpu_s": 0.1, "alone_s": 0.8, "raw_put_s": 0.0},
                       {"failed": "failed: why"}])  # fmt: skip
    assert bad == {"failed": "failed: why"}
    floor = {"memcpy_s": 1.0, "raw_put_s": 1.0}
    assert save.row("NVRx, fork", bad, floor, 1)[:2] == ["NVRx, fork", "failed: why"]
    found = save.result({"ray_dr": good, "DCP async_save": bad, "DCP async_save, process": good}, floor)
    assert (found["stall_s"], found["dcp_async_stall_s"], found["memcpy_s"]) == (1.0, 1.0, 1.0)
    assert "s3_alone_s" not in found
    assert found["ways"]["DCP async_save"] == bad


@pytest.mark.parametrize(
    ("work", "given", "told"),
    [(operator.truediv, (1, 0), "failed: ZeroDivisionError: division by zero"),
     (os._exit, (7,), "failed: its process ended (7)")],
)  # fmt: skip
def test_work_in_a_process_of_its_own_tells_why_it_failed(work: Any, given: tuple[int, ...], told: str) -> None:
    assert alone.run_alone(work, *given) == {"failed": told}


def test_an_error_is_one_line_that_fits_a_table_and_of_dcps_the_one_that_says_why() -> None:
    assert alone.said(ValueError("a\n| b")) == "failed: ValueError: a / b"
    try:
        raise ValueError("no room")
    except ValueError as error:
        wrapped = CheckpointException("write", {0: _wrap_exception(error)})
    assert alone.said(wrapped) == "failed: CheckpointException: ValueError: no room"


def test_the_processor_time_of_processes_below_is_counted_while_they_live_and_after() -> None:
    burn = "import time\nwhile time.process_time() < 0.3: pass\nprint(flush=True)\ninput()"
    before = save_peers.children_cpu_s()
    with subprocess.Popen([sys.executable, "-c", burn], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
        assert child.stdout is not None
        child.stdout.readline()
        assert save_peers.children_cpu_s() - before > 0.25
        child.communicate(b"\n")
    assert save_peers.children_cpu_s() - before > 0.25


@pytest.mark.parametrize(("text", "size"), [("4 GB", 2**32), ("256MB", 2**28), ("0.5 GB", 2**29)])
def test_a_size_is_said_with_its_unit(text: str, size: int) -> None:
    assert state.size_in_bytes(text) == size
    for bad in ("4", "GB", "0 GB", "4 TB", "-1 GB"):
        with pytest.raises(argparse.ArgumentTypeError, match="as in '4 GB'"):
            state.size_in_bytes(bad)


def test_a_way_whose_module_is_missing_is_left_out_with_a_line_that_says_how_to_get_it() -> None:
    here, lines = state.installed(["torch.save", "a", "b"], {"a": "no_such_module", "b": "no_such_module"})
    assert here == ["torch.save"]
    assert lines == ["left out, as no_such_module is not installed (pip install -e '.[bench]'): a; b"]


def test_a_checkpoint_of_restores_worlds_is_read_whole_by_every_other_world() -> None:
    size = 3 * restore_plans.TENSOR_BYTES
    written = restore_plans.write(size, 2)
    room = memoryview(bytearray(2 * size))
    assert all(restore_plans.read(written, size, world, kind, room) > 0 for world in (1, 3) for kind in ("memory", "store"))
    for world in (1, 3):
        wanted = [box for rank in range(world) for box in restore_plans.held_boxes(size, rank, world)]
        assert sum(box.size for box in wanted) == size


def test_the_long_part_lists_of_restore_tile_their_streams() -> None:
    for lists in (1, 64):
        parts = restore_plans.long_parts(lists)
        assert sum(len(part.chunks) for part in parts) > 0.99 * restore_plans.CHUNKS
        for part in parts:
            ends = [shard.at + shard.box.size for shard in part.shards]
            assert [shard.at for shard in part.shards] == [0, *ends[:-1]]
            assert ends[-1] == part.size == len(part.chunks) * stores.CHUNK_BYTES
