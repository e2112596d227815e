"""Which kernels may be used on a device: those that have agreed with PyTorch there, which is checked once and kept.

The answer depends on the GPU, its driver, torch, the compiled kernels, and the Python around them. It is kept under
these in the user's cache folder, as JSON, and is then there at once. A cache that cannot be read or written costs a
check each time, no more.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import tempfile
import threading
import time
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from types import NoneType
from typing import Any, get_args

import torch

from ...guards.number_checks import apart
from .. import ops
from ..launch import driver_cuda_version
from .cases import CASES
from .child import Finding, Limits, Verdict, check_in_children, gpu_uuid
from .comparison import Part

log = logging.getLogger(__name__)

LIMITS = Limits()
FOLDER = "magihuman_fast"
_PACKAGE = Path(__file__).parents[2]
# What is compiled for a backend; and what launches that, what it is held to, and how.
LIBRARIES: dict[ops.Backend, tuple[str, ...]] = {
    "gpu": ("kernels/libmagihuman_kernels.so", "kernels/_C.*.so"),
    "sim": ("kernels/_sim.*.so",),
    "reference": (),
}
SOURCES = ("kernels/*.py", "kernels/self_check/*.py", "model/*.py")


@dataclass(frozen=True)
class KernelReport:
    """The findings of one check, and the device, driver, torch and build that they hold for."""

    made_for: dict[str, str]
    findings: tuple[Finding, ...]

    @property
    def settled(self) -> bool:
        """Nothing that checking again could change: in either part something is wrong, or everything right.

        A kernel that did not end in time may do so when nobody else uses the GPU.
        """
        for part in ("models", "decoder"):
            found = [f for f in self.findings if CASES[f.kernel].part == part]
            wrong = any(f.verdict == "wrong" and not f.timed_out for f in found)
            if not wrong and any(f.verdict != "right" for f in found):
                return False
        return True

    def why_not(self, *parts: Part) -> str | None:
        """Why the kernels of these parts (default: of all) must not be used, naming them; None where they may."""
        found = [f for f in self.findings if not parts or CASES[f.kernel].part in parts]
        bad = [f for f in found if f.verdict == "wrong"]
        if bad:
            named = "; ".join(f"{f.kernel} {said(f)}" for f in bad[:3])
            more = f"; and {len(bad) - 3} more" if len(bad) > 3 else ""
            return f"{len(bad)} of {len(found)} kernels are wrong on this GPU: {named}{more}"
        unchecked = [f for f in found if f.verdict == "unchecked"]
        if unchecked:
            return (
                f"{len(unchecked)} of {len(found)} kernels could not be checked, the first because "
                f"{unchecked[0].detail} (check_kernels=False uses them unchecked)"
            )
        return None


def said(finding: Finding) -> str:
    """What came out for a kernel, in words."""
    if finding.error is None or finding.allowed is None or finding.verdict == "right":
        return finding.detail or finding.verdict
    error, allowed = apart((finding.error, finding.allowed), lambda value, digits: f"{value:.{digits}g}", 3)
    return f"{finding.detail} by {error}, allowed are {allowed}"


_lock = threading.Lock()
_known: dict[tuple[str, ops.Backend], KernelReport] = {}


def why_not(device: torch.device | str, *parts: Part, check: bool | None = None) -> str | None:
    """Why the kernels must not be used on a GPU that they are compiled for; None where they may.

    Args:
        parts: "models", "decoder"; by default both.
        check: None takes what is known of this GPU and build, and checks where nothing is; True checks anew; False
            takes the kernels on trust.
    """
    if check is False:
        return None
    return examine(device, anew=check is True).why_not(*parts)


def examine(
    device: torch.device | str,
    *,
    anew: bool = False,
    backend: ops.Backend = "gpu",
    limits: Limits | None = None,
) -> KernelReport:
    """Check every kernel on `device`, or tell what an earlier check found, in this process or in another.

    The kernels run in child processes (`child`): this process is safe from what they do, and waits some
    seconds for their start, at most `limits.total`. `anew` checks whatever is known.
    """
    device = _numbered(device)
    with _lock:
        report = None if anew else _recall(device, backend)
        if report is None:
            report = _check(device, backend, LIMITS if limits is None else limits)
        _known[str(device), backend] = report
        return report


def known(device: torch.device | str, backend: ops.Backend = "gpu") -> KernelReport | None:
    """What is known without checking anything; None: nothing."""
    with _lock:
        return _recall(_numbered(device), backend)


def forget() -> None:
    """Know only what is in the cache folder, as a new process does."""
    with _lock:
        _known.clear()


def _check(device: torch.device, backend: ops.Backend, limits: Limits) -> KernelReport:
    log.info("checking the kernels once for this GPU and build; this takes some seconds")
    start = time.perf_counter()
    findings = check_in_children(list(CASES), device, backend, limits)
    log.info("checked %d kernels in %.1f s", len(findings), time.perf_counter() - start)
    report = KernelReport(_made_for(device, backend), tuple(findings))
    if report.settled:
        _keep(report)
    return report


def _recall(device: torch.device, backend: ops.Backend) -> KernelReport | None:
    return _known.get((str(device), backend)) or _read(_made_for(device, backend))


def _numbered(device: torch.device | str) -> torch.device:
    device = torch.device(device)
    if device.type != "cuda":
        return device
    return torch.device("cuda", torch.cuda.current_device() if device.index is None else device.index)


# --- the cache ------------------------------------------------------------------------------------------------


def driver_version() -> str | None:
    """Of NVIDIA's driver, where there is one."""
    try:
        text = Path("/proc/driver/nvidia/version").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    match = re.search(r"\s(\d{3}\.[\d.]+)\s", text)
    return match[1] if match else None


def _made_for(device: torch.device, backend: ops.Backend) -> dict[str, str]:
    """Everything that a finding depends on."""
    found = {"device": device.type, "backend": backend, "build": _build(backend)}
    if device.type == "cuda":
        found |= {"device": torch.cuda.get_device_properties(device).name, "uuid": gpu_uuid(device)}
        found["cuda"] = str(driver_cuda_version())
    return found | {"driver": driver_version() or "", "torch": torch.__version__}


@cache
def _build(backend: ops.Backend) -> str:
    """A digest of what is compiled for a backend, of what launches it, and of the check."""
    digest = hashlib.sha256()
    for pattern in (*LIBRARIES[backend], *SOURCES):
        for path in sorted(_PACKAGE.glob(pattern)):
            digest.update(f"{path.relative_to(_PACKAGE)} {path.stat().st_size}\n".encode())
            digest.update(path.read_bytes())
    return digest.hexdigest()


def cache_file(made_for: dict[str, str]) -> Path | None:
    """Where the findings for a device and build are kept; None where there is no place."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    try:
        folder = Path(base) if os.path.isabs(base) else Path.home() / ".cache"
    except RuntimeError:  # no home
        return None
    key = json.dumps(made_for, sort_keys=True)
    return folder / FOLDER / f"kernels-{hashlib.sha256(key.encode()).hexdigest()[:16]}.json"


def _read(made_for: dict[str, str]) -> KernelReport | None:
    """What was kept, if it is whole and made for this."""
    path = cache_file(made_for)
    if path is None or not path.is_file():
        return None
    try:
        values: Any = json.loads(path.read_text(encoding="utf-8"))
        report = KernelReport(values["made_for"], tuple(Finding(**f) for f in values["findings"]))
        ours = report.made_for == made_for and [f.kernel for f in report.findings] == list(CASES)
        if ours and all(map(_is_whole, report.findings)) and report.settled:
            return report
        log.debug("%s: not what is kept there, ignored", path)
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        log.debug("%s: not readable, ignored: %s", path, error)
    return None


def _is_whole(finding: Finding) -> bool:
    numbers = (finding.error, finding.allowed, finding.seconds)
    return finding.verdict in get_args(Verdict) and all(
        isinstance(n, (int, float, NoneType)) for n in numbers
    )


def _keep(report: KernelReport) -> None:
    """Written aside, then renamed: whoever reads meanwhile finds the old file or the new one."""
    path = cache_file(report.made_for)
    if path is None:
        return
    values = {"made_for": report.made_for, "findings": [asdict(f) for f in report.findings]}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, aside = tempfile.mkstemp(dir=path.parent, prefix=path.stem, suffix=".part")
        try:
            with os.fdopen(handle, "w", encoding="utf-8") as file:
                json.dump(values, file, indent=1)
            os.replace(aside, path)
        except BaseException:
            with suppress(OSError):
                os.unlink(aside)
            raise
    except OSError as error:
        log.debug("%s: what was found about the kernels is not kept: %s", path, error)
