"""Where an operation runs: the choice of a backend, and the call into a compiled module."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache
from importlib import import_module
from threading import Lock
from types import ModuleType
from typing import Literal, get_args

import torch

from ..model.dit import Offsets
from .tensor_checks import check_offsets, check_tensor, require

Backend = Literal["gpu", "sim", "reference"]
BACKENDS: tuple[Backend, ...] = get_args(Backend)


@cache
def _module(name: str) -> ModuleType | None:
    try:
        return import_module(f".{name}", __package__)
    except ModuleNotFoundError:
        return None


@cache
def _driver_too_old(kernels: ModuleType) -> str | None:
    """A driver runs what was built with its own major version of CUDA or an older one."""
    built, driver = kernels.cuda_versions()
    if driver == 0 or driver // 1000 >= built // 1000:
        return None

    def release(version: int) -> str:
        return f"{version // 1000}.{version % 1000 // 10}"

    return (
        f"the driver supports CUDA {release(driver)}, the kernels were built with {release(built)}: "
        "update the driver"
    )


def gpu_unavailable(device: torch.device | str | None = None) -> str | None:
    """Why the kernels cannot run on `device` (None: the current CUDA device); None where they can."""
    kernels = _module("_C")
    if kernels is None:
        return (
            "kernels not compiled: there was no nvcc when the package was installed (in a clone: make build)"
        )
    # First: with such a driver torch may see no device.
    too_old = _driver_too_old(kernels)
    if too_old is not None:
        return too_old
    if not torch.cuda.is_available():
        return "no CUDA device"
    device = torch.device("cuda" if device is None else device)
    if device.type != "cuda":
        return f"the device is {device}, not a GPU"
    capability = torch.cuda.get_device_capability(device)
    if capability != (9, 0):
        return f"{torch.cuda.get_device_name(device)} is not a Hopper GPU (compute capability 9.0)"
    return None


def driver_cuda_version() -> int:
    """The newest version of CUDA that the driver supports, 13000 for 13.0; 0: no driver, or kernels not compiled."""
    kernels = _module("_C")
    return 0 if kernels is None else int(kernels.cuda_versions()[1])


def simulator() -> ModuleType:
    """The simulator module: `set_seed`, `set_multiprocessor_count`, `Error`.

    Raises:
        RuntimeError: this is no development build.
    """
    module = _module("_sim")
    if module is None:
        raise RuntimeError(
            "backend 'sim': magihuman_fast.kernels._sim is not built; it comes with an editable install"
        )
    return module


def choose_backend(op: str, tensor: torch.Tensor, backend: Backend | None) -> Backend:
    """The backend that an operation on `tensor` runs on."""
    chosen = "gpu" if backend is None else backend
    require(chosen in BACKENDS, f"{op}: backend", f"one of {BACKENDS} or None", repr(backend))
    if chosen == "gpu":
        where = f"{op}: backend {'None, which is ' if backend is None else ''}'gpu'"
        require(tensor.device.type == "cuda", where, "CUDA tensors", f"tensors on {tensor.device}")
        reason = gpu_unavailable(tensor.device)
        if reason is not None:
            raise RuntimeError(f"{where}: {reason}")
    elif chosen == "sim":
        require(
            tensor.device.type == "cpu", f"{op}: backend 'sim'", "CPU tensors", f"tensors on {tensor.device}"
        )
    return chosen


def launch(
    backend: Backend, op: str, tensors: Mapping[str, torch.Tensor | None], **numbers: int | float
) -> None:
    """Call the launcher `op` of a compiled module; the tensors are passed as addresses."""
    addresses = {name: 0 if t is None else t.data_ptr() for name, t in tensors.items()}
    if backend == "gpu":
        device = next(t.device for t in tensors.values() if t is not None)
        with torch.cuda.device(device):
            stream = torch.cuda.current_stream(device).cuda_stream
            getattr(_module("_C"), op)(**addresses, **numbers, stream=stream)
        return
    module = simulator()
    try:
        for name, t in tensors.items():
            if t is not None and t.numel() > 0:
                extent = 1 + sum((size - 1) * step for size, step in zip(t.shape, t.stride(), strict=True))
                module.register_buffer(t.data_ptr(), extent * t.itemsize, name)
        getattr(module, op)(**addresses, **numbers, stream=0)
    finally:
        module.clear_buffers()


# torch hands streams out in turn, 32 for each device and priority: of more objects, some are the same stream. What is
# launched on a stream under capture becomes part of the graph, so captures have a priority to themselves, which is also
# that of the graph's kernels: they go before what runs beside them.
_SIDE_PRIORITY, _CAPTURE_PRIORITY = -1, -2
_capture_streams: dict[int, torch.cuda.Stream] = {}
# Before a capture torch synchronises the device, which would break another one that is under way.
_one_capture_at_a_time = Lock()


def side_stream(device: torch.device) -> torch.cuda.Stream:
    """A stream of `device` for what runs beside the current stream; never the one that graphs are captured on."""
    return torch.cuda.Stream(device, priority=_SIDE_PRIORITY)


def capture_graph(run: Callable[[], object], device: torch.device) -> torch.cuda.CUDAGraph:
    """What `run` launches on `device`, captured without running it, on a stream that serves nothing else.

    It must have run once before, on any other stream, so that no kernel has to be loaded, and must not allocate.
    Whoever replays the graph keeps every buffer that it reads or writes. Captures wait for one another; other threads
    may launch, allocate and copy meanwhile.
    """
    graph = torch.cuda.CUDAGraph()
    # Set the caller's stream, to set it again in the end: torch leaves that of a capture that failed.
    callers = torch.cuda.stream(torch.cuda.current_stream(device))
    with _one_capture_at_a_time, torch.cuda.device(device), callers:
        index = torch.cuda.current_device()
        stream = _capture_streams.get(index)
        if stream is None:
            stream = _capture_streams[index] = torch.cuda.Stream(device, priority=_CAPTURE_PRIORITY)
        with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
            run()
    return graph


def host_ranges(offsets: torch.Tensor | None, rows: int) -> Offsets:
    """Row ranges as numbers, for the reference; reading them off a GPU waits for it."""
    if offsets is None:
        return (0, rows, rows, rows)
    first, audio, text, end = offsets.tolist()
    return (first, audio, text, end)


def check_groups(
    op: str, weight: torch.Tensor, offsets: torch.Tensor | None, rows: int, device: torch.device
) -> int:
    """Check that experts and offsets fit; the number of experts."""
    groups = len(weight)
    require(groups in (1, 3), f"{op}: weight", "1 or 3 experts on the leading axis", groups)
    if offsets is None:
        require(groups == 1, f"{op}: modality_offsets", "offsets, because there are 3 experts", None)
    else:
        check_offsets(f"{op}: modality_offsets", offsets, rows, device)
    return groups


def output_or_new(
    where: str, out: torch.Tensor | None, shape: tuple[int, ...], dtype: torch.dtype, like: torch.Tensor
) -> torch.Tensor:
    """`out` checked, or a new tensor whose row pitch fits."""
    if out is None:
        pitch = -(-shape[-1] // 8) * 8
        out = torch.empty((*shape[:-1], pitch), dtype=dtype, device=like.device)[..., : shape[-1]]
    check_tensor(where, out, shape, dtype, like.device, pitched=True)
    return out
