"""Transcripts of lives: what is in the text files is what the machine does, word for word.

A file gives a policy and events (`> Event field=value ...`); below each event stand the state, the actions, the reason.
After a wanted change of behaviour: REWRITE_SCENARIOS=1 pytest tests/scenarios, and read the diff.
"""

from __future__ import annotations

import dataclasses
import os
import shlex
from enum import Enum
from pathlib import Path
from typing import Any, get_type_hints

import pytest

from ray_dr.model import events
from ray_dr.model.actions import Action
from ray_dr.model.checkpoint import VersionId
from ray_dr.model.events import Event
from ray_dr.model.recovery import Group, Policy, Standing, State
from ray_dr.recovery.invariants import check
from ray_dr.recovery.machine import initial, step

SCENARIOS = sorted(Path(__file__).parent.glob("*.txt"))


@pytest.mark.parametrize("path", SCENARIOS, ids=lambda path: path.stem)
def test_the_machine_does_what_the_transcript_says(path: Path) -> None:
    written = path.read_text()
    played = play(written)
    if os.environ.get("REWRITE_SCENARIOS") == "1":
        path.write_text(played)
        return
    assert played == written


def test_there_are_transcripts() -> None:
    assert len(SCENARIOS) >= 12


def play(text: str) -> str:
    """The transcript with the answers the machine gives."""
    out, state, policy = [], initial(), Policy(1, 1, 1, 1, 15.0, 300.0, 1.0, 5)
    for line in text.splitlines():
        if line.startswith("#"):
            out.append(line)
        elif line.startswith("policy "):
            policy = _read(Policy, line.removeprefix("policy "))
            out += [line, ""]
        elif line.startswith("> "):
            name, _, rest = line.removeprefix("> ").partition(" ")
            event: Event = _read(getattr(events, name), rest)
            decision = step(state, event, policy)
            check(state, event, decision, policy)
            unchanged = decision.state is state
            state = decision.state
            out += [line, f"  state    {'unchanged' if unchanged else _state(state)}"]
            out += [f"  action   {_action(action)}" for action in decision.actions]
            out += [f"  because  {decision.reason}", ""]
        else:
            assert not line or line.startswith("  "), f"what is this: {line!r}"
    return "\n".join(out).rstrip("\n").replace("\npolicy", "\n\npolicy", 1) + "\n"


def _read(kind: Any, text: str) -> Any:
    hints = get_type_hints(kind)
    given = dict(word.split("=", 1) for word in shlex.split(text))
    return kind(**{name: _value(hints[name], value) for name, value in given.items()})


def _value(hint: Any, text: str) -> Any:
    if hint is bool:
        return {"yes": True, "no": False}[text]
    if hint in (int, float, str):
        return hint(text)
    if hint == tuple[str, ...]:
        return tuple(text.split(","))
    if hint == tuple[int, ...]:
        return tuple(map(int, text.split(",")))
    if isinstance(hint, type) and issubclass(hint, Enum):
        return hint(text)
    if hint is Group:
        attempt, members, restore = text.split(":", 2)
        return Group(int(attempt), tuple(members.split(",")), _version(restore))
    return _version(text)


def _version(text: str) -> VersionId | None:
    if text == "none":
        return None
    attempt, at_step = text.split("@")
    return VersionId(int(attempt), int(at_step))


def _state(state: State) -> str:
    shown = [type(state.phase).__name__]
    for field in dataclasses.fields(state.phase):
        value = getattr(state.phase, field.name)
        if field.name not in ("group", "since", "incident", "deadline", "began") and value not in (None, False, ()):
            shown.append(f"{field.name}={_plain(value)}")
    group = getattr(state.phase, "group", None)
    incident = getattr(state.phase, "incident", None)
    if group:
        shown.append(_plain(group))
    if incident:
        shown.append(f"incident {incident.number} ({incident.kind.value}, {incident.subject})")
    nodes = " ".join(f"{node.id}[{' '.join([*node.ready, *['...'] * node.starting])}]" for node in state.nodes)
    leaving = f" | leaving: {', '.join(departure.node for departure in state.departures)}" if state.departures else ""
    return f"{' '.join(shown)} | {nodes or 'no nodes'} | step {state.step}{leaving}"


def _action(action: Action) -> str:
    values = (f"{field.name}={_plain(getattr(action, field.name))}" for field in dataclasses.fields(action))
    return f"{type(action).__name__} {' '.join(values)}"


def _plain(value: Any) -> str:
    match value:
        case VersionId(attempt, at_step):
            return f"{attempt}@{at_step}"
        case Standing(worker, at_step, twins):
            return f"{worker}@{at_step}{f' of {twins}' if twins else ''}"
        case Group(attempt, members, restore):
            return f"attempt {attempt} of {', '.join(members)} from {_plain(restore) if restore else 'scratch'}"
        case tuple():
            return ",".join(map(_plain, value))
        case bool():
            return "yes" if value else "no"
        case _:
            return str(value)
