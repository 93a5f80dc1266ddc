"""PyTorch's pickles: `pytorch_model.bin` (one, or shards with an index), `*.pth`, `*.pt`. Weights only.

- A pickle is a program. Here it can name nothing but tensors, storages and ordered dicts: anything else is
  refused by name before it exists, and no torch is imported. So no code from a checkpoint runs.
- It is run by Python's own interpreter of pickles written in Python, whose steps can be counted and whose keys can be
  checked: the one in C hashes whatever it is given, and a few bytes make a key that takes forever or ends the process.
- Today's files are zip archives whose entries are stored, not compressed: a tensor is a byte range of the
  file, and is mapped like any other. Files from before torch 1.6 are pickles followed by raw storages;
  they are ranges too (the first GPT-2 release is one).
- A tensor may be a view of a larger storage, and two tensors may share bytes (tied weights do).
"""

from __future__ import annotations

import io
import math
import pickle
import reprlib
import struct
import zipfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, cast

from zoo.errors import ZooError
from zoo.formats import sets
from zoo.formats.around import taken
from zoo.formats.base import (
    HF_NAMINGS,
    ITEMSIZE,
    MAX_NAME,
    Checkpoint,
    TensorRef,
    add_tensors,
    carried_files,
    inside,
    read_json,
    refuse_pointer,
)
from zoo.formats.safetensors import check_index
from zoo.untrusted.bounded import uncollected, whole

INDEX = "pytorch_model.bin.index.json"
MAX_PICKLE = 256 << 20  # bytes of the pickled names and shapes; the largest release has under 32 MiB
UNDER = ("state_dict", "model", "module", "model_state_dict")  # keys that trainers put weights under
MAX_STEPS = (
    3 << 20
)  # of a checkpoint: a byte of a pickle may make an object of 72; a tensor takes some 30 steps
MAX_DIRECTORY = 16 << 20  # bytes of its archives' directories; an entry takes 60 or so
MAX_EXTRA = 256  # of them what stands beside an entry: sizes of 64 bits take 28; Python goes over it in the square of its length

_STORAGES = {
    "DoubleStorage": "F64", "FloatStorage": "F32", "HalfStorage": "F16", "BFloat16Storage": "BF16",
    "LongStorage": "I64", "IntStorage": "I32", "ShortStorage": "I16", "CharStorage": "I8", "ByteStorage": "U8",
    "BoolStorage": "BOOL", "UntypedStorage": "U8",
}  # fmt: skip
# Types without a storage class of their own travel as untyped storage and a dtype.
_DTYPES = {
    "float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16", "int64": "I64", "int32": "I32",
    "int16": "I16", "int8": "I8", "uint8": "U8", "bool": "BOOL", "float8_e4m3fn": "F8_E4M3",
    "float8_e5m2": "F8_E5M2", "float8_e8m0fnu": "F8_E8M0", "uint16": "U16", "uint32": "U32", "uint64": "U64",
}  # fmt: skip


def detect(path: Path) -> bool:
    if path.is_file():
        return path.suffix in (".bin", ".pth", ".pt") or sets.is_index(path.name, ".bin")
    return (path / INDEX).exists() or any(path.glob("pytorch_model*.bin"))


def open(path: Path) -> Checkpoint:
    """Open a folder with `config.json` and `pytorch_model*.bin` (or one pickle beside a config)."""
    root = path if path.is_dir() else path.parent
    entry = path.name if path.is_file() else "pytorch_model.bin"
    if path.is_dir() and not (root / entry).exists():
        entry = INDEX
        if not (root / INDEX).exists():
            n = len(list(root.glob("pytorch_model*.bin")))
            raise ZooError(f"{root}: {n} shards but no {INDEX}: is the download complete?")
    if (root / entry).is_dir():
        raise ZooError(
            f"{root / entry}: a folder, as DeepSpeed's zero_to_fp32.py leaves where it was given a file's name: name that folder's "
            "parts, or move them beside config.json"
        )
    names = sets.members(root, entry)
    config = read_json(root / "config.json", "a checkpoint needs its config to be understood")
    tensors: dict[str, TensorRef] = {}
    files: dict[str, int] = {}
    notes: list[str] = []
    budget = Budget()
    for name in names:
        file = inside(root, name, INDEX)
        files[name] = file.stat().st_size
        add_tensors(tensors, read_pickle(file, name, notes, budget), file)
    if entry not in files:
        check_index(sets.weight_map(root / entry), tensors, root / entry)
    return Checkpoint(
        root, "pickle", HF_NAMINGS, config, tensors, files, carried_files(root), notes=tuple(notes),
        around=taken(((root / n, n) for n in files), tensors.values()),
    )  # fmt: skip


# ---------------------------------------------------------------------------------------------------
# What a pickle may build


class Budget:
    """What the files of one checkpoint may cost together: a limit for each would be one for none.

    A step costs 1, and what goes over something made before costs its length: a memo hands out a list of a million
    entries as often as it is asked."""

    def __init__(self) -> None:
        self.steps, self.directory = MAX_STEPS, MAX_DIRECTORY

    def spend(self, n: int) -> None:
        self.steps -= n
        if self.steps < 0:
            raise ZooError(f"it takes more than {MAX_STEPS} steps to read: refused")

    def spend_length(self, x: Any) -> None:
        if isinstance(x, tuple | list | dict | str | bytes | set | frozenset):
            self.spend(len(x))


class _Storage(NamedTuple):
    dtype: str
    key: str
    size: int  # elements


class _Tensor(NamedTuple):  # it has no __dict__ that a pickle's BUILD could change
    storage: _Storage
    dtype: str
    offset: int  # elements
    shape: tuple[int, ...]
    strides: tuple[int, ...]


MAX_RANK = 64  # axes of a tensor
MAX_EXPANDED = (
    1 << 20
)  # bytes of a tensor whose storage has fewer: one number could stand for a tensor of any size
MAX_COUNT = 1 << 62  # of elements, in any direction
MAX_NUMBER = 1 << 60  # of a key or of a place in the memo: its own hash


class _Short(reprlib.Repr):
    """What a pickle holds, in a few words: written out, a tuple of itself twice, sixty times, would never end."""

    def __init__(self) -> None:
        super().__init__()
        self.maxlevel, self.maxtuple, self.maxlist, self.maxdict, self.maxstring = 2, 4, 4, 4, 60

    def repr_int(self, x: int, level: int) -> str:
        return repr(x) if abs(x) < MAX_COUNT else "a number beyond all counts"


short = _Short().repr


def _key(key: Any) -> Any:
    """A key of a dict: text or a number, as in every file of weights. Others could be hashed without end, and whole numbers of more
    than 60 bits all be hashed to the same."""
    if isinstance(key, str | float | bytes | None) or (isinstance(key, int) and abs(key) < MAX_NUMBER):
        return key
    raise ZooError(f"a key in it is {short(key)}: weights are named by text")


class _Dict(dict[Any, Any]):
    """An OrderedDict: dicts are ordered, and a pickle's BUILD can change no attribute of this one."""

    __slots__ = ()

    def __init__(self, pairs: Any = ()) -> None:
        super().__init__(
            (_key(key), value) for key, value in (pairs.items() if isinstance(pairs, dict) else pairs)
        )


class _Rebuild:
    """torch._utils._rebuild_tensor, _v2 (gradient flag, hooks and metadata follow) and _v3 (a dtype before the metadata).
    An object without attributes: those of a function could be set, for the whole process, by a pickle's BUILD."""

    __slots__ = ()

    def __call__(self, storage: Any, offset: Any, shape: Any, strides: Any, *rest: Any) -> _Tensor:
        dtype = rest[2] if len(rest) > 2 and isinstance(rest[2], str) else getattr(storage, "dtype", "")
        if not isinstance(storage, _Storage) or len(shape) != len(strides) or len(shape) > MAX_RANK:
            raise ZooError("a tensor in it is not made of a storage, a shape and strides")
        if dtype not in ITEMSIZE:
            raise ZooError(f"a tensor in it is of dtype {short(dtype)}; known: {', '.join(ITEMSIZE)}")
        sizes = (*shape, *strides, offset)
        if not all(type(n) is int and 0 <= n < MAX_COUNT for n in sizes):
            raise ZooError("a tensor in it has a shape, strides or an offset that are no counts")
        if any(isinstance(r, dict) and not isinstance(r, _Dict) and any(r.values()) for r in rest[2:]):
            raise ZooError("a tensor in it is a negated or conjugated view: not supported")
        return _Tensor(storage, dtype, offset, tuple(shape), tuple(strides))


class _Parameter:
    __slots__ = ()

    def __call__(self, data: Any, *_: Any) -> Any:
        return data


class _Opaque:
    """An in-memory file that a training library left beside the weights (`_extra_state`): dropped."""

    def __init__(self, *_: Any) -> None: ...

    def __setstate__(self, _: Any) -> None: ...


def _size(x: Any = ()) -> tuple[Any, ...]:
    """torch.Size."""
    if not isinstance(x, tuple | list):
        raise ZooError(f"a shape in it is {short(x)}")
    return tuple(x)


_ALLOWED: dict[tuple[str, str], Any] = {
    ("collections", "OrderedDict"): _Dict,
    ("torch._utils", "_rebuild_tensor"): _Rebuild(),
    ("torch._utils", "_rebuild_tensor_v2"): _Rebuild(),
    ("torch._utils", "_rebuild_tensor_v3"): _Rebuild(),
    ("torch._utils", "_rebuild_parameter"): _Parameter(),
    ("torch", "Size"): _size,
    ("_io", "BytesIO"): _Opaque,
    **{
        (m, name): dtype
        for name, dtype in _STORAGES.items()
        for m in ("torch", "torch.storage", "torch.cuda")
    },
    **{("torch", name): dtype for name, dtype in _DTYPES.items()},
}


class _Unpickler(pickle._Unpickler):
    """Builds tensors' descriptions; refuses every global that is not one of a few by name, every key that is not text
    or a number, and more steps than a release has."""

    dispatch = dict(pickle._Unpickler.dispatch)

    def __init__(self, file: _Bounded, who: str, budget: Budget) -> None:
        super().__init__(file, encoding="utf-8")
        self.who, self.budget = who, budget

    def find_class(self, module: str, name: str) -> Any:
        try:
            return _ALLOWED[module, name]
        except KeyError:
            raise ZooError(
                f"{self.who}: the pickle asks for {module:.200}.{name:.200}, which weights do not need: refused. It "
                "could run code. If you trust the file, save its tensors as safetensors where you trust it to run"
            ) from None

    def persistent_load(self, pid: Any) -> _Storage:
        # Files from before torch 1.6 have a sixth: None, or which part of another storage this one is.
        if isinstance(pid, tuple) and (len(pid) == 5 or (len(pid) == 6 and pid[5] is None)):
            tag, dtype, key, _, count = pid[:5]
            if all(isinstance(x, str) for x in (tag, dtype, key)) and tag == "storage" and dtype in ITEMSIZE:
                if type(count) is int and 0 <= count < MAX_COUNT:
                    return _Storage(dtype, key, count)
        raise ZooError(f"{self.who}: expected a storage, found {short(pid)}")


def _counted(step: Callable[[Any], None]) -> Callable[[Any], None]:
    def counted(self: Any) -> None:
        self.budget.steps -= 1
        if self.budget.steps < 0:
            self.budget.spend(0)
        step(self)

    return counted


def _set_item(self: Any) -> None:
    value, key = self.stack.pop(), self.stack.pop()
    _dict(self.stack[-1])[_key(key)] = value


def _set_items(self: Any) -> None:
    items = self.pop_mark()
    onto = _dict(self.stack[-1])
    for key, value in zip(items[::2], items[1::2], strict=True):
        onto[_key(key)] = value


def _new_dict(self: Any) -> None:
    items = self.pop_mark()
    self.append({_key(key): value for key, value in zip(items[::2], items[1::2], strict=True)})


def _new_set(self: Any) -> None:
    self.append(frozenset(map(_key, self.pop_mark())))


def _add_items(self: Any) -> None:
    items = self.pop_mark()
    if not isinstance(self.stack[-1], set):
        raise ZooError("it adds to a set that is none")
    self.stack[-1].update(map(_key, items))


def _reduce(self: Any) -> None:
    """A call of one of those few, each of which may go over all that it is given."""
    args = self.stack.pop()
    if not isinstance(args, tuple):
        raise ZooError(f"it calls something with {short(args)}")
    self.budget.spend(2 + len(args))
    for arg in args:
        self.budget.spend_length(arg)
    self.stack[-1] = self.stack[-1](*args)


def _new_object(self: Any) -> None:
    self.stack.pop()  # arguments, of which neither takes any
    if self.stack[-1] is not _Dict and self.stack[-1] is not _Opaque:
        raise ZooError(f"it makes an object of {short(self.stack[-1])}")
    self.stack[-1] = self.stack[-1]()


def _empty_set(self: Any) -> None:
    self.budget.spend(3)  # of 216 bytes
    self.append(set())


def _build(self: Any) -> None:
    """The state of an object. None of those that may exist needs one: an OrderedDict's `_metadata` is of no use here."""
    self.stack.pop()
    if not isinstance(self.stack[-1], _Dict | _Opaque):
        raise ZooError(f"it sets the state of {short(self.stack[-1])}")


def _dict(x: Any) -> dict[Any, Any]:
    if not isinstance(x, dict):
        raise ZooError(f"it sets an item of {short(x)}")
    return x


def _put(self: Any) -> None:
    """A place in the memo, given in digits."""
    place = whole(self.readline()[:-1].decode("ascii"))
    if place is None or place >= MAX_NUMBER:
        raise ZooError("it keeps something under a number that is none, or beyond all")
    self.memo[place] = self.stack[-1]


def _refuse(self: Any) -> None:
    raise ZooError("it makes objects in a way that weights do not need")


_REFUSED = (
    pickle.INST, pickle.OBJ, pickle.EXT1, pickle.EXT2, pickle.EXT4, pickle.NEWOBJ_EX,
    pickle.BYTEARRAY8,  # makes room for as many bytes as it says before it looks for one
)  # fmt: skip

_Unpickler.dispatch |= {
    pickle.SETITEM[0]: _set_item,
    pickle.SETITEMS[0]: _set_items,
    pickle.DICT[0]: _new_dict,
    pickle.PUT[0]: _put,
    pickle.FROZENSET[0]: _new_set,
    pickle.ADDITEMS[0]: _add_items,
    pickle.BUILD[0]: _build,
    pickle.REDUCE[0]: _reduce,
    pickle.NEWOBJ[0]: _new_object,
    pickle.EMPTY_SET[0]: _empty_set,
} | {op[0]: _refuse for op in _REFUSED}
_Unpickler.dispatch = {op: _counted(step) for op, step in _Unpickler.dispatch.items()}


class _Bounded:
    """A file that is not asked for more than it has: room for the answer is made before it is read."""

    def __init__(self, file: BinaryIO) -> None:
        here = file.tell()
        self.file, self.size = file, file.seek(0, io.SEEK_END)
        file.seek(here)

    def read(self, n: int) -> bytes:
        return self.file.read(n) if n <= self.size - self.file.tell() else b""

    def readline(self) -> bytes:
        return self.file.readline(MAX_PICKLE)


def _load(file: BinaryIO, who: str, budget: Budget) -> Any:
    try:
        with uncollected():
            return _Unpickler(_Bounded(file), who, budget).load()
    except ZooError as e:
        raise e if str(e).startswith(who) else ZooError(f"{who}: {e}") from None
    except RecursionError:
        raise ZooError(f"{who}: the pickle is nested too deeply: refused") from None
    except Exception as e:  # a damaged pickle can raise nearly anything
        raise ZooError(
            f"{who}: the pickle is damaged ({type(e).__name__}: {e!s:.200}); fetch it again"
        ) from None


# ---------------------------------------------------------------------------------------------------
# The two containers


Ranges = Callable[[_Storage], tuple[int, int]]  # storage -> (offset, nbytes) in the file


def read_pickle(
    file: Path, name: str, notes: list[str] | None = None, budget: Budget | None = None
) -> list[TensorRef]:
    """Tensors of one pickled state dict as byte ranges of `file`. Raises ZooError for anything that is
    not weights, for ranges that are not in the file, and where the `budget` of its checkpoint is spent."""
    with file.open("rb") as f:
        return read_open(f, name, str(file), notes, budget)


def read_open(
    f: BinaryIO, name: str, who: str, notes: list[str] | None = None, budget: Budget | None = None
) -> list[TensorRef]:
    """The same of an open file, which errors call `who`."""
    budget = budget or Budget()
    start = f.read(64)
    refuse_pointer(start, who)
    try:
        state, ranges = _read(f, start, who, budget)
        return list(_refs(_state_dict(state, who, notes, budget), ranges, name, who))
    except ZooError as e:
        raise e if str(e).startswith(who) else ZooError(f"{who}: {e}") from None


def _read(f: BinaryIO, start: bytes, who: str, budget: Budget) -> tuple[Any, Ranges]:
    """What is in the file that begins with `start`, and where the storages of its tensors lie."""
    if start[:4] == b"PK\x03\x04":
        return _zipped(f, who, budget)
    if start[:1] == b"\x80":
        f.seek(0)
        return _legacy(f, who, budget)
    raise ZooError(
        f"{who}: neither a zip archive nor a pickle: not a PyTorch file? (starts with {start[:4]!r})"
    )


def read_tensor(f: BinaryIO, who: str) -> TensorRef:
    """The one tensor that `torch.save` wrote to `f` as it is, as a byte range of `f`. Raises ZooError for anything else."""
    if f.read(4) != b"PK\x03\x04":
        raise ZooError(f"{who}: expected a file of torch.save (a zip archive): damaged, fetch it again")
    state, ranges = _zipped(f, who, Budget())
    if not isinstance(state, _Tensor):
        raise ZooError(f"{who}: holds {short(state)}, expected a tensor")
    (ref,) = _refs({"": state}, ranges, "", who)
    return ref


def _zipped(f: BinaryIO, who: str, budget: Budget) -> tuple[Any, Ranges]:
    try:
        archive = Archive(f, budget.directory)
        budget.directory -= archive.directory
        entries = {e.filename: e for e in archive.infolist()}
    except ZooError as e:
        raise ZooError(f"{who}: {e}") from None
    except Exception as e:  # a damaged archive can raise nearly anything
        raise ZooError(
            f"{who}: the archive's directory is unreadable ({e}): truncated, fetch it again"
        ) from None
    if len(entries) < len(archive.infolist()):
        raise ZooError(f"{who}: the archive has two entries of one name; which one is meant?")
    pickles = [n for n in entries if n == "data.pkl" or n.endswith("/data.pkl")]
    if len(pickles) != 1 or any(n.endswith("/constants.pkl") for n in entries):
        raise ZooError(f"{who}: a zip archive, but not of a state dict (TorchScript modules are refused)")
    prefix = pickles[0][: -len("data.pkl")]
    size = f.seek(0, io.SEEK_END)
    small = {
        name: limit
        for name, limit in ((pickles[0], MAX_PICKLE), (prefix + "byteorder", 16))
        if name in entries
    }
    for name, limit in small.items():
        if entries[name].file_size > limit:
            raise ZooError(f"{who}: {name} of {entries[name].file_size} bytes (limit {limit})")
        if entries[name].compress_type != zipfile.ZIP_STORED:  # 8 KB could become gigabytes
            raise ZooError(f"{who}: {name} is compressed, which PyTorch does not do: refused")
    try:
        raw = archive.read(pickles[0])
        order = archive.read(prefix + "byteorder") if len(small) > 1 else b"little"
    except Exception as e:
        raise ZooError(f"{who}: {pickles[0]} is unreadable ({e}): damaged, fetch it again") from None
    if order != b"little":
        raise ZooError(f"{who}: written on a big-endian machine: not supported")
    found: dict[str, tuple[int, int]] = {}

    def at(storage: _Storage) -> tuple[int, int]:
        if storage.key in found:
            return found[storage.key]
        entry = entries.get(f"{prefix}data/{storage.key}")
        if entry is None:
            raise ZooError(f"{who}: storage {storage.key!r} is not in the archive: damaged, fetch it again")
        if entry.compress_type != zipfile.ZIP_STORED or entry.flag_bits & 1:
            raise ZooError(
                f"{who}: {entry.filename} is compressed or encrypted; PyTorch writes neither: refused"
            )
        f.seek(max(entry.header_offset, 0))
        header = f.read(30)  # the local header; its own lengths of name and extra field count
        if entry.header_offset < 0 or len(header) < 30 or header[:4] != b"PK\x03\x04":
            raise ZooError(f"{who}: {entry.filename} has no local header: damaged, fetch it again")
        start = entry.header_offset + 30 + sum(struct.unpack("<HH", header[26:30]))
        if start + entry.file_size > size:
            raise ZooError(
                f"{who}: {entry.filename} ends behind the end of the file: truncated, fetch it again"
            )
        found[storage.key] = start, entry.file_size
        return found[storage.key]

    # The ranges are looked up while the file is open.
    state = _load(io.BytesIO(raw), who, budget)
    for tensor in _tensors(state, budget):
        at(tensor.storage)
    return state, at


class Archive(zipfile.ZipFile):
    """A zip archive whose directory has at most `most` bytes: Python would parse any of it. Raises ZooError for a larger one,
    zipfile's own errors for what is no archive."""

    def __init__(self, f: BinaryIO, most: int) -> None:
        held = _Held(f, most)
        super().__init__(cast(Any, held))
        self.directory, self.fp = held.given, f


class _Held:
    """A file that gives no more than `most` bytes at once. Python reads a directory in one piece, from where it takes it to
    be: who looks for its size in another way can be shown another one."""

    def __init__(self, f: BinaryIO, most: int) -> None:
        self.most, self.given = most, 0
        self.file, self.seek, self.tell = f, f.seek, f.tell

    def read(self, n: int = -1) -> bytes:
        if n > self.most:
            raise ZooError(f"the archive's directory has {n} bytes (limit {self.most}): refused")
        self.given = max(self.given, n)
        found = self.file.read(n)
        at = 0
        while found.startswith(b"PK\1\2", at) and at + 46 <= len(found):  # an entry of a directory
            name, extra, comment = struct.unpack_from("<3H", found, at + 28)
            if extra > MAX_EXTRA:
                raise ZooError(
                    f"an entry of the archive's directory has {extra} bytes beside it (limit {MAX_EXTRA}): refused"
                )
            at += 46 + name + extra + comment
        return found


def _legacy(f: BinaryIO, who: str, budget: Budget) -> tuple[Any, Ranges]:
    """Before torch 1.6: pickles of a magic number, a version, machine facts, the state dict, the storages'
    keys; then each storage as its length in elements (8 bytes) and its bytes."""
    size = f.seek(0, io.SEEK_END)
    f.seek(0)
    magic = _load(f, who, budget)
    if type(magic) is not int or magic != 0x1950A86A20F9469CFC6C:
        raise ZooError(f"{who}: a pickle, but not of PyTorch: refused")
    version, facts = _load(f, who, budget), _load(f, who, budget)
    if (
        type(version) is not int
        or version != 1001
        or not isinstance(facts, dict)
        or facts.get("little_endian") is not True
    ):
        raise ZooError(f"{who}: PyTorch file of version {short(version)}, {short(facts)}: not supported")
    state = _load(f, who, budget)
    keys = _load(f, who, budget)
    dtypes = {t.storage.key: t.storage.dtype for t in _tensors(state, budget)}
    if not isinstance(keys, list) or not all(isinstance(k, str) for k in keys) or set(dtypes) - set(keys):
        raise ZooError(f"{who}: the list of storages lacks some that tensors use: damaged, fetch it again")
    found: dict[str, tuple[int, int]] = {}
    for key in keys:
        head = f.read(8)
        if len(head) < 8 or key not in dtypes:
            raise ZooError(f"{who}: storage {key!r} is cut off or of no tensor: damaged, fetch it again")
        start, n = f.tell(), struct.unpack("<q", head)[0] * ITEMSIZE[dtypes[key]]
        if n < 0 or start + n > size:
            raise ZooError(
                f"{who}: storage {key!r} ends behind the end of the file: truncated, fetch it again"
            )
        found[key] = start, n
        f.seek(start + n)
    return state, lambda storage: found[storage.key]


def _tensors(state: Any, budget: Budget) -> Iterator[_Tensor]:
    """The tensors in dicts of dicts, each dict once: one may be in several, and in itself."""
    left, seen = [state], set()
    while left:
        value = left.pop()
        if isinstance(value, _Tensor):
            yield value
        elif isinstance(value, dict) and id(value) not in seen:
            seen.add(id(value))
            budget.spend(len(value))
            left += value.values()


def _state_dict(state: Any, who: str, notes: list[str] | None, budget: Budget) -> dict[str, _Tensor]:
    """The dict of tensors, which trainers put under a key of its own beside an optimiser."""
    for _ in UNDER:  # a dict may be in itself
        inner = {k: state.get(k) for k in UNDER} if isinstance(state, dict) else {}
        under = [k for k, value in inner.items() if isinstance(value, dict) and any(_tensors(value, budget))]
        if len(under) > 1:
            raise ZooError(
                f"{who}: holds several sets of tensors ({', '.join(under)}); save the one that is meant alone"
            )
        if under and notes is not None:
            beside = [k for k, v in state.items() if k != under[0] and any(_tensors(v, budget))]
            notes += (
                [
                    f"{Path(who).name}: the tensors under {under[0]!r} are taken, those under {', '.join(map(short, beside[:5]))} left out"
                ]
                if beside
                else []
            )
        state = state[under[0]] if under else state
    if not isinstance(state, dict):
        raise ZooError(f"{who}: holds {type(state).__name__}, not a dict of tensors")
    out = {k: v for k, v in state.items() if isinstance(k, str) and isinstance(v, _Tensor)}
    if not out:
        raise ZooError(f"{who}: there is no tensor in it (keys: {', '.join(map(short, list(state)[:5]))})")
    if (rest := [k for k in state if k not in out]) and notes is not None:
        notes.append(
            f"{Path(who).name}: {len(rest)} entries that are no tensors are left out: "
            + ", ".join(k if isinstance(k, str) and len(k) < 200 else short(k) for k in rest[:5])
        )
    return out


def _refs(state: dict[str, _Tensor], ranges: Ranges, file: str, who: str) -> Iterable[TensorRef]:
    for name, t in state.items():
        if len(name) > MAX_NAME:
            raise ZooError(
                f"{who}: a tensor's name has {len(name)} characters (limit {MAX_NAME}): {name:.100}"
            )
        start, available = ranges(t.storage)
        item = ITEMSIZE[t.dtype]
        span = 1 + sum((n - 1) * s for n, s in zip(t.shape, t.strides, strict=True)) if all(t.shape) else 0
        if (t.offset + span) * item > available:
            raise ZooError(
                f"{who}: tensor {name!r} {t.dtype} {list(t.shape)} needs {(t.offset + span) * item} bytes, its storage "
                f"has {available}: damaged, fetch it again"
            )
        if math.prod(t.shape) * item > max(available, MAX_EXPANDED):
            raise ZooError(
                f"{who}: tensor {name!r:.200} {t.dtype} {list(t.shape)} stands for {math.prod(t.shape) * item} bytes, its storage has "
                f"{available}: an expanded view; save its values (.contiguous())"
            )
        strides = None if _contiguous(t.shape, t.strides) else t.strides
        yield TensorRef(name, t.dtype, t.shape, file, start + t.offset * item, span * item, strides)


def _contiguous(shape: tuple[int, ...], strides: tuple[int, ...]) -> bool:
    want = 1
    for n, s in zip(reversed(shape), reversed(strides), strict=True):
        if n != 1 and s != want:
            return False
        want *= n
    return True
