"""The machines of a cluster while they are being given out: what is free of each, and which one to take next."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from ray_dr.model.scheduling import Machine, Wanting

Lot = tuple[str, str, bool, bool, float, float]
"""Machines that are the same to any job: kind, zone, spot, had by some job before, and what is free of processors and GPUs."""


@dataclass(slots=True)
class Stock:
    """Machines by what is free of them. Taking one is a matter of the number of lots, not of machines."""

    machines: Mapping[str, Machine]
    _free: dict[str, tuple[float, float]] = field(default_factory=dict)
    _had: frozenset[str] = frozenset()
    _lots: dict[Lot, dict[str, None]] = field(default_factory=dict)
    _count: dict[str, int] = field(default_factory=dict)

    @staticmethod
    def of(machines: Iterable[Machine], had: Collection[str]) -> Stock:
        """All usable machines, with nothing given out. `had`: those that some job has now; others are taken first."""
        usable = sorted((each for each in machines if each.usable), key=lambda each: (each.zone, each.rack, each.id))
        stock = Stock({each.id: each for each in usable}, _had=frozenset(had))
        for each in usable:
            stock._free[each.id] = (each.cpus, each.gpus)
            stock._count[each.kind] = stock._count.get(each.kind, 0) + 1
            stock._lots.setdefault(stock._lot(each.id), {})[each.id] = None
        return stock

    def fits(self, job: Wanting, machine: str) -> bool:
        """Whether the job could have (one more) node there."""
        free = self._free.get(machine)
        return free is not None and free[0] >= job.cpus and free[1] >= job.gpus

    def take(self, job: Wanting, machine: str) -> None:
        """Give the job what it needs of a machine."""
        self._move(machine, -job.cpus, -job.gpus)

    def give_back(self, job: Wanting, machine: str) -> None:
        """Undo it."""
        self._move(machine, job.cpus, job.gpus)

    def pick(self, job: Wanting, kind: str, has: Sequence[str], *, on_demand: bool = False) -> str | None:
        """The machine of a kind that the job should have next, beside those it `has`; None: there is none. In a zone where it
        has some, one that nobody has now, spot where it may be, and the fullest that fits, so that whole ones stay free."""
        zones = {self.machines[machine].zone for machine in has}
        mine = frozenset(has)
        fitting = [
            (lot[1] not in zones and bool(zones), lot[3], not lot[2], lot[5], lot[4], lot)
            for lot, ids in self._lots.items()
            if ids and lot[0] == kind and lot[4] >= job.cpus and lot[5] >= job.gpus and not (on_demand and lot[2])
        ]
        for *_, lot in sorted(fitting):
            for machine in self._lots[lot]:
                if machine not in mine:
                    return machine
        return None

    def room(self, job: Wanting, kind: str) -> int:
        """How many nodes the job could have of a kind, now."""
        return sum(
            len(ids) for lot, ids in self._lots.items() if lot[0] == kind and lot[4] >= job.cpus and lot[5] >= job.gpus
        )

    def kinds(self) -> tuple[str, ...]:
        """Every kind of machine there is."""
        return tuple(sorted(self._count))

    def count(self, kind: str) -> int:
        """How many machines of a kind there are, free or not."""
        return self._count.get(kind, 0)

    def _lot(self, machine: str) -> Lot:
        each, free = self.machines[machine], self._free[machine]
        return each.kind, each.zone, each.spot, machine in self._had, *free

    def _move(self, machine: str, cpus: float, gpus: float) -> None:
        del self._lots[self._lot(machine)][machine]
        free = self._free[machine]
        self._free[machine] = (free[0] + cpus, free[1] + gpus)
        assert min(self._free[machine]) >= 0, "nothing is given out twice"
        self._lots.setdefault(self._lot(machine), {})[machine] = None
