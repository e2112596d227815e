"""One case per kernel and model shape: the kernel through `magihuman_fast.ops`, and baselines on equal inputs.

On a GPU the subject is the kernel; elsewhere it is the operation's plain PyTorch form, which runs anywhere. A fused
product's baseline is cuBLAS followed by its epilogue compiled by torch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch

from magihuman_fast.kernels import ops
from magihuman_fast.model.config import AUDIO_CHANNELS, DiTConfig
from magihuman_fast.model.dit import GATE_MAX, NORM_EPS, SIGMOID_SLOPE
from timing import Call, Ceilings, HostStopwatch, Result, measure
from workload import CLIPS, Tokens, gemm_bytes, gemm_flops, padded

BF16 = torch.bfloat16
SAMPLER_STEPS = 8
Inputs = dict[str, Any]
Emit = Callable[[Result], object]
Fail = Callable[[str, str, str, Exception], object]


@dataclass(frozen=True)
class Setting:
    """A clip, a model configuration, and where the operations run."""

    clip: Tokens
    config: DiTConfig
    device: str
    backend: ops.Backend
    num_sms: int = 0  # of the products' and attention's persistent grids; 0: all

    @property
    def subject(self) -> str:
        return "kernel" if self.backend == "gpu" else self.backend

    def offsets(self) -> torch.Tensor:
        return torch.tensor(self.clip.offsets, dtype=torch.int32, device=self.device)

    def normal(self, *shape: int, scale: float = 1.0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """Random normal values; on a CPU one block of them repeated, since drawing would take longer than timing."""
        out = torch.empty(shape, dtype=dtype, device=self.device)
        if out.is_cuda:
            return out.normal_(std=scale)
        block = torch.randn(min(out.numel(), 1 << 16)).mul_(scale).to(dtype)
        flat = out.view(-1)
        whole = len(flat) // len(block) * len(block)
        flat[:whole].view(-1, len(block)).copy_(block)
        flat[whole:] = block[: len(flat) - whole]
        return out


def gpu_setting(size: str) -> Setting:
    return Setting(CLIPS[size], DiTConfig(), "cuda", "gpu")


# A handful of rows at full width: what a CPU times in about a second.
REDUCED = Setting(Tokens("reduced rows", (2, 2, 4), 4, 4), DiTConfig(), "cpu", "reference")
# Everything small: exercises the code, measures nothing.
TINY = Setting(
    Tokens("tiny", (2, 2, 4), 4, 4),
    DiTConfig(num_layers=3, hidden_size=256, num_query_groups=1, mm_layers=(0, 2), gelu7_layers=(0,)),
    "cpu",
    "reference",
)


@dataclass(frozen=True)
class Variant:
    """One way of computing a case: `make` prepares fresh inputs and returns the call that is timed."""

    name: str
    make: Callable[[], Call]


@dataclass(frozen=True)
class Case:
    """An operation at one shape. The first variant is the subject, the second the baseline it is compared with."""

    op: str
    shape: str
    flops: int
    nbytes: int
    variants: tuple[Variant, ...]
    note: str = ""
    footprint: int | None = None  # bytes one call passes through the cache, where that is not `nbytes`
    on_host: bool = False  # the call itself waits for the device


def run_case(
    case: Case,
    device: str,
    ceilings: Ceilings,
    emit: Emit,
    fail: Fail,
    *,
    at_once: Emit | None = None,
    **options: Any,
) -> None:
    """Time every variant of a case. One that raises is reported to `fail`; the others are timed all the same.

    `at_once`: told of each result as soon as it is there, which is before it has been compared.
    """
    results: list[Result] = []
    touched = case.nbytes if case.footprint is None else case.footprint
    if case.on_host:
        options["stopwatch"] = HostStopwatch()
    for variant in case.variants:
        try:
            with torch.no_grad():
                timing = measure(variant.make, nbytes=touched, device=device, **options)
        except Exception as error:
            fail(case.op, case.shape, variant.name, error)
            continue
        result = Result(
            case.op, case.shape, variant.name, timing, case.flops, case.nbytes, device, note=case.note
        )
        results.append(result.with_peak(ceilings))
        if at_once is not None:
            at_once(results[-1])
        if device != "cpu":
            torch.cuda.empty_cache()
    subject = case.variants[0].name
    others = [
        result for result in results if not result.variant.startswith(subject)
    ]  # its tiles are no baseline
    if others and results[0].variant == subject:
        results[0] = results[0].against(others[0])
    for result in results:
        emit(result)


# --- matrix products ------------------------------------------------------------------------------------------


def product_inputs(s: Setting, n: int, k: int, groups: int) -> Inputs:
    """Activations, stacked weights with unit gain, and offsets."""
    return {
        "a": s.normal(s.clip.rows, k, dtype=BF16),
        "w": s.normal(groups, n, k, scale=k**-0.5, dtype=BF16),
        "modality_offsets": s.offsets(),
    }


def inputs_of(op: str, s: Setting, n: int, k: int, groups: int) -> Inputs:
    """Arguments of `ops.<op>` for a product of N by K; outputs included, so that a call allocates nothing."""
    c, m = s.config, s.clip.rows
    inputs = product_inputs(s, n, k, groups)
    if op == "gemm_residual":
        return inputs | {"x": s.normal(m, n)}
    if op == "gemm_qkv":
        d = c.head_dim
        q, key, value = (
            torch.empty(m, heads, d, dtype=BF16, device=s.device)
            for heads in (c.num_q_heads, c.num_kv_heads, c.num_kv_heads)
        )
        gate = torch.empty(m, c.num_q_heads, device=s.device)
        angle = s.normal(m, c.rotary_dim // 2)
        return inputs | {
            "q_norm": s.normal(groups, d, scale=0.1),
            "k_norm": s.normal(groups, d, scale=0.1),
            "rope": torch.cat([angle.sin(), angle.cos()], 1),
            "num_q_heads": c.num_q_heads,
            "num_kv_heads": c.num_kv_heads,
            "out": ops.QkvGate(q, key, value, gate),
        }
    columns = padded(n // 2) if op == "gemm_swiglu7" else n
    return inputs | {"out": torch.empty(m, columns, dtype=BF16, device=s.device)}


def bytes_per_row(op: str, s: Setting, n: int) -> int:
    """Bytes that a product's epilogue reads and writes per row."""
    c = s.config
    if op == "gemm_residual":
        return 8 * n
    if op == "gemm_swiglu7":
        return 2 * padded(n // 2)
    if op == "gemm_qkv":
        return 2 * (n - c.num_q_heads) + 4 * c.num_q_heads + 4 * c.rotary_dim
    return 2 * n


def grouped_product(a: torch.Tensor, w: torch.Tensor, offsets: tuple[int, ...], out: torch.Tensor) -> None:
    """cuBLAS: one product, or one per modality."""
    if len(w) == 1:
        torch.mm(a, w[0].t(), out=out)
        return
    for expert, (first, last) in zip(w, pairwise(offsets), strict=True):
        torch.mm(a[first:last], expert.t(), out=out[first:last])


def residual(u: torch.Tensor, given: Inputs) -> torch.Tensor:
    return given["x"].add_(u)


def gelu7(u: torch.Tensor, given: Inputs) -> torch.Tensor:
    a = u.float().clamp(max=GATE_MAX)
    return (a * torch.sigmoid(SIGMOID_SLOPE * a)).bfloat16()


def swiglu7(u: torch.Tensor, given: Inputs) -> torch.Tensor:
    gate, linear = u.unflatten(-1, (-1, 2)).float().unbind(-1)
    gate = gate.clamp(max=GATE_MAX)
    return (gate * torch.sigmoid(SIGMOID_SLOPE * gate) * (linear.clamp(-GATE_MAX, GATE_MAX) + 1)).bfloat16()


def qkv(u: torch.Tensor, given: Inputs) -> tuple[torch.Tensor, ...]:
    hq, hkv = given["num_q_heads"], given["num_kv_heads"]
    d = given["q_norm"].shape[1]
    q, k, v, gate = u.split([hq * d, hkv * d, hkv * d, hq], 1)
    sin, cos = given["rope"].unsqueeze(1).chunk(2, -1)
    half = sin.shape[-1]
    outs = []
    for part, norm in ((q, given["q_norm"]), (k, given["k_norm"])):
        heads = _normed(part.unflatten(1, (-1, d)).float(), norm, given["expert"])
        a, b, rest = heads.split([half, half, d - 2 * half], -1)
        outs.append(torch.cat([a * cos - b * sin, b * cos + a * sin, rest], -1).bfloat16())
    return (*outs, v.contiguous(), gate.float())


def _normed(x: torch.Tensor, weight: torch.Tensor, expert: torch.Tensor | None) -> torch.Tensor:
    """RMSNorm over the last axis of x (M, ..., D), weights (E, D); expert (M,) names each row's, None: the first."""
    scale = 1 + (weight[0] if expert is None else weight[expert])
    if expert is not None and x.ndim == 3:
        scale = scale.unsqueeze(1)
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + NORM_EPS) * scale


EPILOGUES: dict[str, Callable[[torch.Tensor, Inputs], Any]] = {
    "gemm_residual": residual,
    "gemm_gelu7": gelu7,
    "gemm_swiglu7": swiglu7,
    "gemm_qkv": qkv,
}


def compiled(function: Callable[..., Any], device: str) -> Callable[..., Any]:
    """By torch's own compiler on a GPU. Elsewhere only traced: a C++ compiler would take longer than the work."""
    torch._dynamo.reset()
    return torch.compile(function, dynamic=False, backend="inductor" if device == "cuda" else "eager")


def experts_of_rows(s: Setting, groups: int) -> torch.Tensor | None:
    if groups == 1:
        return None
    counts = torch.tensor([s.clip.video, s.clip.audio, s.clip.text])
    return torch.repeat_interleave(torch.arange(3), counts).to(s.device)


def bound(op: str, s: Setting, inputs: Inputs) -> Call:
    function = getattr(ops, op)
    grid = {"num_sms": s.num_sms} if s.num_sms else {}
    return lambda: function(**inputs, **grid, backend=s.backend)


def product_case(op: str, s: Setting, n: int, k: int, groups: int) -> Case:
    m = s.clip.rows

    def subject() -> Call:
        return bound(op, s, inputs_of(op, s, n, k, groups))

    def cublas() -> Call:
        given = product_inputs(s, n, k, groups)
        out = torch.empty(m, n, dtype=BF16, device=s.device)
        return lambda: grouped_product(given["a"], given["w"], s.clip.offsets, out)

    epilogue = None

    def cublas_and_epilogue() -> Call:
        nonlocal epilogue
        epilogue = compiled(EPILOGUES[op], s.device) if epilogue is None else epilogue
        run, given = epilogue, inputs_of(op, s, n, k, groups) | {"expert": experts_of_rows(s, groups)}
        a, w = given.pop("a"), given.pop("w")
        given = {key: value for key, value in given.items() if key not in ("out", "modality_offsets")}
        u = torch.empty(m, n, dtype=BF16, device=s.device)

        def call() -> object:
            grouped_product(a, w, s.clip.offsets, u)
            return run(u, given)

        return call

    variants = [Variant(s.subject, subject)]
    if op == "gemm":
        variants.append(Variant("cuBLAS", cublas))
    else:
        variants += [
            Variant("cuBLAS + compiled epilogue", cublas_and_epilogue),
            Variant("cuBLAS alone", cublas),
        ]
    experts = "" if groups == 1 else ", 3 experts"
    nbytes = gemm_bytes(m, n, k, groups, bytes_per_row(op, s, n))
    return Case(op, f"{s.clip.name}: {m} x {n} x {k}{experts}", gemm_flops(m, n, k), nbytes, tuple(variants))


def gemm_cases(s: Setting) -> Iterator[Case]:
    """The plain product at the model's four shapes."""
    c = s.config
    hidden, heads = c.hidden_size, c.head_dim * (c.num_q_heads + 2 * c.num_kv_heads)
    width = c.intermediate(c.num_layers - 1)
    for n, k in ((heads, hidden), (hidden, hidden), (2 * width, hidden), (hidden, padded(width))):
        yield product_case("gemm", s, n, k, 1)


def fused_cases(s: Setting) -> Iterator[Case]:
    """The products with their epilogues, in layers with one expert and in layers with three."""
    c = s.config
    hidden, width = c.hidden_size, c.intermediate(c.num_layers - 1)
    for groups in (1, 3):
        yield product_case("gemm_qkv", s, c.qkvg_rows, hidden, groups)
        yield product_case("gemm_residual", s, hidden, hidden, groups)
        yield product_case("gemm_swiglu7", s, 2 * width, hidden, groups)
        yield product_case("gemm_residual", s, hidden, padded(width), groups)
    yield product_case("gemm_gelu7", s, 4 * hidden, hidden, 3)
    yield product_case("gemm_residual", s, hidden, 4 * hidden, 3)


# --- pointwise ------------------------------------------------------------------------------------------------


# Operations whose inputs follow from the clip alone.
UPDATES = ("renoise_step", "unipc_step", "clamp_image")
POINTWISE = ("embed", "head", *UPDATES)


def norm_inputs(s: Setting, groups: int) -> Inputs:
    m, h = s.clip.rows, s.config.hidden_size
    out = torch.empty(m, h, dtype=BF16, device=s.device)
    given = {"x": s.normal(m, h), "weight": s.normal(groups, h, scale=0.1), "out": out}
    return given | {"modality_offsets": s.offsets()}


def pointwise_inputs(op: str, s: Setting) -> Inputs:
    """Arguments of `ops.<op>` for an operation of `POINTWISE`, outputs included."""
    c, clip = s.config, s.clip
    m, h, latent, channels = clip.rows, c.hidden_size, clip.latent, c.video_in_channels
    if op == "embed":
        return {
            "video": s.normal(*latent),
            "audio": s.normal(clip.audio, AUDIO_CHANNELS),
            "text_embedding": s.normal(clip.text, h),
            "video_weight": s.normal(h, channels, scale=channels**-0.5),
            "video_bias": s.normal(h, scale=0.02),
            "audio_weight": s.normal(h, AUDIO_CHANNELS, scale=AUDIO_CHANNELS**-0.5),
            "audio_bias": s.normal(h, scale=0.02),
            "modality_offsets": s.offsets(),
            "out": torch.empty(m, h, device=s.device),
        }
    if op == "head":
        return {
            "x": s.normal(m, h),
            "video_norm": s.normal(h, scale=0.1),
            "audio_norm": s.normal(h, scale=0.1),
            "video_weight": s.normal(channels, h, scale=h**-0.5),
            "audio_weight": s.normal(AUDIO_CHANNELS, h, scale=h**-0.5),
            "modality_offsets": s.offsets(),
            "video_out": torch.empty(latent, device=s.device),
            "audio_out": torch.empty(clip.audio, AUDIO_CHANNELS, device=s.device),
        }
    if op == "clamp_image":
        return {"video": s.normal(*latent), "image": s.normal(latent[0], *latent[2:])}
    columns = 3 if op == "renoise_step" else 9
    given = {
        "x": s.normal(*latent),
        "velocity": s.normal(*latent),
        # Factors that sum to less than one: the state stays finite however often the step is repeated.
        "table": torch.rand(SAMPLER_STEPS, columns, device=s.device).mul_(0.1).add_(0.05),
        "step": torch.tensor([SAMPLER_STEPS // 2], dtype=torch.int32, device=s.device),
    }
    if op == "renoise_step":
        return given | {"noise": s.normal(SAMPLER_STEPS, *latent)}
    return given | {
        "x_last": s.normal(*latent),
        "history": s.normal(2, *latent),
        "null_velocity": s.normal(*latent),
        "guidance": s.normal(SAMPLER_STEPS, clip.grid[0]),
    }


def pointwise_cost(op: str, s: Setting) -> tuple[int, int]:
    """Operations and bytes of an operation of `POINTWISE`. Products here are in float32, on no matrix unit."""
    c, clip = s.config, s.clip
    h, elements = c.hidden_size, clip.video * c.video_in_channels
    if op in UPDATES:
        # Of 4 bytes: x, velocity and noise read, x written; both velocities, x_last, both predictions and x read and
        # three of them written; one frame read and written.
        numbers = {"renoise_step": 4, "unipc_step": 9, "clamp_image": 2}[op]
        return 0, 4 * numbers * elements // (clip.grid[0] if op == "clamp_image" else 1)
    flops = 2 * h * (elements + clip.audio * AUDIO_CHANNELS)
    latents = elements + clip.audio * AUDIO_CHANNELS
    rows = clip.rows + clip.text if op == "embed" else clip.video + clip.audio
    return flops, 4 * (latents + h * (rows + c.video_in_channels + AUDIO_CHANNELS))


def norm_case(s: Setting, groups: int) -> Case:
    m, h = s.clip.rows, s.config.hidden_size

    def by_compiler() -> Call:
        run, given = compiled(lambda x, w, e: _normed(x, w, e).bfloat16(), s.device), norm_inputs(s, groups)
        x, weight, expert = given["x"], given["weight"], experts_of_rows(s, groups)
        return lambda: run(x, weight, expert)

    subject = Variant(s.subject, lambda: bound("rms_norm", s, norm_inputs(s, groups)))
    experts = "" if groups == 1 else ", 3 experts"
    variants = (subject, Variant("compiled", by_compiler))
    return Case("rms_norm", f"{s.clip.name}: {m} x {h}{experts}", 0, 6 * m * h + 4 * groups * h, variants)


def pointwise_cases(s: Setting) -> Iterator[Case]:
    """Norms, embedders, head and sampler updates. Updates are launches of a few microseconds at 256p."""
    yield norm_case(s, 1)
    yield norm_case(s, 3)
    for op in POINTWISE:
        variant = Variant(s.subject, lambda op=op: bound(op, s, pointwise_inputs(op, s)))
        yield Case(op, f"{s.clip.name}: {s.clip.rows} tokens", *pointwise_cost(op, s), (variant,))
