"""What a download left where a model file should be, and which folder was meant: for messages, nothing is repaired.

Pointers of git-lfs, pages and messages of a server that refused, files cut short or never finished. Whatever is there
may be hostile: of a file's content only its start, its end and its own header are read.
"""

from __future__ import annotations

import base64
import codecs
import hashlib
import json
import os
import re
from collections.abc import Iterable
from itertools import islice
from pathlib import Path

from ..errors import CheckpointError

MAX_SAFETENSORS_HEADER = 100_000_000  # the format's own limit
_HEAD = 4096  # bytes that tell what a file is
_ZIP_TAIL = 22 + 65535  # bytes: the record that ends a zip file, and the longest comment in it
_MAX_QUOTE = 160  # characters
_MAX_ENTRIES = 1000  # of a folder that is looked through
_AGAIN = "download it again"
_POINTERS = (
    (b"version https://git-lfs", f"a git-lfs pointer, not the file: {_AGAIN} (git lfs pull, or hf download)"),
    (b"# xet version", f"a git-xet pointer, not the file: {_AGAIN} (git xet, or hf download)"),
    (b"/annex/objects/", "a git-annex pointer, not the file: git annex get brings it"),
)
# Of a server, in place of a file of any kind; XML alone is no sign, as a picture may be some.
_PAGE = re.compile(
    rb"\s*(<!--.*?-->\s*)*<(!doctype\s+html|html|head)\b|\s*(<\?xml[^>]*>\s*)?<error\b"
    rb"|\s*\{\s*\"(error|message|detail)\"",
    re.IGNORECASE | re.DOTALL,
)
_PARTS = (".incomplete", ".part", ".partial", ".crdownload", ".download", ".aria2")
_GATED = re.compile(
    r"restricted|gated|authorized list|must (?:have access|be authenticated|accept)|awaiting a review"
    r"|log in|licen[cs]e|invalid (?:username|credentials)|unauthorized|access ?denied|forbidden",
    re.IGNORECASE,
)
_LICENCE = (
    "where the model's page on huggingface.co asks to accept a licence, do that first, then hf auth login, and "
    + _AGAIN
)
_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")


def fault(path: Path) -> str | None:
    """What the file `path` is instead of what its name says, and what to do; None where that cannot be told."""
    try:
        if not os.path.isfile(path):
            return None
        size = path.stat().st_size
        with path.open("rb") as file:
            head = file.read(_HEAD)
            if not size:
                return f"an empty file: {_AGAIN}"
            if (said := _words(head, size, is_json=path.suffix == ".json")) is not None:
                return said
            if (left := unfinished(path)) is not None:
                return left
            if not any(head) and size >= 8:
                return f"nothing but zeros at its start, room that a download never filled: {_AGAIN}"
            if path.suffix == ".safetensors":
                return _safetensors_cut(head[:8], size, path)
            if head.startswith(b"PK\x03\x04"):
                file.seek(max(0, size - _ZIP_TAIL))
                if b"PK\x05\x06" not in file.read(_ZIP_TAIL):
                    return f"{size} bytes without the directory that ends such a file, cut short: {_AGAIN}"
    except OSError as error:
        return f"a file that cannot be read: {error.strerror}"
    return None


def page_or_pointer(path: Path) -> str | None:
    """What a file of any kind is, a picture or a sound, if it is an empty one, a pointer or a web page; else None."""
    try:
        with path.open("rb") as file:
            head = file.read(_HEAD).removeprefix(b"\xef\xbb\xbf")
    except OSError:
        return None
    if not head or any(head.startswith(begin) for begin, _ in _POINTERS) or _PAGE.match(head):
        return fault(path)
    return None


def _words(head: bytes, size: int, *, is_json: bool) -> str | None:
    """What a file says of itself that holds words, of which a binary model file has none at its start."""
    start = head.removeprefix(b"\xef\xbb\xbf").lstrip()
    for begin, found in _POINTERS:
        if start.startswith(begin):
            return found
    try:
        # The last character of a long text may be cut.
        text = codecs.getincrementaldecoder("utf-8")().decode(start, final=size <= _HEAD)
    except UnicodeDecodeError:
        if not _PAGE.match(start):
            return None
        text = start.decode("latin-1")
    if not text or any(not (c.isprintable() or c in "\t\r\n\f") for c in text):
        return None
    if text.startswith("<"):
        kind = "an XML message" if re.match(r"<\?xml|<error", text, re.IGNORECASE) else "an HTML page"
        title = re.search(r"<(title|message)\b[^>]*>([^<]*)<", text, re.IGNORECASE)
        return _refusal(kind, title[2] if title else text)
    if (message := _error_message(text)) is not None:
        return _refusal("an error message", message)
    if is_json and text[0] in '{["-0123456789tfn':
        return None
    return _refusal("text", text)


def _refusal(kind: str, text: str) -> str:
    """A server's words, its first line quoted, with what to do about them."""
    line = next((line.strip() for line in text.splitlines() if line.strip()), "")
    quoted = f" ({line[:_MAX_QUOTE]!r})" if line else ""
    advice = _LICENCE if _GATED.search(text[:_HEAD]) else _AGAIN
    return f"{kind}{quoted}, not the file: {advice}"


def _error_message(text: str) -> str | None:
    try:
        content = json.loads(text)
    except (ValueError, RecursionError):
        return None
    if not isinstance(content, dict) or len(content) > 5:
        return None
    return next((str(content[k]) for k in ("error", "message", "detail") if content.get(k)), None)


def _safetensors_cut(start: bytes, size: int, path: Path) -> str | None:
    """Whether a safetensors file is shorter or longer than its own header says."""
    length = int.from_bytes(start, "little")
    if len(start) < 8 or not 2 <= length <= MAX_SAFETENSORS_HEADER:
        return f"{size} bytes, cut short: {_AGAIN}" if len(start) < 8 else None
    expected, exactly = 8 + length, "at least "
    if expected <= size:
        with path.open("rb") as file:
            file.seek(8)
            try:
                header = json.loads(file.read(length))
                ends = [int(i["data_offsets"][1]) for n, i in header.items() if n != "__metadata__"]
            except Exception:  # whatever a hostile header brings about: its own reader tells of it
                return None
        expected, exactly = expected + max(ends, default=0), ""
    if size == expected:
        return None
    how = "cut short" if size < expected else "too long"
    return f"a file that is {how}: expected {exactly}{expected} bytes by its header, found {size}: {_AGAIN}"


def unfinished(path: Path) -> str | None:
    """What a download has left of a file that is not there, or not whole; None where nothing tells of one."""
    if os.path.islink(path) and not os.path.exists(path):
        target = os.readlink(path)
        if "annex/objects/" in target.replace(os.sep, "/"):
            return "a git-annex link without its content: git annex get brings it"
        part = _part_of(path.parent / target)
        if part is not None:
            return f"a link to {target}, of which only a part is there ({_sized(part)}): {_AGAIN}"
        return f"a link to {target}, which is not there: {_AGAIN}"
    if os.path.isfile(path):
        # It has its full length from the beginning, which only the file beside it gives away.
        control = path.with_name(f"{path.name}.aria2")
        return f"a download that has not ended ({control.name} is beside it)" if _exists(control) else None
    part = _part_of(path)
    return None if part is None else f"only a part of it ({_sized(part)}): its download has not ended"


def _part_of(path: Path) -> Path | None:
    """An unfinished download of `path`: beside it, or where hf download --local-dir keeps those."""
    names = (f"{path.name}.", f".{path.name}.")
    for entry in _entries(path.parent):
        if entry.name.startswith(names) and (entry.suffix in _PARTS or entry.name[0] == "."):
            return entry
    hashed = base64.urlsafe_b64encode(
        hashlib.sha1(f"{path.name}.metadata".encode("utf-8", "surrogatepass")).digest()
    ).decode()
    for root in islice(path.parents, 3):
        kept = root / ".cache" / "huggingface" / "download" / path.parent.relative_to(root)
        for entry in _entries(kept):
            if entry.suffix == ".incomplete" and entry.name.startswith((hashed, *names)):
                return entry
    return None


def _sized(part: Path) -> str:
    try:
        return f"{part}, {part.stat().st_size} bytes"
    except OSError:
        return str(part)


def _exists(path: Path) -> bool:
    return os.path.lexists(path)  # unlike Path.exists, also False for a name that no file system takes


def _entries(folder: Path) -> list[Path]:
    try:
        with os.scandir(folder) as found:
            return sorted(folder / entry.name for entry in islice(found, _MAX_ENTRIES))
    except (OSError, ValueError):
        return []


def absence(path: Path) -> str:
    """What there is instead of the file `path`, which is none."""
    if os.path.isdir(path):
        return "a folder"
    return unfinished(path) or ("something that is no file" if _exists(path) else contents(path.parent))


def hints(paths: Iterable[Path]) -> str:
    """Of files that are not there or not whole, "; NAME: what is there" for each of which that can be told."""
    known = ((path, fault(path) or unfinished(path)) for path in paths)
    return "".join(f"; {path.name}: found {found}" for path, found in known if found is not None)


def contents(folder: Path) -> str:
    """What a folder holds, for messages."""
    if os.path.islink(folder) and not os.path.exists(folder):
        return f"no folder {folder}: it is a link to {os.readlink(folder)}, which is not there"
    if not os.path.isdir(folder):
        return f"no folder {folder}{_if_hub_name(folder)}"
    if not os.access(folder, os.R_OK | os.X_OK):
        return "a folder that cannot be read: permission denied"
    names = [entry.name for entry in _entries(folder)]
    shown = ", ".join(names[:8]) + (", ..." if len(names) > 8 else "")
    return (f"only: {shown}" if names else "an empty folder") + _if_hub_cache(folder)


def _if_hub_name(folder: Path) -> str:
    name = folder.as_posix()
    if not _HUB_NAME.fullmatch(name) or name[0] == "." or os.path.isdir(folder.parent):
        return ""
    return (
        f" (if {name} is a model's name on huggingface.co: nothing is ever downloaded here; magihuman-fast --help and "
        "the README show how to download it)"
    )


def _if_hub_cache(folder: Path) -> str:
    revisions = [entry for entry in _entries(folder / "snapshots") if entry.is_dir()]
    if not revisions:
        return ""
    return f" (a folder of the hub's cache: give {' or '.join(map(str, revisions[:3]))})"


def require_root(root: Path) -> Path:
    """Return `root` if it is a folder.

    Raises:
        CheckpointError: it is none; says so, and what a name of another kind may mean.
    """
    if os.path.isdir(root):  # unlike Path.is_dir, also False for a name that no file system takes
        return root
    found = "a file" if os.path.isfile(root) else contents(root)
    raise CheckpointError(f"{root}: expected the checkpoint's root folder, found {found}")


def meant_instead(root: Path, folders: Iterable[str]) -> str:
    """Which folder was meant by a `root` without the `folders` of a checkpoint, as the end of a message; or ""."""
    folders = list(folders)
    near = [root.absolute().parent, *_entries(root / "snapshots")]
    for entry in islice(_entries(root), 50):
        near += [entry, *_entries(entry / "snapshots")]
    for candidate in near:
        if any(os.path.isdir(candidate / name) for name in folders):
            return f"; was {candidate} meant?"
    if _exists(root / "model.safetensors.index.json"):
        return f"; this looks like one model's folder: give the folder above it, {root.absolute().parent}"
    return ""


def require_folders(root: Path, folders: Iterable[str]) -> None:
    """Refuse a root folder that lacks one of a checkpoint's `folders`.

    Raises:
        CheckpointError: names what is missing, what is there, and the folder that was meant where one can tell.
    """
    folders = list(folders)
    require_root(root)
    missing = [name for name in folders if not os.path.isdir(root / name)]
    if missing:
        hint = meant_instead(root, folders) if len(missing) == len(folders) else ""
        dangling = "".join(
            f"; {name}: {contents(root / name)}" for name in missing if os.path.islink(root / name)
        )
        raise CheckpointError(
            f"{root}: expected {', '.join(f'{name}/' for name in missing)} in the checkpoint's root folder, found "
            f"{contents(root)}{dangling}{hint}"
        )
