"""What a file of `torch.save` or `torch.distributed.checkpoint` holds, found out without running anything of it.

Started as a program, with a path: prints one JSON object, an inventory of the tensors (where in which file their bytes
lie) and of all other values. `foreign.read_inventory` starts it with limits on time and memory.

Theory of operation. Such files contain pickles, and a pickle is a program that calls whatever it names. `Inert` lets it
name only what is in `ALLOWED`, and there each name stands for something of our own that merely notes its arguments: no
class or function of torch is ever called, torch is not even imported. Everything else is refused by name. The tensors'
bytes are never read here; they are stored uncompressed in the zip archives that torch writes, at offsets that the
archives' directories tell.
"""

from __future__ import annotations

import io
import json
import math
import pickle
import resource
import struct
import sys
import zipfile
from collections import Counter, OrderedDict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

MEMORY_BYTES = 4 * 2**30
PICKLE_MAX_BYTES = 512 * 2**20

STORAGES = {
    "DoubleStorage": "float64", "FloatStorage": "float32", "HalfStorage": "float16", "BFloat16Storage": "bfloat16",
    "LongStorage": "int64", "IntStorage": "int32", "ShortStorage": "int16", "CharStorage": "int8",
    "ByteStorage": "uint8", "BoolStorage": "bool", "ComplexDoubleStorage": "complex128",
    "ComplexFloatStorage": "complex64", "UntypedStorage": "uint8",
}  # fmt: skip
DTYPES = (
    "float64", "float32", "float16", "bfloat16", "float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz",
    "float8_e8m0fnu", "float4_e2m1fn_x2",
    "int64", "int32", "int16", "int8", "uint64", "uint32", "uint16", "uint8", "bool", "complex64", "complex128",
    "complex32",
)  # fmt: skip
PATHS = ("PosixPath", "WindowsPath", "PurePosixPath", "PureWindowsPath")
"""DCP's metadata names its own folder."""
LAYOUT = "torch.distributed.checkpoint.metadata"


DAMAGE = (pickle.UnpicklingError, zipfile.BadZipFile, struct.error, ArithmeticError, AttributeError, EOFError,
          ImportError, LookupError, MemoryError, OSError, RuntimeError, TypeError, ValueError)  # fmt: skip
"""What reading a damaged file may raise."""


class Refused(Exception):
    """What the file asks for is not allowed, or it is not what it is taken for."""


@dataclass(frozen=True)
class Dtype:
    """A dtype or a typed storage's class, by the dtype's name."""

    name: str


@dataclass(frozen=True)
class Storage:
    """A record of an archive: where its bytes lie in the file."""

    dtype: str
    file: str
    at: int


@dataclass(frozen=True)
class Tensor:
    """A view of a storage that begins at byte `at` of the file: from its element number `element`, strides in elements."""

    dtype: str
    file: str
    at: int
    element: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


class Note:
    """Stands for an object of a class of DCP's metadata: its state, and nothing of its behaviour."""

    state: Any = None

    def __init__(self, *arguments: Any) -> None:
        self.arguments = arguments

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def __getitem__(self, key: str) -> Any:
        if not isinstance(self.state, dict):
            raise Refused(f"a {type(self).__name__} without {key}")
        return self.state.get(key)


class Metadata(Note):
    """The whole of a DCP checkpoint."""


class TensorEntry(Note):
    """properties, size, chunks"""


class BytesEntry(Note):
    """Something that is no tensor."""


class Piece(Note):
    """offsets, sizes"""


class Properties(Note):
    """The state is a tuple that begins with the dtype."""


class Place(Note):
    """relative_path, offset, length, transform_descriptors"""


class Index(Note):
    """fqn, offset"""


Places = dict[tuple[str, tuple[int, ...]], Place]


def rebuilt(storage: Any, offset: Any, shape: Any, strides: Any, *rest: Any) -> Tensor:
    """For torch._utils._rebuild_tensor_v2."""
    return _view(storage, offset, shape, strides, storage.dtype, rest[2:])


def rebuilt_with_dtype(storage: Any, offset: Any, shape: Any, strides: Any, *rest: Any) -> Tensor:
    """For torch._utils._rebuild_tensor_v3: the dtype is told apart from the storage."""
    return _view(storage, offset, shape, strides, rest[2].name, rest[3:])


def _view(storage: Storage, offset: int, shape: Any, strides: Any, dtype: str, marks: Any) -> Tensor:
    if any(marks):
        raise Refused("a tensor that is the lazy conjugate or negative of another (call resolve_conj before saving)")
    return Tensor(dtype, storage.file, storage.at, offset, tuple(shape), tuple(strides))


def parameter(data: Tensor, *_: Any) -> Tensor:
    """For torch._utils._rebuild_parameter."""
    return data


def as_tuple(values: Any = ()) -> tuple[Any, ...]:
    """For torch.Size."""
    return tuple(values)


def nothing(*_: Any) -> None:
    """For what is of no use here: layouts, memory formats, devices."""


ALLOWED: dict[tuple[str, str], Any] = {
    ("collections", "OrderedDict"): OrderedDict,
    ("collections", "Counter"): Counter,
    ("builtins", "complex"): complex,
    ("__builtin__", "complex"): complex,
    ("builtins", "bytes"): lambda: b"",
    ("__builtin__", "bytes"): lambda: b"",
    ("_codecs", "encode"): lambda text, _: text.encode("latin1"),  # how protocol 2 writes bytes
    ("torch._utils", "_rebuild_tensor_v2"): rebuilt,
    ("torch._utils", "_rebuild_tensor_v3"): rebuilt_with_dtype,
    ("torch._utils", "_rebuild_parameter"): parameter,
    ("torch", "Size"): as_tuple,
    ("torch", "device"): nothing,
    ("torch.serialization", "_get_layout"): nothing,
    (LAYOUT, "_MEM_FORMAT_ENCODING"): nothing,
    (LAYOUT, "Metadata"): Metadata,
    (LAYOUT, "TensorStorageMetadata"): TensorEntry,
    (LAYOUT, "BytesStorageMetadata"): BytesEntry,
    (LAYOUT, "ChunkStorageMetadata"): Piece,
    (LAYOUT, "TensorProperties"): Properties,
    (LAYOUT, "MetadataIndex"): Index,
    (LAYOUT, "StorageMeta"): Note,
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"): Place,
    **{(module, name): nothing for module in ("pathlib", "pathlib._local") for name in PATHS},
    **{("torch", storage): Dtype(dtype) for storage, dtype in STORAGES.items()},
    **{("torch.storage", storage): Dtype(dtype) for storage, dtype in STORAGES.items()},
    **{("torch", dtype): Dtype(dtype) for dtype in DTYPES},
}


class Inert(pickle.Unpickler):
    """Reads a pickle whose every name is in ALLOWED."""

    def __init__(self, data: bytes, file: str, storages: dict[str, int]) -> None:
        super().__init__(io.BytesIO(data))
        self._file, self._storages = file, storages

    def find_class(self, module: str, name: str) -> Any:
        """What stands for the name here. Raises Refused."""
        if (module, name) not in ALLOWED:
            raise Refused(f"it names {module}.{name}, which is not allowed: only tensors, numbers, strings, lists and "
                          "mappings are read")  # fmt: skip
        return ALLOWED[module, name]

    def persistent_load(self, pid: Any) -> Storage:
        """A storage: ("storage", class, key, device, count)."""
        kind, dtype, key = pid[:3]
        if kind != "storage" or key not in self._storages:
            raise Refused(f"it names a storage {key!r} that is not there")
        return Storage(dtype.name, self._file, self._storages[key])


class Window(io.RawIOBase):
    """A run of a file, as a file."""

    def __init__(self, file: Any, start: int, size: int) -> None:
        self._file, self._start, self._size, self._at = file, start, size, 0

    def seekable(self) -> bool:
        return True

    def readable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._at = max(0, offset + (0, self._at, self._size)[whence])
        return self._at

    def readinto(self, into: Any) -> int:
        self._file.seek(self._start + self._at)
        data = self._file.read(max(0, min(len(into), self._size - self._at)))
        into[: len(data)] = data
        self._at += len(data)
        return len(data)


def read_archive(file: Any, start: int, size: int) -> Any:
    """What `torch.save` put into a run of a file; tensors with their bytes' places in the file."""
    try:
        archive = zipfile.ZipFile(io.BufferedReader(Window(file, start, size)))
    except zipfile.BadZipFile as error:
        raise Refused("it is no archive of torch.save (files of torch before 1.6 have to be saved anew)") from error
    names = {info.filename.partition("/")[2]: info for info in archive.infolist()}
    if "data.pkl" not in names or names["data.pkl"].file_size > PICKLE_MAX_BYTES:
        raise Refused("it is no archive of torch.save, or its pickle is too long")
    if "byteorder" in names and archive.read(names["byteorder"]) != b"little":
        raise Refused("its numbers are not little-endian")
    storages = {}
    for name, info in names.items():
        if name.startswith("data/"):
            if info.compress_type != zipfile.ZIP_STORED:
                raise Refused("its records are compressed")
            file.seek(start + info.header_offset + 26)
            lengths = file.read(4)
            head = 30 + int.from_bytes(lengths[:2], "little") + int.from_bytes(lengths[2:], "little")
            storages[name.removeprefix("data/")] = start + info.header_offset + head
    return Inert(archive.read(names["data.pkl"]), Path(file.name).name, storages).load()


class Inventory:
    """What was found: tensors by name, and the other values as JSON in the form of `train.state.encode`."""

    def __init__(self) -> None:
        self.tensors: dict[str, dict[str, Any]] = {}

    def encode(self, value: Any, path: str) -> Any:
        """JSON form of a value, its tensors noted by path."""
        match value:
            case None | bool() | str() | int():
                return value
            case float():
                return value if math.isfinite(value) else {"$float": str(value)}
            case complex():
                return {"$complex": [self.encode(part, path) for part in (value.real, value.imag)]}
            case bytes():
                return {"$bytes": value.hex()}
            case Tensor():
                return {"$tensor": self.note(path, value.dtype, value.shape, [_piece(value)])}
            case Noted():
                return {"$tensor": self.note(path, value.dtype, value.shape, value.pieces)}
            case list():
                return [self.encode(item, f"{path}/{i}") for i, item in enumerate(value)]
            case tuple():
                return {"$tuple": [self.encode(item, f"{path}/{i}") for i, item in enumerate(value)]}
            case Counter():
                return {"$counter": [[self.encode(k, path), v] for k, v in value.items()]}
            case dict():
                if all(isinstance(key, str) and not key.startswith("$") for key in value):
                    return {key: self.encode(item, f"{path}/{key}") for key, item in value.items()}
                return {"$items": [[self.encode(k, path), self.encode(v, f"{path}/{k}")]
                                   for k, v in value.items()]}  # fmt: skip
            case _:
                raise Refused(f"{path}: a {type(value).__name__} has no form without pickle")

    def note(self, path: str, dtype: str, shape: tuple[int, ...], pieces: list[dict[str, Any]]) -> str:
        """Add a tensor; the name it got."""
        while path in self.tensors:
            path += "'"
        self.tensors[path] = {"dtype": dtype, "shape": list(shape), "pieces": pieces}
        return path


@dataclass(frozen=True)
class Noted:
    """A tensor of several pieces."""

    dtype: str
    shape: tuple[int, ...]
    pieces: list[dict[str, Any]]


def _piece(tensor: Tensor, offsets: tuple[int, ...] | None = None) -> dict[str, Any]:
    place = list(offsets) if offsets is not None else [0] * len(tensor.shape)
    return {"file": tensor.file, "at": tensor.at, "element": tensor.element, "strides": list(tensor.strides),
            "offsets": place, "lengths": list(tensor.shape)}  # fmt: skip


def read_torch_file(path: Path) -> Any:
    """What is in a .pt file."""
    with path.open("rb") as file:
        return read_archive(file, 0, path.stat().st_size)


def read_dcp(folder: Path) -> Any:
    """What is in a DCP checkpoint, nested as it was when it was saved."""
    try:
        data = (folder / ".metadata").read_bytes()
    except OSError as error:
        raise Refused(f"no .metadata can be read there ({error.strerror})") from error
    metadata = Inert(data, "", {}).load()
    if not isinstance(metadata, Metadata):
        raise Refused("its .metadata is none of torch.distributed.checkpoint")
    places: Places = {}
    for index, place in metadata["storage_data"].items():
        places[index["fqn"], tuple(index["offset"] or ())] = place
    paths = metadata["planner_data"] or {}
    whole: Any = None
    for name, entry in metadata["state_dict_metadata"].items():
        read = _dcp_tensor if isinstance(entry, TensorEntry) else _dcp_value
        value = read(folder, name, entry, places)
        whole = _place(whole, tuple(paths.get(name, (name,))), value)
    return _lists(whole if whole is not None else {})


def _dcp_tensor(folder: Path, name: str, entry: Any, places: Places) -> Noted:
    pieces = []
    dtype = entry["properties"].state[0].name
    for chunk in entry["chunks"]:
        offsets = tuple(chunk["offsets"])
        tensor = _stored(folder, name, places.get((name, offsets)))
        if not isinstance(tensor, Tensor) or (tensor.dtype, tensor.shape) != (dtype, tuple(chunk["sizes"])):
            raise Refused(f"{name}: the piece at {offsets} is not what .metadata says")
        pieces.append(_piece(tensor, offsets))
    return Noted(dtype, tuple(entry["size"]), pieces)


def _dcp_value(folder: Path, name: str, _: Any, places: Places) -> Any:
    value = _stored(folder, name, places.get((name, ())))
    if isinstance(value, Tensor):
        raise Refused(f"{name}: a tensor where .metadata says there is none")
    return value


def _stored(folder: Path, name: str, place: Place | None) -> Any:
    """An item of a DCP checkpoint."""
    if place is None:
        raise Refused(f"{name}: .metadata does not say where a piece of it lies")
    if place["transform_descriptors"]:
        raise Refused(f"{name}: it is transformed by {place['transform_descriptors']}")
    file = str(place["relative_path"])
    if Path(file).name != file:
        raise Refused(f"{name}: {file!r} is no file of the checkpoint's own folder")
    with (folder / file).open("rb") as opened:
        return read_archive(opened, int(place["offset"]), int(place["length"]))


def _place(whole: Any, path: tuple[Any, ...], value: Any) -> Any:
    """`value` put at a path of keys; mappings with numbers for keys become lists in the end."""
    if not path:
        return value
    held = whole if isinstance(whole, dict) else {}
    held[path[0]] = _place(held.get(path[0]), path[1:], value)
    return held


def _lists(value: Any) -> Any:
    if not isinstance(value, dict):
        return value
    found = {key: _lists(item) for key, item in value.items()}
    if found and sorted(found, key=str) == sorted(range(len(found)), key=str):
        return [found[i] for i in range(len(found))]
    return found


def take_inventory(path: Path) -> dict[str, Any]:
    """The inventory of a .pt file or of a DCP folder: {"tensors", "scalars"}.

    Each key of the outermost mapping becomes an object; a mapping of nothing but tensors is one object, `model`.
    """
    value = read_dcp(path) if path.is_dir() else read_torch_file(path)
    if not isinstance(value, dict) or all(isinstance(item, Tensor | Noted) for item in value.values()):
        value = {"model": value}
    if bad := [key for key in value if not isinstance(key, str) or not key or "/" in key or key.startswith("$")]:
        raise Refused(f"{bad[0]!r} cannot name an object (strings without / and $ can)")
    inventory = Inventory()
    scalars = {key: inventory.encode(item, key) for key, item in value.items()}
    return {"tensors": inventory.tensors, "scalars": scalars}


def answer(path: Path) -> dict[str, Any]:
    """The inventory, or {"refused": why}."""
    try:
        return take_inventory(path)
    except Refused as error:
        return {"refused": str(error)}
    except DAMAGE as error:
        return {"refused": f"it is damaged or none of torch's ({type(error).__name__}: {error})"}


def main() -> None:
    """Print the answer for the path given."""
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    resource.setrlimit(resource.RLIMIT_NPROC, (0, 0))
    json.dump(answer(Path(sys.argv[1])), sys.stdout)


if __name__ == "__main__":
    main()
