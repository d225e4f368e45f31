"""`ray-dr why`, as an operator reads it: whole texts for the failures there are, and what it says where it can't know."""

from __future__ import annotations

import dataclasses
import json
import random
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from ray_dr.cli.main import main
from ray_dr.model.checkpoint import VersionId
from ray_dr.model.codec import from_json, to_json
from ray_dr.model.events import (
    FencedOff,
    FirstStep,
    InventoryTaken,
    NodeJoined,
    NodeLost,
    Opened,
    StopRequested,
    Tick,
    WorkerLost,
    WorkerReady,
    WorkerStopped,
)
from ray_dr.model.journal import Decided, JobOpened, Noted, Record, Stepped
from ray_dr.model.signal import FaultKind, Subject, node_of
from ray_dr.recovery.machine import initial
from ray_dr.recovery.why import Account, Ended, Story, tell
from ray_dr.stores.disk import FileStore
from tests.unit import lives, stored_life
from tests.unit.lives import A, B, echo, five_steps, go_on, noted
from tests.unit.stored_life import NAME, write_journal

README = Path(__file__).parents[2] / "README.md"
NOW = 180.0
TIMES = ("at", "since", "began", "changed_at", "retry_at", "deadline", "asked_at", "running_since")


@pytest.fixture(autouse=True)
def utc(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("TZ", "UTC")
    time.tzset()
    yield
    monkeypatch.undo()
    time.tzset()


@pytest.fixture
def ask(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Result]:
    def call(records: list[Record], *options: str, now: float = NOW) -> Result:
        store = FileStore(tmp_path / f"store{len(list(tmp_path.iterdir()))}")
        write_journal(store, records)
        monkeypatch.setattr("ray_dr.cli.why.time.time", lambda: now)
        return CliRunner().invoke(main, ["why", NAME, "--store", store.url, *options])

    return call


def story(records: list[Record]) -> Story:
    told = tell(records)
    assert told is not None
    return told


def only(records: list[Record]) -> Account:
    (account,) = story(records).accounts
    return account


TEXTS = {
    "killed_worker": """
job night, step 6: running since 1970-01-01 00:01:45, last word 1 min 12 s ago
  in all      1 incident, 750 ms without a step, 2 steps lost

incident 1 at 1970-01-01 00:01:45, after step 5: the process of rank 1 (worker b/0.1) ended
  set aside   rank 0 raised after step 5: RuntimeError: Connection closed by peer: only an echo, it lost the connection
              to those that ended
  known by    +0 ms     rank 0 raised after step 5: RuntimeError: Connection closed by peer (exceptions)
              +10 ms    the process of rank 1 ended: its connection closed (supervisor)
              +10 ms    the job's supervisor decided to act
  counts      as a failure of unknown cause, a new step came before it
  tried       +10 ms    a/0.1: the group broke (RuntimeError: Connection closed by peer) at step 5: going on with 2 of 2
                        workers -> free 1 worker from the broken step, look for the newest version
              +20 ms    worker b/0.1 lost (its connection closed) at step 5 is the cause of incident 1; a/0.1: the group
                        broke (RuntimeError: Connection closed by peer) at step 5 is set aside -> start 1 worker on node
                        b
              +60 ms    attempt 2 begins with 1 worker on 1 node from step 3 of attempt 1; going on with 1 of 2 workers:
                        0.5 s expected; waiting for processes that are starting (2 of 2 workers) would take 5.5 s; no
                        survivor's state stands whole at the end of a step
              +760 ms   attempt 2 runs with 1 worker
  cost        750 ms from the failure to the next step: decided 10 ms, survivors out of the step 10 ms, version found
              30 ms, group formed 200 ms, state fetched 200 ms, loaded 100 ms, first step 200 ms
              expected was: shrink, the next step after 500 ms: it took 690 ms
              2 steps lost and done again, in 2.00 s, with the same samples: none lost, none used twice
  to do       nothing, the job got over it; what goes for its kind: start another process in its place; see the worker's
              log for its last words
""",
    "lost_node": """
job night, step 6: running since 1970-01-01 00:01:45, last word 1 min 12 s ago
  in all      1 incident, 800 ms without a step, 2 steps lost

incident 1 at 1970-01-01 00:01:45, after step 5: node b was lost
  set aside   worker a/0.1 raised after step 5: RuntimeError: Connection closed by peer: only an echo, it lost the
              connection to those that ended
  known by    +0 ms     node b is gone: its agent's connection closed (node_gone)
              +20 ms    the job's supervisor decided to act
  counts      as a failure of the infrastructure, a new step came before it
  tried       +20 ms    node b lost (its agent's connection closed) at step 5: going on with 1 of 2 workers -> free 1
                        worker from the broken step, ask the cluster for 2 nodes in all, look for the newest version
              +110 ms   attempt 2 begins with 1 worker on 1 node from step 3 of attempt 1; going on with 1 of 2 workers:
                        0.5 s expected; waiting for the autoscaler (2 of 2 workers) would take 65 s; no survivor's state
                        stands whole at the end of a step
              +810 ms   attempt 2 runs with 1 worker
  cost        800 ms from the failure to the next step: decided 20 ms, survivors out of the step 20 ms, version found
              60 ms, group formed 200 ms, state fetched 200 ms, loaded 100 ms, first step 200 ms
              expected was: shrink, the next step after 500 ms: it took 690 ms
              2 steps lost and done again, in 2.00 s, with the same samples: none lost, none used twice
  to do       nothing, the job got over it; what goes for its kind: go on with the copies on other nodes; take another
              node, not this one again at once
""",
    "hang": """
job night, step 6: running since 1970-01-01 00:02:45, last word 12.2 s ago
  in all      1 incident, 1 min 1 s without a step, 2 steps lost

incident 1 at 1970-01-01 00:01:44, after step 5: rank 1 (worker b/0.1) stopped getting on
  known by    +5.30 s   rank 1 in forward of step 6 for 5.3 s; 1 wait for it (hang)
              +60.0 s   the job's supervisor decided to act
  counts      as a failure of unknown cause, a new step came before it
  tried       +60.0 s   worker b/0.1 does not get on (rank 1 in forward of step 6 for 5.3 s; 1 wait for it) at step 5:
                        going on with 1 of 2 workers -> end worker b/0.1, free 1 worker from the broken step, start 1
                        worker on node b, look for the newest version
              +60.2 s   attempt 2 begins with 1 worker on 1 node from step 3 of attempt 1; going on with 1 of 2 workers:
                        0.5 s expected; waiting for processes that are starting (2 of 2 workers) would take 5.3 s; no
                        survivor's state stands whole at the end of a step
              +60.9 s   attempt 2 runs with 1 worker
  cost        1 min 1 s from the failure to the next step: noticed 5.30 s, let it wait (recovery.hang) 54.7 s, survivors
              out of the step 100 ms, version found 90 ms, group formed 200 ms, state fetched 200 ms, loaded 100 ms,
              first step 200 ms
              expected was: shrink, the next step after 500 ms: it took 690 ms
              2 steps lost and done again, in 2.00 s, with the same samples: none lost, none used twice
  to do       nothing, the job got over it; what goes for its kind: keep the stacks of the ranks named, end them, and
              form the group anew
""",
    "frozen_node": """
job night, step 6: running since 1970-01-01 00:01:47, last word 1 min 11 s ago
  in all      1 incident, 2.30 s without a step, 2 steps lost

incident 1 at 1970-01-01 00:01:44, after step 5: node b froze: nothing came from it over an open connection
  set aside   worker a/0.1 raised after step 5: RuntimeError: Connection closed by peer: only an echo, it lost the
              connection to those that ended
  known by    +1.50 s   node b has said nothing for 1.50 s (suspicion 11) (node_frozen)
              +1.51 s   the job's supervisor decided to act
  counts      as a failure of the infrastructure, a new step came before it
  tried       +1.51 s   node b lost (node b has said nothing for 1.50 s (suspicion 11)) at step 5: going on with 1 of 2
                        workers -> free 1 worker from the broken step, ask the cluster for 2 nodes in all, look for the
                        newest version
              +1.61 s   attempt 2 begins with 1 worker on 1 node from step 3 of attempt 1; going on with 1 of 2 workers:
                        0.5 s expected; waiting for the autoscaler (2 of 2 workers) would take 65 s; no survivor's state
                        stands whole at the end of a step
              +2.31 s   attempt 2 runs with 1 worker
  cost        2.30 s from the failure to the next step: noticed 1.50 s, decided 10 ms, survivors out of the step 50 ms,
              version found 40 ms, group formed 200 ms, state fetched 200 ms, loaded 100 ms, first step 200 ms
              expected was: shrink, the next step after 500 ms: it took 690 ms
              2 steps lost and done again, in 2.00 s, with the same samples: none lost, none used twice
  to do       nothing, the job got over it; what goes for its kind: fence the node so that it can't come back into the
              group, then go on as if it were gone
""",
    "same_error_twice": """
job night, step 5: failed at 1970-01-01 00:01:47
  in all      1 incident, 800 ms without a step, 2 steps lost
  why         worker b/0.1 raised ValueError: shape mismatch at step 5, the second time: the program fails there, so
              submitting it again cannot help
  exit code   3: do not resubmit, it would fail the same way
  to do       mend the program; it fails at this step every time

incident 1 at 1970-01-01 00:01:45, after step 5: rank 1 (worker b/0.1) raised ValueError: shape mismatch
  known by    +0 ms     rank 1 raised after step 5: ValueError: shape mismatch (exceptions)
              +10 ms    the job's supervisor decided to act
  counts      as a failure of unknown cause, a new step came before it
  tried       +10 ms    worker b/0.1 raised ValueError: shape mismatch at step 5: going on with 2 of 2 workers -> free 1
                        worker from the broken step, look for the newest version
              +160 ms   attempt 2 begins with 2 workers on 2 nodes from step 3 of attempt 1; going on with 2 of 2
                        workers: 0.5 s expected; no survivor's state stands whole at the end of a step
              +810 ms   attempt 2 runs with 2 workers
  cost        800 ms from the failure to the next step: decided 10 ms, survivors out of the step 100 ms, version found
              40 ms, group formed 10 ms, state fetched 340 ms, loaded 100 ms, first step 200 ms
              expected was: rebuild, the next step after 500 ms: it took 640 ms
              2 steps lost and done again, with the same samples: none lost, none used twice
  to do       see above: it came again
""",
    "suspended": """
job night, step 5: suspended, waits since 1970-01-01 00:01:45, for 1 min 15 s
  in all      1 incident, 1 min 15 s without a step, 0 steps lost so far
  waits for   2 nodes with a worker up: 1 there; the cluster was asked for 2 in all
  to do       give the cluster 1 node more, or lower workers.min_nodes_to_run to 1 and run it again

incident 1 at 1970-01-01 00:01:45, after step 5: node b was lost
  known by    +0 ms     node b is gone: its agent's connection closed (supervisor)
              +10 ms    the job's supervisor decided to act
  counts      as a failure of the infrastructure, a new step came before it
  tried       +10 ms    node b lost (its agent's connection closed) at step 5: 1 of 2 workers left -> free 1 worker from
                        the broken step, ask the cluster for 2 nodes in all, look for the newest version
              +210 ms   step 3 of attempt 1 can be restored; 1 usable node of the 2 it takes: waiting for capacity
  cost        1 min 15 s without a step so far: decided 10 ms, survivors out of the step 100 ms, version found 90 ms
  to do       see above
""",
}


@pytest.mark.parametrize("name", TEXTS)
def test_the_whole_text_is(name: str, ask: Callable[..., Result]) -> None:
    result = ask(getattr(lives, name)())
    assert result.exit_code == 0, result.output
    assert result.stdout == TEXTS[name].lstrip("\n")


def test_the_readmes_example_is_what_is_said(ask: Callable[..., Result]) -> None:
    (shown,) = re.findall(r"^```\n(incident .*?)```", README.read_text(), re.M | re.S)
    noon = 1_767_268_800.0
    records = [from_json(Record, moved(to_json(record, tagged=True), noon)) for record in lives.frozen_node()]
    said = ask(records, "--incident", "1", now=noon + NOW).stdout
    left = said
    for line in shown.splitlines():
        assert f"{line}\n" in left, line
        left = left.partition(f"{line}\n")[2]
    assert len(shown.splitlines()) >= 5


def moved(value: Any, by: float, key: str = "") -> Any:
    """JSON of a record, some time later."""
    match value:
        case dict():
            return {name: moved(item, by, name) for name, item in value.items()}
        case list():
            return [moved(item, by) for item in value]
        case float() if key in TIMES:
            return value + by
        case _:
            return value


def test_a_job_to_which_nothing_happened_says_so(ask: Callable[..., Result]) -> None:
    said = ask(stored_life.undisturbed()).stdout
    assert said == "job night, step 8: finished at 1970-01-01 00:01:49\n  in all      no incidents\n"


def test_a_job_that_waits_says_for_what_and_since_when(ask: Callable[..., Result]) -> None:
    assert ask(lives.queued()).stdout == (
        "job night, step 0: queued, waits since 1970-01-01 00:01:39, for 1 min 21 s\n"
        "  in all      no incidents\n"
        "  waits for   2 nodes with 1 worker up on each: 1 there; the cluster was asked for 2 in all\n"
        "  to do       give the cluster 1 node more, or lower workers.nodes to 1 and run it again\n"
    )


def test_a_job_whose_processes_do_not_start_points_at_their_logs(ask: Callable[..., Result]) -> None:
    life = stored_life.Life()
    life.open()
    ended = [WorkerLost(99.2 + at, f"a/0.{at}", "a", "exit status 1", 0) for at in (1, 2)]
    life.meet(Opened(99.0, 1, 0), NodeJoined(99.1, "a"), *ended)
    said = " ".join(ask(life.records).stdout.split())
    assert "on node a 2 starts of a worker in a row failed" in said
    assert "look into the workers' logs" in said


def test_waiting_for_capacity_is_a_phase_of_its_own(ask: Callable[..., Result]) -> None:
    said = " ".join(ask(lives.resumed()).stdout.split())
    assert "version found 90 ms, nodes there 59.9 s, group formed 190 ms" in said
    assert "+58.0 s node c joined: 2 nodes now -> start 1 worker on node c" in said


def twice() -> list[Record]:
    """A worker is lost, its place is taken, and a minute later the node of the other goes."""
    life = five_steps()
    life.meet(WorkerLost(105.0, "b/0.1", "b", "its connection closed", 5), WorkerStopped(105.1, "a/0.1", 1, 5),
              WorkerReady(105.1, "b/0.2", "b"), InventoryTaken(105.2, 1, VersionId(1, 3)))  # fmt: skip
    go_on(life, at=105.2, world=2)
    life.meet(NodeLost(160.0, "a", "its agent's connection closed", 6), WorkerStopped(160.1, "b/0.2", 2, 6))
    return life.records


def test_the_newest_comes_in_full_and_the_others_as_a_line(ask: Callable[..., Result]) -> None:
    said = ask(twice()).stdout
    assert said.index("incident 2 at") < said.index("incident 1 at")
    assert said.count("known by") == 1
    assert said.splitlines()[-1] == (
        "incident 1 at 1970-01-01 00:01:45, after step 5: the process of rank 1 (worker b/0.1) ended;"
        " 800 ms without a step, 2 steps lost"
    )
    assert "20.0 s without a step so far" in said
    assert "wait, the job is at it" in said
    alone = ask(twice(), "--incident", "1").stdout
    assert alone.startswith("incident 1 at 1970-01-01 00:01:45, after step 5: the process of rank 1 (worker b/0.1) ended\n")
    assert "incident 2" not in alone
    last = ask(twice(), "--last").stdout
    assert "job night, step 6: recovering" in last
    assert "incident 1" not in last


def test_a_failure_before_the_next_step_cuts_the_one_before_it(ask: Callable[..., Result]) -> None:
    life = five_steps()
    life.meet(
        WorkerLost(105.0, "b/0.1", "b", "closed", 5), WorkerStopped(105.1, "a/0.1", 1, 5), WorkerReady(105.2, "b/0.2", "b"),
        InventoryTaken(105.3, 1, None),
    )  # fmt: skip
    life.records.append(noted(107.0, FaultKind.NODE_FROZEN, Subject("b"), "node b says nothing", since=106.0))
    life.meet(NodeLost(107.0, "b", "node b says nothing", 5))
    first, second = story(life.records).accounts
    assert (first.cut_by, first.over_at, second.cut_by) == (2, None, 0)
    assert (first.diagnosis.kind, first.diagnosis.subjects) == (FaultKind.PROCESS_GONE, (B,))
    assert (second.diagnosis.kind, second.diagnosis.subjects) == (FaultKind.NODE_FROZEN, (Subject("b"),))
    said = " ".join(ask(life.records, "--incident", "1").stdout.split())
    assert "1.00 s until incident 2 came, and no step before it" in said
    assert said.endswith("to do see incident 2")


def test_numbers_count_on_over_supervisors(ask: Callable[..., Result]) -> None:
    life = five_steps()
    life.records += lives.lost_node()[len(life.records) :]
    life.state = initial()
    life.meet(Opened(199.0, 2, 2), NodeJoined(199.1, "a"), NodeJoined(199.1, "c"), WorkerReady(199.2, "a/0.2", "a"),
              WorkerReady(199.2, "c/0.2", "c"), InventoryTaken(199.3, 0, None), FirstStep(199.9, 3, 7),
              NodeLost(200.0, "c", "gone", 7))  # fmt: skip
    born = next(at for at, r in enumerate(life.records) if isinstance(r, Decided) and r.event == Opened(199.0, 2, 2))
    later = [dataclasses.replace(r, term=2) if isinstance(r, Decided) else r for r in life.records[born:]]
    records = [*life.records[:born], JobOpened(199.0, 2, NAME, to_json(life.spec)), *later]
    assert "incident 2 (incident 1 of term 2) at" in ask(records, "--incident", "2", now=200.0).stdout
    refused = ask(records, "--incident", "3")
    assert (refused.exit_code, refused.stdout) == (2, "")
    assert refused.stderr == "ray-dr: --incident: job 'night' has no incident 3 (there are 1 to 2)\n"


@pytest.mark.parametrize(
    ("records", "options", "told"),
    [
        (lives.lost_node, ("--incident", "0"), "job 'night' has no incident 0 (there is only incident 1)"),
        (stored_life.undisturbed, ("--incident", "1"), "job 'night' has no incident 1 (it had none)"),
        (lives.lost_node, ("--incident", "1", "--last"), "it is either --incident N or --last (leave one out)"),
        (lambda: [JobOpened(99.0, 1, NAME, {})], (), "holds no decision (only a job that was run"),
    ],
)  # fmt: skip
def test_bad_input_is_one_line_with_status_2(
    records: Callable[[], list[Record]], options: tuple[str, ...], told: str, ask: Callable[..., Result]
) -> None:
    result = ask(records(), *options)
    assert (result.exit_code, result.stdout) == (2, "")
    assert told in result.stderr
    assert len(result.stderr.splitlines()) == 1


def test_a_job_without_a_journal_and_an_unknown_one_are_bad_input(tmp_path: Path) -> None:
    store = FileStore(tmp_path)
    stored_life.save_checkpoint(store, 4)
    for name, told in ((NAME, "holds no decision"), ("day", "knows no job 'day' (it knows night)")):
        result = CliRunner().invoke(main, ["why", name, "--store", store.url])
        assert result.exit_code == 2
        assert told in result.stderr


def test_json_holds_all_of_it(ask: Callable[..., Result]) -> None:
    told = json.loads(ask(lives.killed_worker(), "--json").stdout)
    assert (told["job"], told["step"], told["standing"]["phase"]) == (NAME, 6, "running")
    (incident,) = told["incidents"]
    assert (incident["number"], incident["term"], incident["kind"], incident["step"]) == (1, 1, "process_gone", 5)
    assert incident["subjects"] == [{"node": "b", "worker": "b/0.1", "rank": 1}]
    assert [(aside["kind"], aside["reason"].partition(" (")[0]) for aside in incident["set_aside"]] == [
        ("collective_broken", "it lost the connection to those that ended")
    ]
    assert [each["after_s"] for each in incident["known_by"]] == pytest.approx([0.0, 0.01, 0.01])
    assert [action["type"] for action in incident["tried"][0]["actions"]] == ["AbortGroup", "TakeInventory"]
    assert incident["without_step_s"] == pytest.approx(sum(incident["phases_s"].values())) == pytest.approx(0.75)
    assert (incident["over"], incident["steps_lost"], incident["charged"]) == (True, 2, True)
    assert incident["samples"] == {"lost": 0, "repeated": 0, "pending": 0}
    failed = json.loads(ask(lives.same_error_twice(), "--json").stdout)["standing"]
    assert {name: failed[name] for name in ("phase", "kind", "exit_code", "resubmit")} == {
        "phase": "failed", "kind": "program_error", "exit_code": 3, "resubmit": False,
    }  # fmt: skip
    waits = json.loads(ask(lives.suspended(), "--json").stdout)["standing"]
    assert (waits["phase"], waits["need"], waits["have"], waits["since"]) == ("suspended", 2, 1, pytest.approx(105.21))


@pytest.mark.parametrize(
    ("event", "code", "told"),
    [
        (StopRequested(110.0, 30.0, "Ctrl-C"), 130, "running it again continues it"),
        (FencedOff(110.0, 7), 3, "nothing here: look at the supervisor that owns the job now"),
    ],
)
def test_an_end_that_is_no_failure_of_a_kind(event: object, code: int, told: str, ask: Callable[..., Result]) -> None:
    life = five_steps(lives.BOTH_NEEDED)
    life.meet(NodeLost(105.0, "b", "gone", 5), WorkerStopped(105.1, "a/0.1", 1, 5), InventoryTaken(105.2, 1, None), event)
    ended = story(life.records).standing
    assert isinstance(ended, Ended)
    assert ended.diagnosis is None
    said = ask(life.records).stdout
    assert f"exit code   {code}: " in said
    assert told in said
    assert "5.01 s until the job ended, and no step before that" in " ".join(said.split())


def test_a_job_that_makes_no_progress_names_the_last_blow_and_may_be_run_again(ask: Callable[..., Result]) -> None:
    life, at = five_steps(), 105.0
    for attempt in range(1, 8):
        number = attempt + 1
        worker = f"b/0.{attempt}"
        life.meet(WorkerLost(at, worker, "b", "killed", 5), WorkerStopped(at + 0.1, "a/0.1", attempt, 5),
                  WorkerReady(at + 0.2, f"b/0.{number}", "b"), InventoryTaken(at + 0.3, attempt, None))  # fmt: skip
        at += 20
        life.meet(Tick(at - 1.0))  # it waits longer and longer before the next attempt
    ended = story(life.records).standing
    assert isinstance(ended, Ended)
    assert ended.diagnosis is not None
    assert (ended.diagnosis.kind, ended.diagnosis.subjects[0].worker) == (FaultKind.PROCESS_GONE, "b/0.7")
    said = " ".join(ask(life.records).stdout.split())
    assert "6 attempts in a row made no new step after step 5; first: worker b/0.1 lost" in said
    assert "exit code 1: running it again continues it to do start another process" in said


def test_a_cause_that_broke_nothing_stands_beside(ask: Callable[..., Result]) -> None:
    records = lives.lost_node()
    at = next(at for at, record in enumerate(records) if isinstance(record, Noted))
    records.insert(at, noted(104.0, FaultKind.NON_FINITE, A, "rank 0: loss is nan in step 4"))
    account = only(records)
    assert account.diagnosis.kind is FaultKind.NODE_GONE
    assert [finding.kind for finding in account.diagnosis.besides] == [FaultKind.NON_FINITE]
    assert "  besides     rank 0: loss is nan in step 4\n" in ask(records).stdout


def test_a_node_that_was_announced_to_go_is_no_lost_node() -> None:
    records = lives.lost_node()
    at = next(at for at, record in enumerate(records) if isinstance(record, Noted))
    words = "node b will be taken away in 30 s (spot)"
    records.insert(at, noted(90.0, FaultKind.PREEMPTION, Subject("b"), words, severity="warning", numbers={"left_s": 30.0}))
    account = only(records)
    assert (account.diagnosis.kind, account.diagnosis.fault.charged) == (FaultKind.PREEMPTION, False)
    assert account.first.evidence == words


def test_what_is_on_trial_or_of_another_version_is_no_witness() -> None:
    records = lives.lost_node()
    at = next(at for at, record in enumerate(records) if isinstance(record, Noted))
    records[at:at] = [
        noted(104.9, FaultKind.NETWORK_CUT, Subject("b"), "node b is cut off", shadow=True),
        Noted(104.9, "finding", {"detector": "new", "kind": "meteorite", "began": 104.0}),
    ]
    account = only(records)
    assert (account.diagnosis.kind, account.first.kind) == (FaultKind.NODE_GONE, FaultKind.NODE_GONE)


def test_a_sample_used_twice_or_lost_in_a_step_done_again_is_said(ask: Callable[..., Result]) -> None:
    records = lives.lost_node()
    for place, record in enumerate(records):
        if isinstance(record, Stepped) and (record.record.attempt, record.record.step) == (2, 5):
            changed = dataclasses.replace(record.record, ranges=((32, 36), (35, 39)))
            records[place] = Stepped(record.at, changed)
    samples = only(records).samples
    assert samples is not None
    assert (samples.lost, samples.repeated, samples.pending) == (1, 1, 0)
    assert "samples lost: 1, used twice: 1" in ask(records).stdout


def test_a_step_that_is_not_done_again_yet_proves_nothing() -> None:
    records = lives.lost_node()
    cut = next(at for at, r in enumerate(records) if isinstance(r, Stepped) and (r.record.attempt, r.record.step) == (2, 5))
    samples = only(records[:cut]).samples
    assert samples is not None
    assert samples.pending == stored_life.BATCH


@pytest.mark.parametrize("seed", range(40))
def test_whatever_happened_there_is_an_answer_and_its_phases_add_up(seed: int, ask: Callable[..., Result]) -> None:
    records = anyhow(random.Random(seed))
    told = story(records)
    for account in told.accounts:
        assert account.began_at <= account.first.at <= account.decided_at
        if account.over_at is not None:
            assert sum(account.spans.values()) == pytest.approx(account.over_at - account.began_at)
    assert [account.number for account in told.accounts] == list(range(1, len(told.accounts) + 1))
    if seed % 8 == 0:
        assert ask(records, now=1e5).exit_code == ask(records, "--json", now=1e5).exit_code == 0


def anyhow(dice: random.Random) -> list[Record]:
    """A life of coming and going, with findings of all kinds, cut anywhere."""
    life, at = five_steps(), 105.0
    for turn in range(dice.randrange(3, 40)):
        at += dice.choice([0.01, 0.3, 2.0, 400.0])
        state = life.state
        node = dice.choice([known.id for known in state.nodes] or ["a"])
        worker = dice.choice([name for known in state.nodes for name in known.ready] or ["a/0.1"])
        if dice.random() < 0.4:
            kind, subject = dice.choice(list(FaultKind)), dice.choice([Subject(node_of(worker), worker, 0), Subject(node)])
            life.records.append(
                noted(at, kind, subject, f"{kind} of {subject}", since=at - dice.choice([0.0, 2.0, 60.0]),
                      stage=dice.choice(["suspected", "confirmed", "withdrawn"]), severity=dice.choice(["warning", "critical"]))
            )  # fmt: skip
        life.meet(dice.choice([
            NodeLost(at, node, "gone", 5), WorkerLost(at, worker, node_of(worker), "closed", 5), echo(at, A)[1],
            WorkerStopped(at, worker, state.attempt, 5), InventoryTaken(at, state.incidents, None), NodeJoined(at, f"n{turn}"),
            WorkerReady(at, f"{node}/0.{turn + 2}", node), FirstStep(at, state.attempt, 6), Tick(at),
        ]))  # fmt: skip
    return life.records[: dice.randrange(10, len(life.records) + 1)]
