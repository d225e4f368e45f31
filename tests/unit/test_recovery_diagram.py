from __future__ import annotations

from importlib.resources import files

from ray_dr.model.recovery import Phase
from ray_dr.recovery.diagram import edges, mermaid


def test_the_committed_diagram_is_what_the_machine_does() -> None:
    committed = files("ray_dr.recovery").joinpath("MACHINE.md").read_text()
    assert committed == mermaid(), "run: python -m ray_dr.recovery.diagram > ray_dr/recovery/MACHINE.md"


def test_every_phase_can_be_reached() -> None:
    reached = {there for _, there in edges()} | {"Queued"}
    assert reached == {phase.__name__ for phase in Phase.__args__}
