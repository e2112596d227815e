"""The benchmarks of the engine at a toy size: what they count, what they measure, what they print."""

from __future__ import annotations

import dataclasses
import json
import re
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch

import bench_e2e
import bench_step
from bench_step import KINDS, TINY, Launch, Timed, is_kernel_of, paired, step_launches, toy_spec
from magihuman_fast import InputError, InsufficientMemory, MagiHumanPipeline
from magihuman_fast.checkpoints.synthetic import SIZES
from magihuman_fast.cli import benchmark
from magihuman_fast.cli import program as cli
from magihuman_fast.cli.random_models import random_dit, random_pipeline
from magihuman_fast.kernels import ops
from magihuman_fast.model.config import DiTConfig
from magihuman_fast.model.dit import windowed_layers
from magihuman_fast.runtime.dit import KernelDiT
from magihuman_fast.runtime.graph import StepGraph
from numerics import rel_err
from timing import Ceilings
from workload import CLIPS, step_attention_flops

SECOND = Ceilings(copy_bytes=1.0, bf16_flops=1.0, note="of a test")


@pytest.mark.parametrize("kind", KINDS)
def test_launches_are_those_of_a_step(kind: str) -> None:
    """In order, and all of them: what the profiler sees is paired with them by name, whatever lies between."""
    spec = dataclasses.replace(toy_spec(kind), frame_window=1)
    config = dataclasses.replace(TINY.config, local_attn_layers=(1,))
    graph = StepGraph(KernelDiT(random_dit(config, device="cpu"), backend="reference"), spec)
    bench_step.begin(graph, TINY.clip)
    seen: list[tuple[str, float, float]] = []
    where, norm = torch.where, bench_step.ops.rms_norm
    with bench_step.recorded(seen):
        graph.replay()
    assert torch.where is where
    assert bench_step.ops.rms_norm is norm
    launches = step_launches(config, TINY.clip, spec)
    timed, others = paired(launches, seen)
    assert [t.launch for t in timed] == launches
    assert all(t.seconds > 0 and t.gap >= 0 for t in timed)
    assert not others
    for wrong in (seen[1:], seen[:-1], [*seen[:2], seen[3], seen[2], *seen[4:]], []):
        with pytest.raises(ValueError, match=r"step: expected .* the profiler saw none"):
            paired(launches, wrong)
    for number in range(len(seen)):
        with pytest.raises(ValueError, match=rf"of {len(seen) - 1} events the profiler saw none"):
            paired(launches, seen[:number] + seen[number + 1 :])


def test_events_that_are_no_launch_are_told() -> None:
    launches = [Launch(op, "", 0, 1) for op in ("rms_norm", "gemm_qkv", "keep_frame")]
    names = ("Memset (Device)", "rms_norm_sm90", "vectorized_elementwise_kernel", "QkvEpilogue gemm_sm90")
    names += ("Memcpy DtoD", "elementwise_kernel<where_kernel_impl>", "Memcpy DtoH")
    seen = [(name, 10.0 * i, 10.0 * i + 4) for i, name in enumerate(names)]
    timed, others = paired(launches, seen)
    assert [(t.seconds, t.gap) for t in timed] == [(4.0, 0.0), (4.0, 16.0), (4.0, 16.0)]
    assert [name for name, _, _ in others] == [names[0], names[2], names[4], names[6]]
    # Torch's kernel under another name; a copy is none.
    renamed = [*seen[:5], ("elementwise_kernel<select>", 50.0, 54.0), seen[6]]
    assert paired(launches, renamed)[0][2].gap == 16.0
    with pytest.raises(ValueError, match=r"expected keep_frame .*launch 3 of 3"):
        paired(launches, [*seen[:5], seen[6]])


def test_compiled_kernels_are_told_by_their_names() -> None:
    """Each operation of a step has kernels in the library, and no kernel is taken for two."""
    library = Path(ops.__file__).with_name("libmagihuman_kernels.so")
    if not library.is_file():
        pytest.skip("without nvcc there are no compiled kernels to be named")
    found = {match.decode() for match in re.findall(rb"_ZN9magihuman\w+_sm90\w+", library.read_bytes())}
    names = {launch.op for kind in KINDS for launch in step_launches(TINY.config, TINY.clip, toy_spec(kind))}
    names.remove("keep_frame")
    for op in names:
        assert any(is_kernel_of(op, name) for name in found), op
    for name in found:
        assert sum(is_kernel_of(op, name) for op in names) <= 1, name


@pytest.mark.parametrize(("clip", "flops"), [("256p", 103.5e12), ("540p", 600e12), ("1080p", 3838e12)])
def test_work_of_a_step(clip: str, flops: float) -> None:
    """The model's known totals, less what the last layer leaves out."""
    config = DiTConfig()
    if clip == "1080p":
        config = dataclasses.replace(config, local_attn_layers=windowed_layers(40))
    launches = step_launches(config, CLIPS[clip], bench_step.spec_of(clip))
    assert len(launches) == 1 + 2 + 7 * 40 + 4 + 1
    total = sum(launch.flops for launch in launches)
    assert 0.985 * flops < total < 1.01 * flops
    attention = sum(launch.flops for launch in launches if launch.op == "gated_attention")
    window = 11 if clip == "1080p" else None
    assert 0.99 <= attention / step_attention_flops(config, CLIPS[clip], window) <= 1


def test_table_of_a_step() -> None:
    long, short = Launch("gemm", "1 x 1", 3, 1), Launch("rms_norm", "2 rows", 0, 2)
    lines = bench_step.table([Timed(short, 2.0, 0.0), Timed(long, 7.0, 1.0), Timed(short, 4.0, 1.0)], SECOND)
    assert lines[1].split()[:2] == ["gemm", "(1"]
    assert lines[2].split()[3] == "2"  # two norms together
    assert lines[-1].startswith("step: 15000.000 ms, floor 7000.000 ms, gaps 13.3 % of it; 3 launches")


def test_step_script(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert bench_step.main(["--out", str(tmp_path / "step.json")]) == 0
    out = capsys.readouterr().out
    assert "no figures of the model" in out
    assert "gaps" in out
    record = json.loads((tmp_path / "step.json").read_text())
    assert len(record["launches"]) == len(record["events"]) == 29
    assert record["others"] == []


def test_step_script_keeps_what_it_cannot_pair(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(bench_step, "step_launches", lambda *_: [Launch("gemm_fp8", "1 x 1", 1, 1)])
    with pytest.raises(ValueError, match="expected gemm_fp8"):
        bench_step.main(["--out", str(tmp_path / "step.json")])
    record = json.loads((tmp_path / "step.json").read_text())
    assert "expected gemm_fp8" in record["error"]
    assert record["machine"]["torch"]


@pytest.mark.slow
def test_whole_benchmark(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """Both stages, the baseline and the fresh process, on toys; its record, table and picture."""
    path = tmp_path / "e2e.json"
    assert bench_e2e.main(["--presets", "540p", "--runs", "1", "--out", str(path)]) == 0
    out = capsys.readouterr().out
    assert "no figures of the model" in out
    record = json.loads(path.read_text())
    assert record["toy"]
    assert [m["preset"] for m in record["warm"]] == ["540p", "540p"]
    assert [m["reason"] == "baseline" for m in record["warm"]] == [False, True]
    for m in record["warm"]:
        assert set(m["stages"]) == {"text", "denoise", "super_resolution", "decode", "sound", "total"}
        assert 0 < m["after_text"] <= m["stages"]["total"]
    for parts in record["cold"].values():
        names = ["interpreter", "import", "load", "set-up", "first frames"]
        assert list(parts) == [*names, "total"]
        assert all(seconds >= 0 for seconds in parts.values())
        assert abs(sum(parts[name] for name in names) - parts["total"]) < 1e-6
    assert path.with_suffix(".png").stat().st_size > 1000
    assert "target on an H200" not in out  # beside toys
    assert "no target applies" in out
    bench_e2e.main(["--plot-only", str(path)])


def test_command(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert cli.main(["bench", "--no-cold", "--no-baseline", "--runs", "1", "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert [m["preset"] for m in record["warm"]] == ["256p"]
    assert cli.main(["bench", "--presets", "720p"]) == 2
    assert "expected some of 256p,540p,1080p" in capsys.readouterr().err
    # A bad checkpoint is said before a process starts for it.
    assert cli.main(["bench", "--model", str(tmp_path / "none")]) == 3
    assert capsys.readouterr().err.startswith(f"error: {tmp_path / 'none'}")
    with pytest.raises(InputError, match=r"runs: expected a positive integer, got 0"):
        benchmark.Setting(runs=0)


def test_baseline_computes_what_the_pipeline_does() -> None:
    """The baseline runs on the kernels' weights, packed, and leaves the model as it was."""
    request: dict[str, Any] = {**benchmark.TOY, "sr_steps": 1, "sr_size": (64, 96)}
    pipe = random_pipeline("tiny", sr="1080p", backend="reference")
    result = pipe("Hello there.", **request)
    with benchmark.compiled_reference(pipe, pipe.turbo_vae) as plain:
        assert "apply_layer" in vars(pipe.dit)
        baseline = plain("Hello there.", **request)
    assert "apply_layer" not in vars(pipe.dit)
    got, ref = (torch.from_numpy(r.frames).double() for r in (baseline, result))
    assert rel_err(got, ref) < 0.05


@pytest.mark.slow
def test_baseline_compiles_every_kind_of_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    """Once each: 3 in the first stage, 5 in the windowed second, and those again for the other length that guidance's
    second prompt has, which is more than torch compiles by itself."""
    published = DiTConfig()
    kinds = {name: getattr(published, name) for name in ("num_layers", "mm_layers", "gelu7_layers")}
    dit = dataclasses.replace(SIZES["tiny"].dit, **kinds)
    monkeypatch.setitem(SIZES, "tiny", dataclasses.replace(SIZES["tiny"], dit=dit))
    pipe = random_pipeline("tiny", sr="1080p", backend="reference")
    request: dict[str, Any] = {**benchmark.TOY, "sr_steps": 1, "sr_size": (64, 96), "sr_guidance": True}
    counts = torch._dynamo.utils.counters["stats"]
    with benchmark.compiled_reference(pipe, pipe.turbo_vae) as plain:
        counts.clear()
        plain("Hello there.", **request)
        assert counts["unique_graphs"] == 3 + 2 * 5


@pytest.mark.slow
def test_a_preset_is_gone_before_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU two do not fit beside each other."""
    load, last, loaded = benchmark.Setting.load, list[weakref.ref[object]](), []

    def watched(setting: benchmark.Setting, preset: str) -> MagiHumanPipeline:
        assert [ref() for ref in last] == [None] * len(last)
        pipe = load(setting, preset)
        parts = (pipe, pipe.dit, pipe.dit.layers[0].qkvg, pipe.sr_dit, pipe.turbo_vae, pipe.text_encoder)
        last[:] = [weakref.ref(part) for part in parts if part is not None]
        loaded.append(preset)
        return pipe

    monkeypatch.setattr(benchmark.Setting, "load", watched)
    setting = benchmark.Setting(("540p", "256p"), size="tiny", runs=1, device="cpu", cold=False)
    assert len(list(benchmark.measure(setting, print))) == 4
    assert loaded == ["540p", "256p"]
    assert [ref() for ref in last] == [None] * len(last)


@pytest.mark.parametrize("error", [InsufficientMemory, torch.OutOfMemoryError])
def test_baseline_that_does_not_fit(error: type[Exception], monkeypatch: pytest.MonkeyPatch) -> None:
    """Is told as such, and the presets after it are measured."""

    def refuse(*_: object) -> None:
        raise error("size: needs more")

    monkeypatch.setattr(benchmark.Setting, "reference_decoder", refuse)
    setting = benchmark.Setting(("256p", "256p"), size="tiny", runs=1, device="cpu", cold=False)
    told: list[str] = []
    record = benchmark.run(setting, told.append)
    unfit = {"preset": "256p", "path": "reference path, traced by torch", "reason": "size: needs more"}
    assert record["unfit"] == [unfit] * 2
    assert [m["reason"] == "baseline" for m in record["warm"]] == [False] * 2
    wanted = "256p, reference path, traced by torch: does not fit: size: needs more"
    assert told.count(wanted) == 2
    assert benchmark.notes(record).count(wanted) == 2


def test_what_stops_a_run_leaves_what_was_found(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    load = benchmark.Setting.load

    def only_first(setting: benchmark.Setting, preset: str) -> MagiHumanPipeline:
        if preset != "256p":
            raise RuntimeError("stopped")
        return load(setting, preset)

    monkeypatch.setattr(benchmark.Setting, "load", only_first)
    path = tmp_path / "e2e.json"
    with pytest.raises(RuntimeError, match="stopped"):
        bench_e2e.main(["--presets", "256p,540p", "--runs", "1", "--no-cold", "--out", str(path)])
    record = json.loads(path.read_text())
    assert [m["reason"] == "baseline" for m in record["warm"]] == [False, True]
    assert record["machine"]["torch"]
    assert [found.name for found in tmp_path.iterdir()] == ["e2e.json"]


def test_weights_are_drawn_as_the_files_are() -> None:
    """Equal seeds, equal weights; scales as the synthetic checkpoints have them."""
    config = TINY.config
    first, again, other = (random_dit(config, device="cpu", seed=seed) for seed in (1, 1, 2))
    assert torch.equal(first.layers[1].down, again.layers[1].down)
    assert not torch.equal(first.layers[1].down, other.layers[1].down)
    assert abs(float(first.layers[1].qkvg.float().std()) * 256**0.5 - 1) < 0.02
    assert abs(float(first.layers[0].attn_norm.std()) / 0.1 - 1) < 0.1
