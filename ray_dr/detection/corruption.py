"""Replicas whose parameters are not the same any more: a machine that computes wrongly without saying so."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import ClassVar

from ray_dr.model.signal import FaultKind, Finding, Formed, Sample, WholeStep


@dataclass(slots=True)
class Corruption:
    """Digests of the parameters, compared among ranks that hold the same shard. More than half of them agree: the others
    are named. No majority (two replicas, or a tie): all of them are, and only a replay of the step can tell.

    Delay: up to the next step with digests. Once per set of ranks and attempt.
    False alarms: none where replicas are equal by construction, as after the same reduced gradients and the same
    optimizer step; two different states have the same 64-bit digest by chance in 5e-20 of cases. Buffers that
    are not synchronised (statistics of a batch norm) must not be part of the digest.
    """

    name: ClassVar[str] = "corruption"
    hears: ClassVar[tuple[type, ...]] = (Formed, WholeStep)

    _formed: Formed | None = None
    _told: set[tuple[int, ...]] = field(default_factory=set)

    def observe(self, sample: Sample) -> Iterator[Finding]:
        """A finding for each shard whose replicas differ."""
        match sample:
            case Formed():
                self._formed, self._told = sample, set()
            case WholeStep(ranks=ranks) if self._formed is not None and any(done.digest for done in ranks):
                shards: dict[tuple[int, str], dict[int, str]] = {}
                for member, done in zip(self._formed.members, ranks, strict=True):
                    if done.digest:
                        shards.setdefault((member.shard, done.shard), {})[done.rank] = done.digest
                for digests in shards.values():
                    yield from self._compare(digests, sample, self._formed)

    def _compare(self, digests: dict[int, str], step: WholeStep, formed: Formed) -> Iterator[Finding]:
        digest, agree = Counter(digests.values()).most_common(1)[0]
        if agree == len(digests):
            return
        majority = 2 * agree > len(digests)
        suspects = tuple(rank for rank, own in digests.items() if not majority or own != digest)
        if suspects in self._told:
            return
        self._told.add(suspects)
        who = ", ".join(map(str, suspects[:8]))
        how = f"{agree} of {len(digests)} replicas agree" if majority else "no majority: replay the step to find out whose"
        evidence = f"parameters after step {step.step} differ on rank {who}: {how}"
        numbers = {"agree": float(agree), "replicas": float(len(digests))}
        subjects = tuple(formed.subject(rank) for rank in suspects)
        yield Finding(
            self.name, FaultKind.CORRUPTION, subjects, step.at, step.at, evidence, numbers=numbers, step=step.step,
            stage="confirmed" if majority else "suspected",
        )  # fmt: skip
