"""What the detectors are shown of a stretch of trouble, and what they make of it.

Detectors live on four reports a second of every node; 128 nodes for 30 days would be 1.3e9 of them, nearly all of nodes that
are well. So a simulated supervisor listens only while something is wrong: from the moment a node falls silent or a worker
hangs, until nothing is. The detectors then are new ones, of the very class that a real supervisor hosts
(`detection.detectors`), and first see a summary of what came before: the last reports of the nodes in question and of
some that are well, and the last steps. What they do not see of undisturbed stretches is not judged: that it does not make
them fire is their own promise, for which tests/simulation/test_undisturbed.py has hours of it, sample by sample. Two
things differ from a real supervisor's: a habit of late reports is known from LEAD_BEATS reports instead of 256, and a
step's usual time from up to SHOWN_STEPS instead of 512, which makes suspicion of a hang come a little later.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from ray_dr.detection.detectors import Detection
from ray_dr.model.events import Hung
from ray_dr.model.signal import (
    Beacon,
    Closed,
    FaultKind,
    Finding,
    Formed,
    Member,
    Now,
    Released,
    Report,
    Sample,
    StepDone,
    WholeStep,
    WorkerPhase,
)
from ray_dr.recovery.groups import group_of
from ray_dr.simulator.breach import must
from ray_dr.simulator.things import Agent, Worker
from ray_dr.simulator.training import Run

if TYPE_CHECKING:
    from ray_dr.simulator.host import Supervisor
    from ray_dr.simulator.world import World

BEAT_S = 0.25
LEAD_BEATS, SHOWN_STEPS = 12, 100
WITNESSES = 2
"""Nodes that are well and listened to beside those in trouble; also ranks that wait for one that hangs. What is decided by how
many others speak (whether all are silent at once) is the same with two as with thousands."""
SLOWER = 0.1
"""While only a hang is waited for, a look comes after a tenth of the time it has lasted."""


class Listening:
    """One stretch, of one supervisor's."""

    def __init__(self, world: World, supervisor: Supervisor, first: Agent | None = None) -> None:
        self._world, self.supervisor = world, supervisor
        self._detectors = Detection()
        self._silent: dict[Agent, float] = {}
        self._witnesses = self._some_well()
        self._hang: _Hang | None = None
        self._look_at = float("inf")
        self.over = False
        self._lead_in([*self._witnesses, *([first] if first is not None else [])])

    def silent(self, agent: Agent) -> None:
        """Nothing comes from a node from now on; its last report came just now."""
        now = self._world.clock.now
        if agent not in self._silent:
            self._silent[agent] = now
            self._act(self._detectors.observe(Report(now, agent.node.id, now)))
        self._look_again(BEAT_S)

    def hangs(self, run: Run, seen_from: int) -> None:
        """Workers of an attempt do nothing any more, and the others wait. `seen_from`: the step from which steps were seen."""
        now = self._world.clock.now
        if self._hang is not None and self._hang.run is run:
            self._hang.hung = [worker for worker in run.members if worker.hung]
        else:
            self._hang = _Hang(run, now)
            self._act(found for sample in self._hang.before(now, seen_from) for found in self._detectors.observe(sample))
        self._look_again(BEAT_S)

    # -- time passes

    def _look_again(self, after_s: float) -> None:
        at = self._world.clock.now + after_s
        if at < self._look_at:
            self._look_at = at
            self._world.clock.at(at, self._look, at)

    def _look(self, planned: float) -> None:
        if self.over or planned != self._look_at:
            return
        self._look_at = float("inf")
        now, supervisor = self._world.clock.now, self.supervisor
        if not supervisor.alive or supervisor.outcome is not None:
            self.over = True
            return
        self._forget_broken(now)
        self._act(found for sample in self._heard(now) for found in self._detectors.observe(sample))
        self._forget_what_is_over(now)
        if self._silent:
            self._look_again(BEAT_S)
        elif self._hang is not None:
            self._look_again(max(BEAT_S, SLOWER * (now - self._hang.since)))
        else:
            self.over = True

    def _heard(self, now: float) -> Iterable[Sample]:
        """What has arrived since the last look: a message that takes longer than a beat is missing in this one."""
        agents = dict.fromkeys([*self._witnesses, *self._silent, *(self._hang.agents if self._hang else ())])
        for agent in agents:
            if agent.alive and agent.node.answers and self._world.delay() <= BEAT_S:
                yield Report(now, agent.node.id, now, self._hang.beacons(agent) if self._hang else ())
        yield Now(now)

    def _forget_what_is_over(self, now: float) -> None:
        mine = self.supervisor.perform.agents
        for agent in [agent for agent in self._silent if mine.get(agent.node.id) is not agent]:
            del self._silent[agent]
            self._detectors.observe(Closed(now, agent.node.id))
        for agent in [agent for agent in self._silent if agent.alive and agent.node.answers]:
            del self._silent[agent]
        well = [agent for agent in self._witnesses if agent in mine.values() and agent.node.answers]
        for agent in self._witnesses:
            if agent not in well and agent not in self._silent:
                self._detectors.observe(Closed(now, agent.node.id))
        self._witnesses = well

    def _forget_broken(self, now: float) -> None:
        if self._hang is not None and not self._hang.lasts(self._world, self.supervisor):
            self._detectors.observe(Formed(now, self._hang.run.attempt, ()))
            self._hang = None

    # -- what is found

    def _act(self, findings: Iterable[Finding]) -> None:
        """As `actors.sensing` does."""
        for finding in list(findings):
            if finding.stage == "withdrawn" or finding.stage == "suspected":
                if self._hang is not None and finding.kind is FaultKind.HANG:
                    self._hang.found = None
                continue
            self._world.tally.found[finding.detector] += 1
            match finding.kind:
                case FaultKind.NODE_FROZEN:
                    for subject in finding.subjects:
                        self._lose(subject.node, finding)
                case FaultKind.HANG if self._hang is not None:
                    named = {subject.worker for subject in finding.subjects}
                    hung = {worker.id for worker in self._hang.hung}
                    must(named <= hung, f"{sorted(named - hung)} are said to hang: {finding.evidence}")
                    self._hang.found = finding
                    limit_s = self._world.swarm.job.recovery.hang_s
                    self._world.clock.at(finding.since + limit_s, self._end_hang, finding)
                case _:
                    pass

    def _lose(self, node: str, finding: Finding) -> None:
        agent = self.supervisor.perform.agents.get(node)
        if agent is not None:
            self._world.tally.false_alarms += agent.alive and agent.node.answers
            self.supervisor.agent_lost(agent, finding.evidence)

    def _end_hang(self, finding: Finding) -> None:
        hang = self._hang
        if self.over or hang is None or hang.found is not finding or not hang.lasts(self._world, self.supervisor):
            return
        workers = tuple(subject.worker for subject in finding.subjects)
        progress = self.supervisor.progress
        self.supervisor.post(Hung(self._world.clock.now, hang.run.attempt, workers, finding.evidence, progress))

    # -- what came before

    def _some_well(self) -> list[Agent]:
        agents = iter(self.supervisor.perform.agents.values())
        well = (agent for agent in agents if agent.alive and agent.node.answers)
        return [agent for agent, _ in zip(well, range(WITNESSES), strict=False)]

    def _lead_in(self, agents: Iterable[Agent]) -> None:
        """Reports as they come in from nodes that are well, up to now."""
        now, world = self._world.clock.now, self._world
        reports = []
        for agent in agents:
            at = now - (LEAD_BEATS + 1) * BEAT_S
            for beat in range(LEAD_BEATS):
                at = max(at, min(now, now - (LEAD_BEATS - beat) * BEAT_S + world.delay()))
                reports.append(Report(at, agent.node.id, at))
        for report in sorted(reports, key=lambda report: report.at):
            self._detectors.observe(report)


class _Hang:
    """Ranks of `run` that do nothing since `since`, as beacons tell it. Shown are those, and some that wait for them."""

    def __init__(self, run: Run, since: float) -> None:
        self.run, self.since = run, since
        self.found: Finding | None = None
        self.hung = [worker for worker in run.members if worker.hung]
        waiting = [worker for worker in run.members[: WITNESSES + len(self.hung)] if not worker.hung]
        self._shown = [*self.hung, *waiting[:WITNESSES]]
        self._step = run.steps(since)

    @property
    def agents(self) -> list[Agent]:
        return [worker.agent for worker in self._shown]

    def lasts(self, world: World, supervisor: Supervisor) -> bool:
        """Whether they are inside of it still, and the supervisor takes the attempt for the one at work."""
        self.hung = [worker for worker in self.hung if worker.alive and worker.inside]
        group = group_of(supervisor.state)
        return bool(self.hung) and self.run is world.run and group is not None and group.attempt == self.run.attempt

    def before(self, now: float, seen_from: int) -> Iterable[Sample]:
        """The group, and its last steps."""
        attempt, step_s = self.run.attempt, self.run.swarm.step_s * max(node.slow for node in self.run.nodes)
        seen = min(self._step - seen_from, SHOWN_STEPS)
        at = now
        yield Formed(at, attempt, tuple(Member(rank, worker.id) for rank, worker in enumerate(self._shown)))
        before = self._step - seen
        beacons = tuple(self._beacon(rank, before, WorkerPhase.COMPUTE, at) for rank in range(len(self._shown)))
        yield Report(at, "", at, beacons)
        for step in range(before + 1, self._step + 1):
            ranks = tuple(StepDone(at, rank, attempt, step, step_s) for rank in range(len(self._shown)))
            yield WholeStep(at, attempt, step, ranks)
        yield Released(at, "")

    def beacons(self, agent: Agent) -> tuple[Beacon, ...]:
        """Of the shown ranks on a node."""
        return tuple(
            self._beacon(rank, self._step, WorkerPhase.COMPUTE if worker.hung else WorkerPhase.COLLECTIVE, self.since)
            for rank, worker in enumerate(self._shown) if worker.agent is agent
        )  # fmt: skip

    def _beacon(self, rank: int, step: int, phase: WorkerPhase, since: float) -> Beacon:
        return Beacon(rank, self.run.attempt, step, phase, step + (phase is WorkerPhase.COLLECTIVE), since)


def hung_in(run: Run) -> list[Worker]:
    """The members of an attempt that do nothing any more, and are still inside."""
    return [worker for worker in run.members if worker.hung and worker.alive and worker.inside]
