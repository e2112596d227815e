"""Every kernel on a Hopper GPU at the model's real shapes: parity, repeatability, capture, rows left alone.

Each output is NaN beforehand. All of it is held to the same computation in bfloat16 PyTorch, element by element, and
sampled rows to float64 with the bounds that the simulator's tests use (gemm_cases.check).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.nn.functional as F

import gemm_cases
from kernel_cases import UPDATES, Inputs, Setting, gpu_setting, inputs_of, norm_inputs, pointwise_inputs
from magihuman_fast.kernels import ops
from magihuman_fast.model import operations as reference
from magihuman_fast.model.config import DiTConfig
from magihuman_fast.model.dit import NORM_EPS
from magihuman_fast.model.packing import patchify
from mismatch import require_at_most, require_close, require_equal, require_finite, require_rel_err
from workload import CLIPS, padded

pytestmark = pytest.mark.gpu

MODEL = DiTConfig()
H, W = MODEL.hidden_size, MODEL.intermediate(39)
# Operation, N, K, experts: everything that a layer launches.
PRODUCTS = [
    ("gemm", 7168, H, 1),
    ("gemm", H, H, 1),
    ("gemm", 2 * W, H, 1),
    ("gemm", H, padded(W), 1),
    ("gemm_qkv", MODEL.qkvg_rows, H, 1),
    ("gemm_qkv", MODEL.qkvg_rows, H, 3),
    ("gemm_residual", H, H, 1),
    ("gemm_residual", H, H, 3),
    ("gemm_residual", H, padded(W), 1),
    ("gemm_residual", H, padded(W), 3),
    ("gemm_residual", H, 4 * H, 3),
    ("gemm_gelu7", 4 * H, H, 3),
    ("gemm_swiglu7", 2 * W, H, 1),
    ("gemm_swiglu7", 2 * W, H, 3),
]
SAMPLED_ROWS = 64


def written(op: str, inputs: Inputs) -> dict[str, torch.Tensor]:
    """A product's outputs by the names that gemm_cases gives them."""
    if op == "gemm_qkv":
        return dict(inputs["out"]._asdict())
    return {"x": inputs["x"]} if op == "gemm_residual" else {"d": inputs["out"]}


def fresh(inputs: Inputs) -> Inputs:
    """The same inputs with outputs of their own: the residual stream copied, everything else NaN."""
    copy = dict(inputs)
    if "x" in inputs:
        copy["x"] = inputs["x"].clone()
    elif isinstance(inputs["out"], ops.QkvGate):
        copy["out"] = ops.QkvGate(*(torch.full_like(x, torch.nan) for x in inputs["out"]))
    else:
        copy["out"] = torch.full_like(inputs["out"], torch.nan)
    return copy


def run(op: str, inputs: Inputs, backend: ops.Backend) -> dict[str, torch.Tensor]:
    given = fresh(inputs)
    getattr(ops, op)(**given, backend=backend)
    return written(op, given)


def sampled(offsets: tuple[int, ...]) -> torch.Tensor:
    """Rows to look at closely, ascending: both ends of every range, rows around tiles' edges, and others at random."""
    rows = offsets[-1]
    near = [edge + step for edge in (*offsets, 64, 128, 256, rows // 128 * 128) for step in (-2, -1, 0, 1)]
    drawn = torch.randperm(rows, generator=torch.Generator().manual_seed(5))[:SAMPLED_ROWS]
    return torch.unique(torch.cat([torch.tensor([r for r in near if 0 <= r < rows]), drawn]))


def problem_of_rows(op: str, s: Setting, inputs: Inputs, rows: torch.Tensor) -> gemm_cases.Problem:
    """The product restricted to some of its rows, for the float64 computation."""
    groups, n, k = inputs["w"].shape
    bounds = torch.searchsorted(rows, torch.tensor(s.clip.offsets)).tolist()
    counts = tuple(b - a for a, b in pairwise(bounds)) if groups == 3 else (len(rows),)
    tensors = {"a": inputs["a"][rows], "w": inputs["w"].flatten(0, 1)}
    tensors |= {name: inputs[name][rows] for name in ("x", "rope") if name in inputs}
    tensors |= {name: inputs[name] for name in ("q_norm", "k_norm") if name in inputs}
    heads = (inputs.get("num_q_heads", 0), inputs.get("num_kv_heads", 0))
    columns = inputs["out"].shape[1] if op == "gemm_swiglu7" else 0
    return gemm_cases.Problem(op, counts, n, k, len(rows), heads=heads, d_cols=columns, tensors=tensors)


def isolated(op: str, s: Setting, inputs: Inputs, groups: int) -> Callable[[], dict[str, str]] | None:
    """gemm_cases.isolate of a product of these sizes, of the largest part of its rows, for after a failure on a GPU."""
    if s.backend != "gpu":
        return None
    _, n, k = inputs["w"].shape
    a, b, c, rows = s.clip.offsets
    counts = (b - a, c - b, rows - c) if groups == 3 else (rows,)
    # In float64 all rows of 1080p would not fit beside what is there.
    counts = tuple(min(count, 4096) for count in counts)
    heads = (inputs.get("num_q_heads", 0), inputs.get("num_kv_heads", 0))
    columns = inputs["out"].shape[1] if op == "gemm_swiglu7" else 0
    problem = gemm_cases.Problem(
        op, counts, n, k, sum(counts), 0, heads=heads, d_cols=columns, device=s.device
    )
    return partial(gemm_cases.isolate, problem, s.backend)


def single(op: str, inputs: Inputs, s: Setting, name: str) -> torch.Tensor:
    return run(op, inputs, s.backend)[name]


def check_product(op: str, s: Setting, n: int, k: int, groups: int) -> None:
    inputs = inputs_of(op, s, n, k, groups)
    facts = {"op": op, "n": n, "k": k, "groups": groups, "offsets": s.clip.offsets}
    more: dict[str, Any] = {"facts": facts, "isolate": isolated(op, s, inputs, groups)}
    out = run(op, inputs, s.backend)
    again = run(op, inputs, s.backend)
    # Whether it is right comes first: what it is that differs tells more than that it does.
    plain = run(op, inputs, "reference")
    for name, got in out.items():
        # As gemm_cases.check: what roundings explain, everywhere. Reduced in float32, not in a copy of gigabytes.
        size = plain[name].float().square().mean().sqrt()

        def bound(ref: torch.Tensor, size: torch.Tensor = size) -> torch.Tensor:
            return 2.0**-6 * ref.float().abs() + 2.0**-5 * size

        # NaN compares false: an element that was not written fails.
        more["rerun"] = partial(again.__getitem__, name)
        require_close(name, got, plain[name], bound, says="differs from PyTorch", **more)
    del plain
    for name, got in out.items():
        require_equal(f"{name}:", again[name], got, **more | {"rerun": partial(single, op, inputs, s, name)})
    rows = sampled(s.clip.offsets)
    problem = problem_of_rows(op, s, inputs, rows)
    values = {name: x[rows] for name, x in out.items()}
    gemm_cases.check(problem, values, numbers=rows, isolated=more["isolate"])


def check_rows_left_alone(op: str, s: Setting, n: int, k: int, groups: int) -> None:
    """Fewer rows in use than there is room for: those beyond stay as they were."""
    inputs = inputs_of(op, s, n, k, groups)
    _, first_audio, first_text, rows = s.clip.offsets
    live = rows - s.clip.text // 2
    values = [0, first_audio, first_text, live]
    inputs["modality_offsets"] = torch.tensor(values, dtype=torch.int32, device=s.device)
    before = written(op, fresh(inputs))
    facts = {"op": op, "n": n, "k": k, "groups": groups, "offsets": values}
    for name, got in run(op, inputs, s.backend).items():
        beyond, says = torch.arange(live, rows), "rows beyond the ranges were written"
        require_equal(f"{name}:", got[live:], before[name][live:], says=says, numbers=beyond, facts=facts)
        require_finite(name, got[:live], facts=facts)


@pytest.mark.parametrize("size", list(CLIPS))
@pytest.mark.parametrize(("op", "n", "k", "groups"), PRODUCTS)
def test_products(op: str, n: int, k: int, groups: int, size: str) -> None:
    check_product(op, gpu_setting(size), n, k, groups)
    torch.cuda.empty_cache()


@pytest.mark.parametrize(("op", "n", "k", "groups"), PRODUCTS)
def test_rows_beyond_the_ranges_are_left_alone(op: str, n: int, k: int, groups: int) -> None:
    check_rows_left_alone(op, gpu_setting("256p"), n, k, groups)


@pytest.mark.parametrize(("op", "n", "k", "groups"), PRODUCTS)
def test_captured_products_equal_launched_ones(op: str, n: int, k: int, groups: int) -> None:
    inputs = inputs_of(op, gpu_setting("256p"), n, k, groups)
    launched = run(op, inputs, "gpu")

    def launch(name: str) -> torch.Tensor:
        return run(op, inputs, "gpu")[name]

    given = fresh(inputs)
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        getattr(ops, op)(**given, backend="gpu")
    graph.replay()
    torch.cuda.synchronize()
    for name, got in written(op, given).items():
        says = "captured and launched differ"
        require_equal(name, got, launched[name], says=says, rerun=partial(launch, name))


# --- pointwise ------------------------------------------------------------------------------------------------


def norm64(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """RMSNorm in float64 over rows of x with one weight, or one per row."""
    x = x.double()
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + NORM_EPS) * (1 + weight.double())


def check_norm(s: Setting, groups: int) -> None:
    given = norm_inputs(s, groups)
    out = ops.rms_norm(**given | {"out": torch.full_like(given["out"], torch.nan)}, backend=s.backend)
    bounds = s.clip.offsets if groups == 3 else (0, s.clip.rows)
    for i, (expert, (a, b)) in enumerate(zip(given["weight"], pairwise(bounds), strict=True)):
        for first in range(a, b, 4096):
            rows = slice(first, min(first + 4096, b))
            ref = norm64(given["x"][rows], expert)
            # Half a unit of bfloat16's last place, and where float32 puts a value beyond the middle.
            bound = (2**-8 + 1e-5) * ref.abs()
            numbers = torch.arange(rows.start, rows.stop)
            require_close("rms_norm", out[rows], ref, bound, numbers=numbers, facts={"expert": i})


def linear_within(
    name: str, got: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | float = 0.0
) -> None:
    """Float32's own error: 1e-6 of the sum of the terms' magnitudes, element by element and as a whole."""
    bias = torch.as_tensor(bias, device=x.device).double()
    ref = F.linear(x.double(), weight.double()) + bias
    size = F.linear(x.double().abs(), weight.double().abs()) + bias.abs()
    require_close(name, got, ref, 1e-6 * size)
    require_rel_err(name, got, ref, 1e-6, bound=1e-6 * size)


def check_embed(s: Setting) -> None:
    given = pointwise_inputs("embed", s)
    out = ops.embed(**given | {"out": torch.full_like(given["out"], torch.nan)}, backend=s.backend)
    _, audio, text, rows = s.clip.offsets
    linear_within(
        "embed: video", out[:audio], patchify(given["video"]), given["video_weight"], given["video_bias"]
    )
    linear_within("embed: audio", out[audio:text], given["audio"], given["audio_weight"], given["audio_bias"])
    require_equal("embed: text", out[text:rows], given["text_embedding"], says="is not what was given")


def check_head(s: Setting) -> None:
    given = pointwise_inputs("head", s)
    outs = {name: torch.full_like(given[name], torch.nan) for name in ("video_out", "audio_out")}
    video, audio = ops.head(**given | outs, backend=s.backend)
    _, first_audio, first_text, _ = s.clip.offsets
    c, t, h, w = video.shape
    # Back to tokens with channels (ph, pw, c): the inverse of the model's unpatching.
    tokens = video.reshape(c, t, h // 2, 2, w // 2, 2).permute(1, 2, 4, 3, 5, 0).reshape(-1, 4 * c)
    x = given["x"]
    linear_within("head: video", tokens, norm64(x[:first_audio], given["video_norm"]), given["video_weight"])
    linear_within(
        "head: audio", audio, norm64(x[first_audio:first_text], given["audio_norm"]), given["audio_weight"]
    )


def check_update(s: Setting, op: str) -> None:
    given = pointwise_inputs(op, s)
    names = [name for name in ("x", "video", "x_last", "history") if name in given]
    doubles: dict[str, Any] = {name: value.double() for name, value in given.items() if name != "step"}
    if "step" in given:
        doubles["step"] = int(given["step"])
    getattr(ops, op)(**given, backend=s.backend)
    getattr(reference, op)(**doubles)
    for name in names:
        got, ref = given[name], doubles[name]
        require_rel_err(f"{op}: {name}", got, ref, 1e-6, bound=1e-5)
        error = (got.double() - ref).abs().max()
        require_at_most(f"{op}: {name}", error, 1e-5, got=got, ref=ref, bound=1e-5)


@pytest.mark.parametrize("size", ["256p", "1080p"])
@pytest.mark.parametrize("groups", [1, 3])
def test_rms_norm(groups: int, size: str) -> None:
    check_norm(gpu_setting(size), groups)


@pytest.mark.parametrize("size", ["256p", "1080p"])
def test_embed(size: str) -> None:
    check_embed(gpu_setting(size))


@pytest.mark.parametrize("size", ["256p", "1080p"])
def test_head(size: str) -> None:
    check_head(gpu_setting(size))


@pytest.mark.parametrize("size", ["256p", "1080p"])
@pytest.mark.parametrize("op", UPDATES)
def test_updates(op: str, size: str) -> None:
    check_update(gpu_setting(size), op)


def test_embed_text() -> None:
    s = gpu_setting("256p")
    text, weight = s.normal(400, MODEL.text_in_channels), s.normal(H, MODEL.text_in_channels, scale=0.02)
    bias = s.normal(H, scale=0.02)
    out = torch.full((400, H), torch.nan, device=s.device)
    linear_within("embed_text", ops.embed_text(text, weight, bias, out=out), text, weight, bias)


def test_advance_step() -> None:
    step = torch.zeros(1, dtype=torch.int32, device="cuda")
    for _ in range(3):
        ops.advance_step(step)
    assert step.item() == 3
