"""Reading model files: folders of safetensors shards, zstd-compressed shards, JSON and torch files.

Files are treated as hostile input: nothing outside the folder is opened, no pickle code runs, and every key, shape and
dtype is known from the headers before a tensor is read. Tensors are memory-mapped and handed out one at a time, so
that loading needs the model's own memory plus one tensor.
"""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import IO, Any

import torch
from safetensors import SafetensorError, safe_open

from ..errors import CheckpointError, MagiHumanError
from ..guards.download_faults import MAX_SAFETENSORS_HEADER, absence, contents, fault, hints, unfinished

_INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_MAX_NAME = 250  # bytes of a shard's name: file systems end at 255
_MAX_NAMED = 5  # keys listed in an error before "and N more"


def check_state_dict(
    shapes: Mapping[str, tuple[int, ...]],
    expected: Mapping[str, tuple[int, ...]],
    where: object,
) -> None:
    """Compare keys and shapes; one `CheckpointError` names every kind of mismatch, with expected and got."""
    problems = []
    missing = sorted(expected.keys() - shapes.keys())
    unexpected = sorted(shapes.keys() - expected.keys())
    wrong = [
        f"{name} (expected {list(expected[name])}, got {list(shapes[name])})"
        for name in sorted(expected.keys() & shapes.keys())
        if tuple(shapes[name]) != tuple(expected[name])
    ]
    for label, names in (("missing keys", missing), ("unexpected keys", unexpected), ("wrong shapes", wrong)):
        if names:
            more = f" and {len(names) - _MAX_NAMED} more" if len(names) > _MAX_NAMED else ""
            problems.append(f"{label}: {', '.join(names[:_MAX_NAMED])}{more}")
    if problems:
        raise CheckpointError(f"{where}: {'; '.join(problems)}")


def shapes_of(state_dict: Mapping[str, torch.Tensor], where: object) -> dict[str, tuple[int, ...]]:
    """Shape of every tensor of a state dict; a value that is no tensor is a `CheckpointError`."""
    for name, value in state_dict.items():
        if not isinstance(value, torch.Tensor):
            raise CheckpointError(f"{where}: {name!r} expected a tensor, got {type(value).__name__}")
    return {name: tuple(value.shape) for name, value in state_dict.items()}


def check_dense(name: str, tensor: torch.Tensor, where: object) -> None:
    """Refuse a stored tensor that is larger than its file says: sparse, without data, or one value repeated."""
    if tensor.layout != torch.strided or tensor.is_meta:
        kind = "no data" if tensor.is_meta else str(tensor.layout)
        raise CheckpointError(f"{where}: {name}: expected a dense tensor, got {kind}")
    if tensor.untyped_storage().nbytes() < tensor.numel() * tensor.itemsize:
        raise CheckpointError(f"{where}: {name}: expected a value for each element, got fewer")


def require_file(path: Path) -> Path:
    """Return `path` if it is a whole file, else raise `CheckpointError` saying what is there instead."""
    if not os.path.isfile(path):  # unlike Path.is_file, also False for a name that no file system takes
        raise CheckpointError(f"{path}: expected a file, found {absence(path)}")
    if (found := unfinished(path)) is not None:
        raise CheckpointError(f"{path}: expected a file, found {found}")
    return path


@contextmanager
def reading() -> Iterator[None]:
    """A `CheckpointError` for what the system refuses of a checkpoint, such as a folder of another user."""
    try:
        yield
    except MagiHumanError:
        raise
    except OSError as error:
        raise CheckpointError(
            f"{error.filename or 'checkpoint'}: cannot be read: {error.strerror or error}"
        ) from error


def unreadable(path: Path, expected: str, error: object) -> CheckpointError:
    """What to raise for a file that is not as `expected`: what it is instead, or else what its reader said."""
    found = fault(path)
    return CheckpointError(
        f"{path}: expected {expected}" + (f": {error}" if found is None else f", found {found}")
    )


def read_json(path: Path) -> Any:
    """Parse a JSON file; unreadable or invalid content is a `CheckpointError` naming the file."""
    try:
        content = json.loads(require_file(path).read_text(encoding="utf-8"))
    except CheckpointError:
        raise
    except (OSError, ValueError, RecursionError) as error:  # bad UTF-8, JSON and numbers are all ValueErrors
        raise unreadable(path, "JSON", error) from error
    if isinstance(content, dict) and (found := fault(path)) is not None:  # a server's refusal may be JSON too
        raise CheckpointError(f"{path}: expected a model's JSON, found {found}")
    return content


def load_torch_file(path: Path) -> Any:
    """Memory-map a torch file that holds tensors and plain containers only; code in it is refused, not run."""
    try:
        return torch.load(require_file(path), map_location="cpu", weights_only=True, mmap=True)
    except CheckpointError:
        raise
    except Exception as error:  # a damaged or hostile pickle can raise anything
        reason = f"it is damaged, of another format or has code in it ({type(error).__name__})"
        raise unreadable(path, "a torch file with nothing but weights", reason) from error


@dataclass(frozen=True)
class TensorEntry:
    """Where one tensor lives, known from its file's header."""

    file: Path
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class Checkpoint:
    """The tensors of a model folder or file. `entries` is complete before any tensor is read."""

    path: Path
    entries: Mapping[str, TensorEntry]

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: entry.shape for name, entry in self.entries.items()}

    def check(
        self,
        expected: Mapping[str, tuple[int, ...]],
        what: str,
        ignore: Callable[[str], bool] | None = None,
    ) -> None:
        """Raise `CheckpointError` unless the keys (but for ignored ones) and shapes are exactly `expected`."""
        found = {n: s for n, s in self.shapes.items() if n in expected or ignore is None or not ignore(n)}
        check_state_dict(found, expected, f"{self.path}: {what}")

    def tensors(self, names: Iterable[str] | None = None) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield (name, tensor) shard by shard. A tensor of an uncompressed file is a view of the mapped file."""
        wanted = list(self.entries if names is None else names)
        by_file: dict[Path, list[str]] = {}
        for name in wanted:
            by_file.setdefault(self.entries[name].file, []).append(name)
        for file, members in by_file.items():
            yield from (
                _zst_tensors(file, members) if file.suffix == ".zst" else _mapped_tensors(file, members)
            )


def _mapped_tensors(file: Path, names: list[str]) -> Iterator[tuple[str, torch.Tensor]]:
    for name in names:
        # Opened anew for each tensor: the pages a mapping has touched stay resident until it is closed, and a
        # float32 shard must not stay beside the bfloat16 copy made of it.
        with _safetensors(file) as handle:
            tensor = handle.get_tensor(name)
        yield name, tensor
        del tensor


@contextmanager
def _safetensors(file: Path) -> Iterator[Any]:
    try:
        with safe_open(require_file(file), "pt") as handle:
            yield handle
    except (SafetensorError, OSError) as error:
        raise unreadable(file, "a safetensors file", error) from error


@contextmanager
def _zst_stream(file: Path) -> Iterator[IO[bytes]]:
    import zstandard

    try:
        with require_file(file).open("rb") as raw, zstandard.ZstdDecompressor().stream_reader(raw) as stream:
            yield stream
    except (zstandard.ZstdError, OSError) as error:
        raise unreadable(file, "a zstd-compressed safetensors file", error) from error


def _read_exactly(stream: IO[bytes], count: int, file: Path) -> bytearray:
    try:
        data = bytearray(count)
    except (MemoryError, OverflowError) as error:
        raise CheckpointError(f"{file}: a tensor of {count} bytes does not fit in memory") from error
    view, done = memoryview(data), 0
    while done < count:
        got = stream.readinto(view[done:])  # type: ignore[attr-defined]  # both readers have it
        if not got:
            found = fault(file)
            raise CheckpointError(
                f"{file}: truncated: expected {count} more bytes, got {done}: download it again"
                if found is None
                else f"{file}: expected a zstd-compressed safetensors file, found {found}"
            )
        done += got
    return data


def _stream_header(stream: IO[bytes], file: Path) -> dict[str, tuple[TensorEntry, int]]:
    """Entries with their byte offsets, of a safetensors header at the start of a stream, checked strictly."""
    (length,) = struct.unpack("<Q", _read_exactly(stream, 8, file))
    if not 2 <= length <= MAX_SAFETENSORS_HEADER:
        raise CheckpointError(
            f"{file}: safetensors header of {length} bytes, expected 2 to {MAX_SAFETENSORS_HEADER}"
        )
    try:
        header = json.loads(_read_exactly(stream, length, file))
        header.pop("__metadata__", None)
        found = {}
        for name, info in header.items():
            entry = TensorEntry(file, tuple(int(n) for n in info["shape"]), _DTYPES[info["dtype"]])
            begin, end = info["data_offsets"]
            if min(entry.shape, default=0) < 0 or end - begin != entry.nbytes:
                raise ValueError(f"{name}: {end - begin} bytes for shape {list(entry.shape)} {info['dtype']}")
            found[name] = (entry, begin)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{file}: bad safetensors header: {error!r}") from error
    at = 0
    for name, (entry, begin) in sorted(found.items(), key=lambda item: item[1][1]):
        if begin != at:
            raise CheckpointError(f"{file}: {name} at byte {begin}, expected {at}")
        at += entry.nbytes
    return found


def _zst_tensors(file: Path, names: list[str]) -> Iterator[tuple[str, torch.Tensor]]:
    """Decompress one tensor after the other: the shard never exists whole, in memory or on disk."""
    wanted = set(names)
    with _zst_stream(file) as stream:
        for name, (entry, _) in sorted(_stream_header(stream, file).items(), key=lambda item: item[1][1]):
            data = _read_exactly(stream, entry.nbytes, file)
            if name in wanted:
                tensor = (
                    torch.frombuffer(data, dtype=entry.dtype) if data else torch.empty(0, dtype=entry.dtype)
                )
                yield name, tensor.reshape(entry.shape)
        if stream.read(1):
            raise CheckpointError(f"{file}: expected nothing after the last tensor, got more data")


def _header(file: Path) -> dict[str, TensorEntry]:
    if file.suffix == ".zst":
        with _zst_stream(file) as stream:
            return {name: entry for name, (entry, _) in _stream_header(stream, file).items()}
    entries = {}
    with _safetensors(file) as handle:
        for name in handle.keys():  # noqa: SIM118 (a safetensors handle is no mapping)
            part = handle.get_slice(name)
            dtype = _DTYPES.get(part.get_dtype())
            if dtype is None:
                raise CheckpointError(
                    f"{file}: {name} has dtype {part.get_dtype()}, expected one of {list(_DTYPES)}"
                )
            entries[name] = TensorEntry(file, tuple(part.get_shape()), dtype)
    return entries


def _shard_path(folder: Path, name: object, index: Path) -> Path:
    if not isinstance(name, str) or name in ("", ".", "..") or any(c in name for c in "/\\\0"):
        raise CheckpointError(f"{index}: shard {name!r} is outside the folder; expected a plain file name")
    if len(name.encode("utf-8", "surrogatepass")) > _MAX_NAME:
        raise CheckpointError(f"{index}: shard {name[:40]!r}... has a name that is too long")
    plain = folder / name
    packed = folder / f"{name}.zst"
    return packed if packed.is_file() and not plain.is_file() else plain


def open_checkpoint(path: Path | str, *, prefix: str = "") -> Checkpoint:
    """Read the headers of a model folder (index and shards, or one `model.safetensors`) or of one file.

    Any shard may be zstd-compressed (`.safetensors.zst`). With `prefix`, only keys that start with it are kept, and
    shards that hold none of them are neither read nor needed.

    Raises:
        CheckpointError: nothing to load, a shard missing, truncated or invalid, an index that names a file outside
            its folder or disagrees with its shards.
    """
    path = Path(path)
    if path.is_file():
        return Checkpoint(path, {n: e for n, e in _header(path).items() if n.startswith(prefix)})
    index = path / _INDEX
    if not index.is_file():
        single = _shard_path(path, _SINGLE, index)
        if not single.is_file():
            known = hints([index, path / _SINGLE, path / f"{_SINGLE}.zst"])
            raise CheckpointError(
                f"{path}: expected {_INDEX} or {_SINGLE}[.zst], found {contents(path)}{known}"
            )
        return Checkpoint(path, {n: e for n, e in _header(single).items() if n.startswith(prefix)})

    content = read_json(index)
    weight_map = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(weight_map, dict):
        raise CheckpointError(f"{index}: expected an object 'weight_map', got {type(weight_map).__name__}")
    files = {
        name: _shard_path(path, shard, index) for name, shard in weight_map.items() if name.startswith(prefix)
    }
    absent = sorted({file for file in files.values() if not file.is_file()})
    if absent:
        raise CheckpointError(
            f"{path}: missing shards {', '.join(file.name for file in absent)}, named by {_INDEX}; "
            f"found {contents(path)}{hints(absent[:_MAX_NAMED])}"
        )
    entries: dict[str, TensorEntry] = {}
    for file in sorted(set(files.values())):
        header = _header(file)
        claimed = {name for name, where in files.items() if where == file}
        held = {name for name in header if name.startswith(prefix)}
        if claimed != held:
            lost, extra = sorted(claimed - held)[:_MAX_NAMED], sorted(held - claimed)[:_MAX_NAMED]
            raise CheckpointError(f"{file}: disagrees with {_INDEX}: missing {lost}, unexpected {extra}")
        entries.update((name, header[name]) for name in held)
    return Checkpoint(path, entries)
