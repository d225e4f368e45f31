"""What does a save send, and how long does it take, when only a part of the state has changed?

`python -m benchmarks.incremental [--quick] [--json]`. A node agent in a process of its own keeps one state in a directory, save
after save; nothing trains meanwhile. See README.md.
"""

from __future__ import annotations

import argparse
import gc
import json
import random
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import xxhash

from benchmarks.figures import environment, median, say, table
from benchmarks.save import Disk, Ours, floors, make_state
from ray_dr.model.checkpoint import VersionId
from ray_dr.model.job import Keep
from ray_dr.repository import prune
from ray_dr.repository.commit import CommitLog
from ray_dr.repository.layout import chunks_prefix, save_folder
from ray_dr.stores.open import open_store

JOB = "save"
SHARE = 0.01
RANK = 16
"""Of the two matrices that LoRA puts beside a weight."""
LEARNING_RATE = 1e-5
WEIGHT = 0.02
"""The weights of the bf16 case are spread evenly between -WEIGHT and WEIGHT."""

State = dict[str, torch.Tensor]
Change = Callable[[], int]
"""Changes the state, and says of how many bytes."""


@dataclass(frozen=True)
class Saved:
    """One save. changed: bytes that are not what they were; sent: bytes of the objects it put, `objects` of them."""

    changed: int
    sent: int
    objects: int
    durable_s: float
    stall_s: float


class Held:
    """Tensors as an object that ray_dr saves."""

    def __init__(self, state: State) -> None:
        self._state = state

    def state_dict(self) -> State:
        return self._state

    def load_state_dict(self, state: State) -> None:
        self._state = state


class Kept(Ours):
    """Saves of which only the newest is kept, pruned before the clock starts."""

    def prepare(self) -> None:
        """Drop what is older than the newest checkpoint."""
        self._state.step += 1
        store = open_store(self._url)
        prune.execute(store, CommitLog(store, JOB), JOB, keep=Keep(1), term=None, whole=True)

    def put(self) -> tuple[int, int]:
        """How many objects the last save put, and their bytes: chunks and the part list."""
        store = open_store(self._url)
        folder = save_folder(VersionId(1, self._state.step), self._term)
        (ref,) = self._log.checkpoints()[-1].parts
        found = [ref.size, *(entry.size for entry in store.list(chunks_prefix(JOB, folder)))]
        return len(found), sum(found)

    def close(self) -> float:
        """End the agent and the connections to it; the processor seconds it took."""
        cpu_s = super().close()
        self._watch.close()
        self._link.close()
        return cpu_s


def few(size: int, share: float = SHARE) -> tuple[State, Change]:
    """Some of the tensors, others each time."""
    state, chosen = make_state(size), random.Random(7)

    def change() -> int:
        names = chosen.sample(sorted(state), max(1, round(share * len(state))))
        return sum(_add(state[name]) for name in names)

    return state, change


def everything(size: int) -> tuple[State, Change]:
    """All tensors, as in dense training."""
    state = make_state(size)
    return state, lambda: sum(map(_add, state.values()))


def lora(size: int) -> tuple[State, Change]:
    """A frozen base in float32; beside each large tensor two thin ones with their Adam moments, which all change."""
    base = make_state(size)
    thin = {
        f"{name}.lora_{side}{what}": torch.rand(RANK * max(1, int(tensor.numel() ** 0.5)))
        for name, tensor in base.items() if tensor.nbytes > 2**20
        for side in "AB" for what in ("", ".exp_avg", ".exp_avg_sq")
    }  # fmt: skip
    return base | thin, lambda: sum(map(_add, thin.values()))


def bf16(size: int) -> tuple[State, Change]:
    """Weights in bfloat16, rounded from float32 masters (not saved) after each step of Adam."""
    masters = {name: (tensor * 2 - 1) * WEIGHT for name, tensor in make_state(2 * size).items()}
    state = {name: master.bfloat16() for name, master in masters.items()}

    def change() -> int:
        changed = 0
        for name, master in masters.items():
            master.grad = torch.randn_like(master)
            torch.optim.Adam([master], LEARNING_RATE).step()
            master.grad = None
            new = master.bfloat16()
            changed += 2 * int((new != state[name]).sum())
            state[name].copy_(new)
        return changed

    return state, change


CASES: dict[str, Callable[[int], tuple[State, Change]]] = {
    "everything changed": everything,
    "1 % of the tensors": few,
    "frozen base, LoRA": lora,
    "bf16 after a step of Adam": bf16,
    "nothing changed": lambda size: (make_state(size), lambda: 0),
}


def _add(tensor: torch.Tensor) -> int:
    tensor += 1
    return tensor.nbytes


def saves(case: str, size: int, rounds: int, folder: Path) -> Iterator[Saved]:
    """A full save, which is not told of, and then `rounds` saves with a change before each."""
    state, change = CASES[case](size)
    way = Kept(Disk(folder), {"state": Held(state)})
    gc.collect()
    try:
        for number in range(rounds + 1):
            changed = change()
            way.prepare()
            begun = time.perf_counter()
            way.save()
            stall_s = time.perf_counter() - begun
            way.wait()
            durable_s = time.perf_counter() - begun
            objects, sent = way.put()
            if number:
                yield Saved(changed, sent, objects, durable_s, stall_s)
    finally:
        way.close()


def fingerprint_s(size: int) -> float:
    """Seconds for one look at all bytes by one thread, as fast as a fingerprint is: no save is quicker that trusts nobody."""
    data, times = torch.ones(size // 4).numpy().data.cast("B"), []
    for _ in range(3):
        begun = time.perf_counter()
        xxhash.xxh3_128_digest(data)
        times.append(time.perf_counter() - begun)
    return median(times)


def measure(size: int, rounds: int) -> tuple[dict[str, list[Saved]], dict[str, float]]:
    """The saves of each case, and the floors."""
    found: dict[str, list[Saved]] = {}
    with tempfile.TemporaryDirectory(prefix="rdi-") as folder:
        floor = {**floors(size, Path(folder)), "fingerprint_s": fingerprint_s(size)}
        for case in CASES:
            found[case] = list(saves(case, size, rounds, Path(folder) / "saved"))
            say(f"  {case}: " + ", ".join(f"{save.durable_s:.3f} s" for save in found[case]))
    return found, floor


def sum_up(saved: list[Saved], full_s: float) -> dict[str, float]:
    """Means of bytes and objects, medians of seconds; sent_ratio is of all bytes sent to all bytes changed."""
    count, changed, sent = len(saved), sum(each.changed for each in saved), sum(each.sent for each in saved)
    durable_s = median([each.durable_s for each in saved])
    return {
        "changed_bytes": changed / count, "sent_bytes": sent / count, "sent_ratio": sent / changed if changed else 0.0,
        "objects": sum(each.objects for each in saved) / count, "durable_s": durable_s, "time_ratio": durable_s / full_s,
        "stall_s": median([each.stall_s for each in saved]),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="256 MB, five saves of each kind")
    parser.add_argument("--json", action="store_true", help="the last line is one JSON object")
    parser.add_argument("--megabytes", type=int, default=0, help="size of the state (default 1024; 256 with --quick)")
    parser.add_argument("--rounds", type=int, default=0, help="saves of each kind (default 9; 5 with --quick)")
    asked = parser.parse_args()
    size = (asked.megabytes or (256 if asked.quick else 1024)) * 2**20
    seen = environment()
    say(f"{seen}\n{len(make_state(size))} tensors, {size / 2**20:.0f} MB")
    told, floor = measure(size, asked.rounds or (5 if asked.quick else 9))
    full_s = median([each.durable_s for each in told["everything changed"]])
    found = {case: sum_up(each, full_s) for case, each in told.items()}
    head = ["state", "changed MB", "sent MB", "sent / changed", "objects put", "durable s", "to a full save", "stall s"]
    rows = [
        [case, f"{f['changed_bytes'] / 2**20:.2f}", f"{f['sent_bytes'] / 2**20:.2f}",
         f"{f['sent_ratio']:.3f}" if f["sent_ratio"] else "-", f"{f['objects']:.0f}",
         f"{f['durable_s']:.3f}", f"{f['time_ratio']:.3f}", f"{f['stall_s']:.3f}"]
        for case, f in found.items()
    ]  # fmt: skip
    print(table(head, rows))
    print(f"floors: memcpy {floor['memcpy_s']:.3f} s, fingerprint {floor['fingerprint_s']:.3f} s, "
          f"raw write and fsync {floor['raw_put_s']:.2f} s, of {size / 2**20:.0f} MB")  # fmt: skip
    if asked.json:
        few_changed = found["1 % of the tensors"]
        print(json.dumps({
            "sent_ratio": few_changed["sent_ratio"], "time_ratio": few_changed["time_ratio"],
            "lora_sent_ratio": found["frozen base, LoRA"]["sent_ratio"], "full_s": full_s, **floor, "cases": found,
            "saves": {case: [asdict(each) for each in saved] for case, saved in told.items()}, "environment": seen,
        }))  # fmt: skip


if __name__ == "__main__":
    main()
