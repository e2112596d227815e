"""The reporter of failed comparisons: planted faults are named by it, and it tells before it runs anything again."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch

import attention_cases
import conv_cases
import gemm_cases
import mismatch
import mismatch_survey
from mismatch import Mismatch, require, require_at_most, require_close, require_equal, require_finite

BOUND = 0.01


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tensors here are small: several chunks all the same."""
    monkeypatch.setattr(mismatch_survey, "CHUNK", 5000)


@pytest.fixture
def told() -> Iterator[list[dict[str, Any]]]:
    """Reports as they were each time that a listener was called."""
    seen: list[dict[str, Any]] = []

    def listen(found: Mismatch) -> None:
        seen.append(json.loads(json.dumps(found.report, allow_nan=False)))

    mismatch.on_found.append(listen)
    yield seen
    mismatch.on_found.remove(listen)


def matrix(rows: int = 300, columns: int = 400, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(1)).to(dtype)


def failure(call: Callable[[], object]) -> Mismatch:
    with pytest.raises(Mismatch) as caught:
        call()
    found = caught.value
    json.dumps(found.report, allow_nan=False)
    assert sum(x.nbytes for x in found.tensors.values()) <= mismatch.MAX_TENSOR_BYTES
    assert all(x.device.type == "cpu" for x in found.tensors.values())
    return found


def test_what_is_within_its_bound_passes() -> None:
    ref = matrix()
    for bound in (0.0, torch.zeros(300, 400), lambda part: 0 * part.float()):
        require_close("d", ref, ref, bound)
    require_close("d", ref.float() + 1e-3, ref, 1.1e-3)
    require_close("d", ref[:0], ref[:0], 0.0)
    require_equal("d", torch.full((3,), torch.nan), torch.nan)
    require_equal("frames", torch.full((1, 2, 2, 3), 77, dtype=torch.uint8), 77, layout="pixels")
    require_finite("d", ref)
    require_at_most("d", 1.0, torch.tensor(1.0))
    require(True, "nothing")


def test_one_wrong_tile() -> None:
    ref = matrix()
    got = ref.clone()
    got[128:256, 256:384] = 0
    found = failure(lambda: require_close("d", got, ref, BOUND, says="differs from PyTorch"))
    report = found.report
    wrong = int((ref[128:256, 256:384].float().abs() > BOUND).sum())
    assert (report["wrong"], report["unwritten"], report["wrong_and_zero"]) == (wrong, 0, wrong)
    assert report["histograms"]["tile"] == [[[1, 2], wrong]]
    assert report["histograms"]["tiles_with_wrong"] == [1, 12]
    assert report["worst_tile"]["index"] == [1, 2]
    assert report["worst_tile"]["wrong_share"] == wrong / 128**2
    assert str(found).startswith(f"d differs from PyTorch: {wrong} of 120000 elements are wrong; the largest")
    assert report["first_wrong"][0] == {"index": [128, 256], "got": 0.0, "ref": float(ref[128, 256])}
    assert len(report["first_wrong"]) == 16
    at = report["largest_error_at"]
    assert (
        abs(float(ref[at[0], at[1]])) == report["largest_error"] == float(ref[128:256, 256:384].abs().max())
    )
    assert report["largest_ratio"] == pytest.approx(report["largest_error"] / BOUND)
    assert report["worst_tile"]["tensors"] == "this tile"
    assert torch.equal(found.tensors["ref"], ref[128:256, 256:384])


def test_one_wrong_lane_of_columns() -> None:
    ref = matrix()
    got = ref.clone()
    got[:, 3::8] += 1
    report = failure(lambda: require_close("d", got, ref, BOUND)).report
    assert report["histograms"]["column % 8"] == [0, 0, 0, 300 * 50, 0, 0, 0, 0]


def test_one_wrong_warp() -> None:
    ref = matrix()
    got = ref.clone()
    got[128 + 48 : 128 + 64] += 1
    found = failure(lambda: require_close("d", got, ref, BOUND)).report["histograms"]
    assert found["row // 16 % 8"] == [0, 0, 0, 16 * 400, 0, 0, 0, 0]
    assert sum(found["row % 128"][48:64]) == 16 * 400


def test_rows_that_nobody_wrote() -> None:
    got = matrix()
    got[200:203] = torch.nan
    got[5, 7] = torch.inf
    for call in (lambda: require_finite("d", got), lambda: require_close("d", got, matrix(), BOUND)):
        report = failure(call).report
        assert (report["wrong"], report["unwritten"], report["infinite"]) == (1201, 1200, 1)
        first = [(element["index"], element["got"]) for element in report["first_wrong"][:2]]
        assert first == [([5, 7], "inf"), ([200, 0], "nan")]


def test_columns_that_hold_others() -> None:
    ref = matrix()
    got = ref.clone()
    got[:128, 8:16], got[:128, 16:24] = ref[:128, 16:24], ref[:128, 8:16]
    tile = failure(lambda: require_close("d", got, ref, BOUND)).report["worst_tile"]
    assert tile["columns_come_from"][:32] == [*range(8), *range(16, 24), *range(8, 16), *range(24, 32)]
    assert "rows_come_from" not in tile


def test_rows_of_a_larger_problem_keep_their_numbers() -> None:
    ref = matrix(4)
    got = ref.clone()
    got[2, 130] += 1
    report = failure(lambda: require_close("d", got, ref, BOUND, numbers=[0, 127, 1000, 1001])).report
    assert report["first_wrong"][0]["index"] == [1000, 130]
    assert report["histograms"]["tile"] == [[[7, 1], 1]]


def test_a_wrong_head() -> None:
    ref = torch.randn(200, 5, 128)
    got = ref.clone()
    got[130:, 3, 17] = 9
    report = failure(lambda: require_close("out", got, ref, BOUND, layout="heads")).report
    assert report["histograms"]["head"] == [[3, 70]]
    assert report["worst_tile"]["index"] == [1, 3]
    assert report["first_wrong"][0]["index"] == [130, 3, 17]


def test_wrong_pixels() -> None:
    ref = torch.randn(3, 20, 19, 72)
    got = ref.clone()
    got[1, 9::2, 8:16:2, 64:] += 1
    report = failure(lambda: require_close("out", got, ref, BOUND, layout="pixels", numbers=[4, 5, 6])).report
    found, count = report["histograms"], 6 * 4 * 8
    assert found["frame"] == [[5, count]]
    assert found["phase (y % 2, x % 2)"] == [[0, 0], [count, 0]]
    assert found["channel // 64"] == [[1, count]]
    assert found["channel % 8"] == [count // 8] * 8
    assert found["unit"] == [[[1, 1], 4 * 4 * 8], [[2, 1], 2 * 4 * 8]]
    assert report["worst_tile"]["index"] == [5, 1, 1]
    assert report["first_wrong"][0]["index"] == [5, 9, 8, 64]


def test_bits() -> None:
    got = matrix(dtype=torch.float32)
    ref = got.clone()
    got[3, 4], ref[3, 4] = 0.0, -0.0
    got[5], ref[5] = torch.nan, torch.nan
    ref[6, 6] = torch.nan
    report = failure(lambda: require_equal("d", got, ref)).report
    assert [x["index"] for x in report["first_wrong"]] == [[3, 4], [6, 6]]
    with pytest.raises(Mismatch, match=r"float32 .* against torch.bfloat16"):
        require_equal("d", got, ref.bfloat16())
    with pytest.raises(Mismatch, match=r"\(300, 400\) against torch.float32 \(299, 400\)"):
        require_close("d", got, ref[1:], 1.0)


def test_a_race(told: list[dict[str, Any]]) -> None:
    ref = matrix()
    got, other = ref.clone(), ref.clone()
    got[10] += 1
    other[11, :40] += 1
    order: list[str] = []

    def rerun() -> torch.Tensor:
        order.append(f"{len(told)} told")
        return other

    report = failure(lambda: require_close("d", got, ref, BOUND, rerun=rerun)).report
    assert order == ["1 told"]
    assert "second_run" not in told[0]
    assert told[1] == json.loads(json.dumps(report))
    assert not report["second_run"]["same_bits"]
    assert (report["second_run"]["differing"], report["second_run"]["wrong"]) == (440, 40)
    found = failure(lambda: require_close("d", got, ref, BOUND, rerun=got.clone)).report["second_run"]
    assert found == {"same_bits": True, "differing": 0, "wrong": 400}


def test_listeners_come_before_isolation(told: list[dict[str, Any]]) -> None:
    def isolate() -> dict[str, Any]:
        assert len(told) == 1
        # Fails in its turn: nobody is told of that, and it runs nothing again.
        return mismatch.outcomes(
            {
                "small": lambda: require_close("e", matrix(), matrix() + 1, BOUND, isolate=isolate),
                "good": lambda: None,
                "bad": lambda: 1 // 0,
                "gone": lambda: torch._assert_async(torch.tensor(False), "CUDA error: an illegal access"),
                "last": lambda: None,
            }
        )

    more: dict[str, Any] = {"isolate": isolate, "facts": {"k": 64, "scale": float("inf")}}
    report = failure(lambda: require_finite("d", matrix() / 0, **more)).report
    assert len(told) == 2
    assert "isolated" not in told[0]
    assert told[0]["facts"] == {"k": 64, "scale": "inf"}
    found = report["isolated"]
    assert found["small"].startswith("fails: e differs: 120000 of 120000")
    assert found["good"] == "holds"
    assert found["bad"].startswith("raises ZeroDivisionError")
    assert found["last"] == "not run: the device is lost"


def test_what_goes_wrong_meanwhile_hides_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> Any:
        raise RuntimeError("out of memory")

    more: dict[str, Any] = {"rerun": broken, "isolate": broken}
    report = failure(lambda: require_equal("d", matrix(), 0.0, **more)).report
    assert report["second_run"] == report["isolated"] == {"raised": "RuntimeError: out of memory"}
    monkeypatch.setattr(mismatch, "on_found", [broken])
    assert "out of memory" in failure(lambda: require_equal("d", matrix(), 0.0)).report["listener_failed"]
    monkeypatch.setattr(mismatch, "survey", broken)
    found = failure(lambda: require_equal("d", matrix(), 0.0))
    assert "no survey: RuntimeError: out of memory" in str(found)


def test_measures_show_where_the_error_is() -> None:
    ref = matrix(dtype=torch.float32)
    got = ref.clone()
    got[:, 1::8] += 0.004 * ref.square().mean().sqrt()
    error = (got - ref).norm()
    says = "has an error over twice PyTorch's"
    found = failure(lambda: require_at_most("d", error, error / 3, says=says, got=got, ref=ref))
    assert str(found) == f"d {says}: {error:.4g}, allowed {error / 3:.4g}"
    # Less than roundings explain: seen at a sixteenth of that.
    assert found.report["bound_scale"] == 1 / 16
    lanes = found.report["histograms"]["column % 8"]
    assert lanes[1] > 0
    assert sum(lanes) == lanes[1]
    with pytest.raises(Mismatch, match="allowed 1"):
        require_at_most("d", float("nan"), 1)
    with pytest.raises(Mismatch, match=r"no clamp: levels \[1, 2\]"):
        require(False, "no clamp", levels=[1, 2])


def test_isolated_problems_hold_in_the_simulator() -> None:
    product = gemm_cases.make_problem("gemm_qkv", (130, 0, 9), 136, heads=(2, 1), num_sms=2)
    found = gemm_cases.isolate(product, "sim")
    assert set(found.values()) == {"holds"}
    assert gemm_cases.isolate(replace(product, tensors={}), "sim") == found
    queries = attention_cases.Problem((150, 9, 4), heads=(2, 1), window=(50, 1))
    before = queries.tensors["q"].clone()
    found = attention_cases.isolate(queries, attention_cases.TILES[0], "sim")
    assert set(found.values()) == {"holds"}
    require_equal("q", queries.tensors["q"], before)
    for kind, ending in (("conv_3x3", "normed"), ("conv_time", "shortcut")):
        pixels = conv_cases.edge_case(kind, ending, "square", 4)
        found = conv_cases.isolate(pixels, "sim")
        assert set(found.values()) == {"holds"}


def test_isolation_tells_failures_apart() -> None:
    product = gemm_cases.make_problem("gemm", (130,), 136, n=264, num_sms=2)
    product.tensors["offsets"][:] = 0  # nothing is computed; problems drawn anew are right
    found = gemm_cases.isolate(product, "sim")
    assert found["one tile"] == "holds"
    assert "missing" in found["the same on one multiprocessor"]
