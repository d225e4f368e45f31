#!/usr/bin/env python3
"""Restores a checkpoint from a ray_dr repository without ray_dr: Python 3.10 or newer and numpy are all it needs.

    python rescue.py /path/of/store [JOB]                            which jobs there are, which checkpoints a job has
    python rescue.py /path/of/store JOB --to weights.safetensors     the newest, as one safetensors file
    python rescue.py /path/of/store JOB --to folder --step 400       step 400, as one .npy file per tensor

The store is a directory (or file:///path); the format is told in ray_dr/repository/FORMAT.md. Every object counts only after
its BLAKE3 hash was checked; without the module `blake3` numpy does that, slower. Nothing appears under the target's name
unless all was good. What is damaged is named; an older checkpoint is restored instead only with --older. No check can see
that a whole store was put back in time, or that its log lost its last entries; what is left of later saves is named.
"""

import argparse
import json
import math
import os
import re
import shutil
import sys
from collections import Counter
from operator import itemgetter
from pathlib import Path
from urllib.parse import quote

import numpy as np

try:
    from blake3 import blake3
except ImportError:
    blake3 = None

# dtype, how numpy keeps its bits, safetensors' name
_TABLE = """float64 <f8 F64, float32 <f4 F32, float16 <f2 F16, bfloat16 <u2 BF16, float8_e4m3fn |u1 F8_E4M3,
    float8_e5m2 |u1 F8_E5M2, float8_e4m3fnuz |u1 -, float8_e5m2fnuz |u1 -, float8_e8m0fnu |u1 -,
    float4_e2m1fn_x2 |u1 -, int64 <i8 I64, int32 <i4 I32, int16 <i2 I16, int8 |i1 I8, uint64 <u8 U64,
    uint32 <u4 U32, uint16 <u2 U16, uint8 |u1 U8, bool |b1 BOOL, complex32 <u4 -, complex64 <c8 -, complex128 <c16 -"""
DTYPES = {name: names for name, *names in (row.split() for row in _TABLE.split(","))}
JOB, SAVE = r"(?!.*\.\.)[a-zA-Z0-9][a-zA-Z0-9._=-]{0,127}", r"\d{6,}-\d{12,}-\d{6,}"
IV = np.array([0x6A09E667, 0xBB67AE85, 0x3C6EF372, 0xA54FF53A, 0x510E527F, 0x9B05688C, 0x1F83D9AB, 0x5BE0CD19], "u4")
PERMUTATION = [2, 6, 3, 10, 7, 0, 4, 13, 1, 11, 12, 5, 9, 14, 15, 8]
CHUNK_START, CHUNK_END, PARENT, ROOT = 1, 2, 4, 8
version = itemgetter("attempt", "step")


class Damaged(Exception):
    """An object is not what it must be: the message begins with its key."""


def compress(cv, block, counter, length, flags):
    """BLAKE3's compression of n blocks side by side: (8, n) from cv (8, n), block (16, n), and (n,) of the rest."""
    (a, b), c = cv.reshape(2, 4, -1), np.repeat(IV[:4, None], cv.shape[1], 1)
    d = np.array([counter & 0xFFFFFFFF, counter >> 32, length, flags], "u4")
    for _ in range(7):
        for on, back, words in (([1, 2, 3, 0], [3, 0, 1, 2], block[:8]), ([3, 0, 1, 2], [1, 2, 3, 0], block[8:])):
            for word, first, second in ((words[0::2], 16, 12), (words[1::2], 8, 7)):
                a = a + b + word
                d = (d ^ a) >> first | (d ^ a) << (32 - first)
                c = c + d
                b = (b ^ c) >> second | (b ^ c) << (32 - second)
            b, c, d = b[on], c[[2, 3, 0, 1]], d[back]  # from columns to diagonals, and back
        block = block[PERMUTATION]
    return np.concatenate((a ^ c, b ^ d))


def digest(data):
    """Hex BLAKE3. Without the module: runs of 1024 bytes side by side, block after block; then the tree, level by level."""
    if blake3:
        return blake3(data).hexdigest()
    n = max(1, -(-len(data) // 1024))
    padded = np.frombuffer(data + bytes(n * 1024 - len(data)), "<u4").reshape(n, 16, 16)
    blocks = np.ascontiguousarray(padded.transpose(1, 2, 0), "u4")
    counter, sizes = np.arange(n, dtype="u8"), np.minimum(len(data) - 1024 * np.arange(n), 1024)
    ends, cv = np.maximum(-(-sizes // 64), 1) - 1, np.repeat(IV[:, None], n, 1)
    for i in range(16):
        flags = CHUNK_START * (i == 0) + (CHUNK_END + ROOT * (n == 1)) * (ends == i)
        cv = np.where(ends < i, cv, compress(cv, blocks[i], counter, np.clip(sizes - 64 * i, 0, 64), flags))
    while (n := cv.shape[1]) > 1:
        pairs, zeros = np.concatenate((cv[:, 0 : n - 1 : 2], cv[:, 1::2])), np.zeros(n // 2, "u8")
        above = compress(np.repeat(IV[:, None], n // 2, 1), pairs, zeros, zeros + 64, zeros + PARENT + ROOT * (n == 2))
        cv = np.concatenate((above, cv[:, n - n % 2 :]), 1)
    return cv[:, 0].astype("<u4").tobytes().hex()


class Repository:
    """A directory that holds jobs. `checked` counts the verified objects of each kind."""

    def __init__(self, place):
        self.root, self.checked = Path(place.removeprefix("file://")), Counter()
        if not (self.root / "jobs").is_dir():
            sys.exit(f"{self.root}: no repository (it has no directory `jobs`)")

    def names(self, key):
        return sorted(path.name for path in (self.root / key).glob("[!.]*"))

    def get(self, key):
        try:
            return (self.root / key).read_bytes()
        except OSError as error:
            raise Damaged(f"{key}: {error.strerror}") from error

    def verified(self, key, wanted, size, kind):
        """An object's bytes, which must have the hash and the size that whoever names it wrote down."""
        data = self.get(key)
        if len(data) != size or digest(data) != wanted:
            raise Damaged(f"{key}: these {len(data)} bytes are not the {size} with the BLAKE3 hash {wanted[:16]}...")
        self.checked[kind] += 1
        return data

    def entry(self, key):
        """A log entry, which carries the hash of its own bytes without the member that holds the hash."""
        data = self.get(key)
        found = re.search(rb'"digest":"([0-9a-f]{64})",', data)
        if not found or digest(data[: found.start()] + data[found.end() :]) != found[1].decode():
            raise Damaged(f"{key}: does not match the BLAKE3 hash it carries")
        entry = json.loads(data)
        if entry["format"] != 1 or entry["entry"] not in ("term", "checkpoint", "kept", "hold", "release", "base"):
            sys.exit(f"{key}: of format {entry['format']}, {entry['entry']!r}: it needs the rescue.py of a newer ray_dr")
        if entry.get("place", key) != key:
            raise Damaged(f"{key}: was put as {entry['place']}")
        self.checked["log entries"] += 1
        return entry


class Log:
    """A job's log, read whole. `manifests`: by version, those that exist, oldest first. Entries that are damaged or out of
    place count for nothing; those behind the newest checkpoint (`hiding`) may have been newer ones."""

    def __init__(self, repo, job):
        self.job, self.manifests, self.hiding, self.term = job, {}, False, 0
        numbers = [int(name[:12]) for name in repo.names(f"jobs/{job}/log") if re.fullmatch(r"\d{12}\.(json|mark)", name)]
        for number in range(1, max(numbers, default=0) + 1):
            try:
                self.add(key := f"jobs/{job}/log/{number:012d}.json", repo.entry(key))
            except Damaged as error:
                print(f"damaged: {error}", file=sys.stderr)
                self.hiding = True

    def add(self, key, entry):
        if entry["entry"] not in ("checkpoint", "kept"):  # which jobs share chunks concerns only who removes some
            if entry.get("term", self.term + 1) <= self.term:
                raise Damaged(f"{key}: its term {entry['term']} is not above {self.term}: not the entry that was put here")
            self.term = entry.get("term", self.term)
            return
        kept, newest = entry["entry"] == "kept", max(self.manifests, default=(-1, -1))
        manifests = {version(m["version"]): m for m in (entry["manifests"] if kept else [entry["manifest"]])}
        if (min(entry["term"], entry["highest"]) if kept else entry["manifest"]["term"]) < self.term:
            raise Damaged(f"{key}: counts for nothing: its writer's term is below {self.term}")
        said = [(m["job"], m["format"], [ref["rank"] for ref in m["parts"]]) for m in manifests.values()]
        if said != [(self.job, 1, [*range(m["world"])]) for m in manifests.values()]:
            raise Damaged(f"{key}: of another job or format, or without a part of each rank")
        if max(manifests) < newest or (newest in manifests and not kept):
            raise Damaged(f"{key}: step {max(manifests)[1]} behind step {newest[1]}: not the entry that was put here")
        self.hiding = False
        self.manifests = manifests if kept else self.manifests | manifests
        self.term = entry["highest"] if kept else self.term


def bytes_in(dtype, lengths=()):
    return math.prod(lengths) * np.dtype(DTYPES[dtype][0]).itemsize


def read_part(repo, job, manifest, ref):
    """A part list, verified and consistent: its chunks tile its stream, its boxes lie inside."""
    key = ref["key"]
    if not re.fullmatch(rf"jobs/{re.escape(job)}/parts/{SAVE}/r\d{{5,}}-[0-9a-f]{{32}}\.json", key):
        raise Damaged(f"{key}: not the name of a part list of {job}")
    part, end = json.loads(repo.verified(key, ref["digest"], ref["size"], "part lists")), 0
    if (version(part["version"]), part["rank"], part["world"]) != (version(manifest["version"]), ref["rank"], manifest["world"]):
        raise Damaged(f"{key}: of another version, rank or world than its manifest says")
    for chunk in part["chunks"]:
        if chunk["at"] != end or not re.fullmatch(rf"({JOB}/)?{SAVE}/[0-9a-f]{{64}}", f"{chunk['folder']}/{chunk['id']}"):
            raise Damaged(f"{key}: its chunk at {end} does not begin there or has no proper name")
        end += chunk["size"]
    for box, at in ((shard["box"], shard["at"]) for shard in part["shards"]):
        spans = list(zip(box["offsets"], box["lengths"], box["global_shape"], strict=True))
        fits = box["dtype"] in DTYPES and all(0 <= a <= a + n <= size for a, n, size in spans)
        if not fits or end != part["size"] or not 0 <= at <= end - bytes_in(box["dtype"], box["lengths"]):
            raise Damaged(f"{key}: {box} at {at} lies outside of its tensor or of the {end} bytes of the part's chunks")
    return part


def tensors_of(parts):
    """name -> (dtype, shape), in order of name. Raises Damaged unless the boxes cover each tensor exactly once."""
    found, boxes = {}, {}
    for box in (shard["box"] for part in parts for shard in part["shards"]):
        if found.setdefault(box["name"], (box["dtype"], box["global_shape"])) != (box["dtype"], box["global_shape"]):
            raise Damaged(f"{box['name']}: its parts disagree about dtype or shape")
        boxes.setdefault(box["name"], set()).add(tuple(zip(box["offsets"], box["lengths"], strict=True)))
    for name, (_, shape) in found.items():
        there = [box for box in boxes[name] if all(n for _, n in box)]
        overlap = any(all(a < b + m and b < a + n for (a, n), (b, m) in zip(one, two, strict=True))
                      for i, one in enumerate(there) for two in there[:i])  # fmt: skip
        if overlap or sum(math.prod(n for _, n in box) for box in there) != math.prod(shape):
            raise Damaged(f"{name}: the saved boxes do not cover its shape {shape} exactly once")
    return dict(sorted(found.items()))


def boxes_of(repo, job, part):
    """(box, its bytes) in order of place; each chunk is read and checked once."""
    chunks, held, start = iter(part["chunks"]), bytearray(), 0  # held: the stream from `start` to where it was read
    for shard in sorted(part["shards"], key=lambda shard: shard["at"]):
        del held[: shard["at"] - start]
        start, size = shard["at"], bytes_in(shard["box"]["dtype"], shard["box"]["lengths"])
        while len(held) < size:
            chunk = next(chunks)
            key = "jobs/{}/chunks/{}/{}".format(*f"{job}/{chunk['folder']}".split("/")[-2:], chunk["id"])
            held += repo.verified(key, chunk["id"], chunk["size"], "chunks")[max(0, start + len(held) - chunk["at"]) :]
        yield shard["box"], bytes(held[:size])


def npy_files(folder, tensors, scalars):
    """Arrays in one new .npy file per tensor, by name. File names hold no slash and begin with no dot."""
    folder.mkdir()
    arrays, listed = {}, {}
    for number, (name, (dtype, shape)) in enumerate(tensors.items()):
        label, array_dtype = re.sub(r"^\.", "%2E", quote(name, safe=" ")), np.dtype(DTYPES[dtype][0])
        file = label[:200] + f"~{number}" * (len(label) > 200) + ".npy"
        note = {} if array_dtype.name == dtype else {"note": f"the bits of {dtype}, kept as {array_dtype.name}"}
        listed[name] = {"file": file, "dtype": dtype, "shape": shape, **note}
        arrays[name] = np.lib.format.open_memmap(folder / file, "w+", array_dtype, tuple(shape), version=(1, 0))
    for file, content in (("tensors.json", listed), ("scalars.json", scalars)):
        (folder / file).write_text(json.dumps(content, indent=1))
    return arrays


def one_file(path, tensors, scalars):
    """Arrays in one new safetensors file, by name; the same bytes as `ray-dr restore` writes."""
    if refused := [f"{name} ({dtype})" for name, (dtype, _) in tensors.items() if DTYPES[dtype][1] == "-"]:
        sys.exit(f"safetensors has no form for {', '.join(refused)}: restore to a folder of .npy files")
    header, end = {"__metadata__": {"scalars": json.dumps(scalars, sort_keys=True)}}, 0
    for name, (dtype, shape) in tensors.items():
        header[name] = {"dtype": DTYPES[dtype][1], "shape": shape, "data_offsets": [end, end + bytes_in(dtype, shape)]}
        end = header[name]["data_offsets"][1]
    text = json.dumps(header, separators=(",", ":")).encode()
    text = (len(text) + -len(text) % 8).to_bytes(8, "little") + text + b" " * (-len(text) % 8)
    file = np.memmap(path, "u1", "w+", 0, len(text) + end)
    file[: len(text)] = np.frombuffer(text, "u1")
    runs = {name: file[len(text) :][slice(*header[name]["data_offsets"])] for name in tensors}
    return {name: run.view(DTYPES[tensors[name][0]][0]).reshape(tensors[name][1]) for name, run in runs.items()}


def restore(repo, job, manifest, target):
    """Write one checkpoint to `target` whole, or raise and leave nothing."""
    partial = target.with_name(f".{target.name}.{os.getpid()}.partial")
    try:
        parts = [read_part(repo, job, manifest, ref) for ref in manifest["parts"]]
        tensors, size = tensors_of(parts), sum(part["size"] for part in parts)
        if size > shutil.disk_usage(target.parent).free:
            sys.exit(f"{target}: the disk lacks space for {size} bytes")
        scalars = {name: value for part in parts for name, value in part["scalars"].items()}
        arrays = (one_file if target.suffix == ".safetensors" else npy_files)(partial, tensors, scalars)
        for box, data in (found for part in parts for found in boxes_of(repo, job, part)):
            array = arrays[box["name"]].view(f"V{bytes_in(box['dtype'])}")  # bits, never values
            spans = tuple(slice(a, a + n) for a, n in zip(box["offsets"], box["lengths"], strict=True))
            array[spans] = np.frombuffer(data, array.dtype).reshape(box["lengths"])
        os.replace(partial, target)
    except (KeyError, IndexError, TypeError, ValueError, StopIteration) as error:
        raise Damaged(f"an object is not of the format: {error!r}") from error
    finally:
        shutil.rmtree(partial) if partial.is_dir() else partial.unlink(missing_ok=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("store")
    parser.add_argument("job", nargs="?")
    parser.add_argument("--to", type=Path, help="FILE.safetensors, or a new folder")
    parser.add_argument("--step", type=int, help="which checkpoint; without it, the newest")
    parser.add_argument("--older", action="store_true", help="when that one cannot be restored, the next older that can")
    asked = parser.parse_args()
    repo = Repository(asked.store)
    if asked.job not in repo.names("jobs"):
        print("jobs:", *repo.names("jobs"))
        sys.exit(f"there is no job {asked.job}" if asked.job else 0)
    log = Log(repo, asked.job)
    for save in (name for name in repo.names(f"jobs/{asked.job}/parts") if re.fullmatch(SAVE, name)):
        if tuple(map(int, save.split("-")[:2])) > max(log.manifests, default=(-1, -1)):
            print(f"parts/{save}: of a later save, not committed, or its log entry is lost", file=sys.stderr)
    wanted = max((key for key in log.manifests if asked.step in (None, key[1])), default=None)
    if not asked.to or not wanted:
        print("steps:", *(f"{step} (attempt {attempt})" for attempt, step in log.manifests))
        sys.exit("there is no such checkpoint" if asked.to else 0)
    if asked.to.is_dir():
        sys.exit(f"{asked.to} exists already")
    if log.hiding and asked.step is None and not asked.older:
        sys.exit(f"what is damaged may have been newer than step {wanted[1]}: ask for --step {wanted[1]} or for --older")
    for attempt, step in sorted((v for v in log.manifests if v <= wanted), reverse=True)[: None if asked.older else 1]:
        try:
            restore(repo, asked.job, log.manifests[attempt, step], asked.to)
            return print(f"{asked.to}: step {step} of attempt {attempt}; verified: {dict(repo.checked)}")
        except Damaged as error:
            print(f"damaged: step {step} of attempt {attempt}: {error}", file=sys.stderr)
        except OSError as error:
            sys.exit(f"{asked.to} cannot be written: {error.strerror}")
    sys.exit("nothing was restored" + ("" if asked.older else "; --older would try the next older checkpoint"))


if __name__ == "__main__":
    main()
