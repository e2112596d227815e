"""What a failed comparison leaves behind: counts, places and patterns that tell a fault to who has no such machine.

A check passes at the cost of one look at every element. One that fails surveys the tensors in chunks, tells whoever
listens (`on_found`), and only then runs anything again: a second run or a smaller problem may hang or fault itself.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from mismatch_survey import Bound, Compared, Layout, plain, survey
from numerics import rel_err

Report = dict[str, Any]
Facts = Mapping[str, Any]
MAX_TENSOR_BYTES = 512 << 10

on_found: list[Callable[[Mismatch], None]] = []
"""Called with every mismatch: first with the basic report, before anything runs again, then with the whole one."""

_isolating = False


class Mismatch(AssertionError):
    """A comparison that failed: `report` can be written as JSON, `tensors` are small and on the CPU."""

    def __init__(
        self, message: str, report: Report | None = None, tensors: dict[str, Tensor] | None = None
    ) -> None:
        super().__init__(message)
        self.report: Report = {"message": message} | (report or {})
        self.tensors: dict[str, Tensor] = tensors or {}


@dataclass(frozen=True)
class Again:
    """How to find out more about a failure: the same output once more, and smaller problems of its kind."""

    rerun: Callable[[], Tensor] | None = None
    isolate: Callable[[], Facts] | None = None
    facts: Facts | None = None


NOTHING = Again()


def rounding_bound(ref: Tensor) -> Callable[[Tensor], Tensor]:
    """What roundings to bfloat16 explain of a sum's difference, element by element, for parts of `ref`.

    One unit of the product may remain of each partner of a rotation where the two cancel: four times the usual size.
    """

    def wide(x: Tensor) -> Tensor:
        return x if x.dtype == torch.float64 else x.float()

    size = wide(ref).square().mean().sqrt()
    return lambda part: 2.0**-6 * wide(part).abs() + 2.0**-5 * size.to(part.device)


def require_close(
    name: str,
    got: Tensor,
    ref: Tensor,
    bound: Bound,
    *,
    layout: Layout = "rows",
    says: str = "differs",
    numbers: Tensor | Sequence[int] | None = None,
    rerun: Callable[[], Tensor] | None = None,
    isolate: Callable[[], Facts] | None = None,
    facts: Facts | None = None,
) -> None:
    """Every element with |got - ref| <= bound; NaN is wrong.

    bound: a number, a tensor that broadcasts to `ref`, or a function from rows of `ref` (as `layout` flattens them) to
        their bounds, for tensors of gigabytes.
    layout: "rows" of a matrix (rows, columns or more axes, which count as columns), "heads" (rows, heads, channels) or
        "pixels" (frames, height, width, channels), without frames for one.
    says: what the message says after the name.
    numbers: what the first axis counts (rows, or frames), where it is not 0, 1, 2 and so on.
    rerun: the same output from another run. isolate: facts from smaller problems. Both only after a failure.
    facts: what else the report should hold.

    Raises:
        Mismatch: with a report of where and by how much.
    """
    _require("close", name, got, ref, bound, layout, says, numbers, Again(rerun, isolate, facts))


def require_equal(
    name: str,
    got: Tensor,
    ref: Tensor | float,
    *,
    layout: Layout = "rows",
    says: str = "two runs differ",
    numbers: Tensor | Sequence[int] | None = None,
    rerun: Callable[[], Tensor] | None = None,
    isolate: Callable[[], Facts] | None = None,
    facts: Facts | None = None,
) -> None:
    """The same bits everywhere, NaN at the same places; `ref` may be one value for all. See `require_close`."""
    _require("equal", name, got, ref, 0.0, layout, says, numbers, Again(rerun, isolate, facts))


def require_finite(
    name: str,
    got: Tensor,
    *,
    layout: Layout = "rows",
    says: str = "has elements missing",
    numbers: Tensor | Sequence[int] | None = None,
    rerun: Callable[[], Tensor] | None = None,
    isolate: Callable[[], Facts] | None = None,
    facts: Facts | None = None,
) -> None:
    """Neither NaN, which is what nobody wrote, nor infinite. See `require_close`."""
    _require("finite", name, got, 0.0, 0.0, layout, says, numbers, Again(rerun, isolate, facts))


def require_at_most(
    name: str,
    error: float | Tensor,
    limit: float | Tensor,
    *,
    says: str = "is too far off",
    got: Tensor | None = None,
    ref: Tensor | None = None,
    bound: Bound | None = None,
    layout: Layout = "rows",
    numbers: Tensor | Sequence[int] | None = None,
    rerun: Callable[[], Tensor] | None = None,
    isolate: Callable[[], Facts] | None = None,
    facts: Facts | None = None,
) -> None:
    """A measure of the whole, such as a norm of the error: error <= limit, and NaN is more.

    With `got` and `ref` the report holds where they differ: beyond `bound`, by default what roundings explain, or if
    nothing is, beyond a quarter of it, a sixteenth and so on.
    """
    error, limit = float(error), float(limit)
    if error <= limit:
        return
    message = f"{name} {says}: {error:.4g}, allowed {limit:.4g}"
    report: Report = {"name": name, "measure": plain(error), "limit": plain(limit)}
    tensors: dict[str, Tensor] = {}
    compared = None
    if got is not None and ref is not None:
        wanted = rounding_bound(ref) if bound is None else bound
        for power in range(5):
            found = _reported("close", name, got, ref, _scaled(wanted, 4.0**-power), layout, numbers)
            compared, part, tensors = found
            report |= {"bound_scale": 4.0**-power} | part
            if part.get("wrong", 1):
                break
    _raise(Mismatch(message, report, tensors), compared, Again(rerun, isolate, facts))


def require_rel_err(
    name: str, got: Tensor, ref: Tensor, limit: float, *, layout: Layout = "rows", **more: Any
) -> None:
    """numerics.rel_err <= limit, with a report of where they differ; `more` as in `require_at_most`."""
    says = "has too large a relative error"
    require_at_most(name, rel_err(got, ref), limit, says=says, got=got, ref=ref, layout=layout, **more)


def require(ok: bool | Tensor, message: str, **numbers: Any) -> None:
    """A condition of its own, with the numbers that it is about."""
    if not bool(ok):
        shown = {name: plain(value) for name, value in numbers.items()}
        words = ", ".join(f"{name} {value}" for name, value in shown.items())
        _raise(Mismatch(f"{message}: {words}" if words else message, {"numbers": shown}), None, NOTHING)


def outcomes(runs: Mapping[str, Callable[[], object]]) -> dict[str, str]:
    """What becomes of each run: "holds", or what it raised. Raises nothing, and stops where the device is lost."""
    found: dict[str, str] = {}
    lost = False
    for name, run in runs.items():
        if lost:
            found[name] = "not run: the device is lost"
            continue
        try:
            with _quiet():
                run()
                found[name] = "holds"
        except Mismatch as mismatch:
            found[name] = f"fails: {mismatch}"
        except Exception as error:
            text = str(error).splitlines()
            found[name] = f"raises {type(error).__name__}: {text[0] if text else ''}"
            lost = any(word in str(error) for word in ("CUDA error", "illegal", "launch failure"))
    return found


@contextmanager
def _quiet() -> Iterator[None]:
    """Failures in here are raised as they are: nobody is told, and nothing runs again."""
    global _isolating
    before, _isolating = _isolating, True
    try:
        yield
    finally:
        _isolating = before


def _scaled(bound: Bound, factor: float) -> Bound:
    if callable(bound):
        return lambda ref: bound(ref) * factor
    return bound * factor


def _require(
    rule: Literal["close", "equal", "finite"],
    name: str,
    got: Tensor,
    ref: Tensor | float,
    bound: Bound,
    layout: Layout,
    says: str,
    numbers: Tensor | Sequence[int] | None,
    again: Again,
) -> None:
    if not isinstance(ref, Tensor):
        ref = torch.full((), ref, dtype=got.dtype, device=got.device).expand_as(got)
    if got.shape != ref.shape or (rule == "equal" and got.dtype != ref.dtype):
        message = f"{name} {says}: {got.dtype} {tuple(got.shape)} against {ref.dtype} {tuple(ref.shape)}"
        _raise(Mismatch(message, {"name": name}), None, again)
    compared = Compared.of(rule, got, ref, bound, layout, numbers)
    if compared.holds():
        return
    _, report, tensors = _reported(rule, name, got, ref, bound, layout, numbers)
    _raise(Mismatch(f"{name} {says}: {_words(report)}", report, tensors), compared, again)


def _reported(
    rule: Literal["close", "equal", "finite"],
    name: str,
    got: Tensor,
    ref: Tensor,
    bound: Bound,
    layout: Layout,
    numbers: Tensor | Sequence[int] | None,
) -> tuple[Compared | None, Report, dict[str, Tensor]]:
    """The survey. A failure to make it (a device out of memory) must not hide the failure it is about."""
    head: Report = {"name": name, "dtype": str(got.dtype), "device": str(got.device)}
    try:
        compared = Compared.of(rule, got, ref, bound, layout, numbers)
        report, tensors = survey(compared, MAX_TENSOR_BYTES)
    except Exception as error:
        return None, head | {"survey_failed": f"{type(error).__name__}: {error}"}, {}
    return compared, head | report, tensors


def _words(report: Report) -> str:
    if "survey_failed" in report:
        return f"elements are wrong; no survey: {report['survey_failed']}"
    parts = [f"{report['wrong']} of {report['elements']} elements are wrong"]
    if report["unwritten"]:
        parts.append(f"{report['unwritten']} are NaN")
    if report["infinite"]:
        parts.append(f"{report['infinite']} are infinite")
    if "largest_error" in report:
        ratio = report.get("largest_ratio")
        beyond = f", {ratio:.3g} times what is allowed" if isinstance(ratio, float) else ""
        parts.append(f"the largest error is {report['largest_error']:.3g}{beyond}")
    tile = report.get("worst_tile")
    if tile:
        parts.append(f"the worst tile is {tile['index']}, {100 * tile['wrong_share']:.3g} % of it wrong")
    return "; ".join(parts)


def _raise(mismatch: Mismatch, compared: Compared | None, again: Again) -> None:
    """Tell, find out more, tell again, and raise."""
    if again.facts:
        mismatch.report["facts"] = {name: plain(value) for name, value in again.facts.items()}
    if _isolating:
        raise mismatch
    _tell(mismatch)
    more = False
    if again.rerun is not None and compared is not None:
        mismatch.report["second_run"], more = _second_run(compared, again.rerun), True
    if again.isolate is not None:
        mismatch.report["isolated"], more = _facts(again.isolate), True
    if more:
        _tell(mismatch)
    raise mismatch


def _tell(mismatch: Mismatch) -> None:
    for listener in on_found:
        try:
            listener(mismatch)
        except Exception as error:
            mismatch.report["listener_failed"] = f"{type(error).__name__}: {error}"


def _facts(isolate: Callable[[], Facts]) -> Report:
    try:
        with _quiet():
            return {name: plain(value) for name, value in isolate().items()}
    except Exception as error:
        return {"raised": f"{type(error).__name__}: {error}"}


def _second_run(compared: Compared, rerun: Callable[[], Tensor]) -> Report:
    """Whether another run gives the same bits, where not, and how many of its elements are wrong."""
    try:
        with _quiet():
            again = compared.with_got(rerun())
        found, _ = survey(again.against(compared), 0)
        wrong = again.count()
    except Exception as error:
        return {"raised": f"{type(error).__name__}: {error}"}
    report: Report = {"same_bits": found["wrong"] == 0, "differing": found["wrong"], "wrong": wrong}
    if found["wrong"]:
        report |= {"first_differing": found["first_wrong"], "histograms": found["histograms"]}
    return report
