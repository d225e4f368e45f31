"""What a job's owner may say of its detectors, and what each detector says of itself."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from ray_dr import config
from ray_dr.actors import sensing
from ray_dr.detection.detectors import DETECTORS, Detection
from ray_dr.errors import ConfigError
from ray_dr.model import job
from ray_dr.model.job import Detecting
from ray_dr.model.signal import Closed, Exit, FaultKind, Report
from tests.unit.test_sensing import staged


def test_a_job_knows_the_names_of_all_detectors() -> None:
    assert sorted(detector().name for detector in DETECTORS) == sorted(job.DETECTORS)


@pytest.mark.parametrize("detector", DETECTORS)
def test_every_detector_states_how_often_it_is_wrong(detector: type) -> None:
    assert "False alarms" in (detector.__doc__ or "")


def test_detectors_are_put_on_trial_or_off_in_the_yaml() -> None:
    assert config.parse("job: x").detection == Detecting()
    text = "job: x\ndetection: {shadow: [hang, straggler, hang], off: [loss_spike], preflight: false}"
    assert config.parse(text).detection == Detecting(("hang", "straggler"), ("loss_spike",), preflight=False)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("detection: {shadow: [hangs]}", "job.yaml:2: detection.shadow[0]: 'hangs' is not known here (did you mean hang?)"),
        ("detection: {shadow: [hang], off: [hang]}",
         "job.yaml:2: detection.off: hang is on trial as well (write it under shadow or under off)"),
        ("detection: {of: [hang]}", "job.yaml:2: detection.of: unknown key (did you mean off?)"),
    ],
)  # fmt: skip
def test_what_cannot_hold_is_refused(text: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        config.parse(f"job: x\n{text}")
    assert str(caught.value) == message


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    holder = SimpleNamespace(stage=None)
    now = lambda: holder.stage.now if holder.stage else 1000.0  # noqa: E731
    monkeypatch.setattr(sensing, "time", SimpleNamespace(monotonic=now, time=now))
    return holder


@pytest.mark.parametrize("how", ["acts", "shadow", "off"])
def test_what_is_on_trial_is_noted_and_what_is_off_is_not_and_neither_acts(clock: Any, how: str) -> None:
    detecting = {"acts": Detecting(), "shadow": Detecting(shadow=("node_frozen",)), "off": Detecting(off=("node_frozen",))}
    stage = staged(clock, detecting=detecting[how])
    stage.stand(2.5, silent=1)
    frozen = [note["shadow"] for note in stage.notes if note["kind"] == "node_frozen"]
    assert (frozen, len(stage.lost)) == {"acts": ([False], 1), "shadow": ([True], 0), "off": ([], 0)}[how]


def test_one_that_is_off_leaves_the_others_alone() -> None:
    detection = Detection(off=("process_gone",))
    found = [*detection.observe(Report(1.0, "n0", 1.0, exits=(Exit("n0/0.0", "gone", oom=True),)))]
    found += detection.observe(Closed(2.0, "n0"))
    assert [finding.kind for finding in found] == [FaultKind.OUT_OF_MEMORY, FaultKind.NODE_GONE]
    with pytest.raises(ConfigError, match=r"detection\.off"):
        Detection(off=("proces_gone",))
