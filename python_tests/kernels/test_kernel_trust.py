"""Which kernels are trusted: what is kept of a check, and what takes the reference path when one is wrong."""

from __future__ import annotations

import json
import logging
import os
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from dit_cases import CONFIG, random_model
from kernel_findings import DECODER_FAULT, DECODER_REASON, GPU, MODEL_FAULT, MODEL_REASON, Checks
from magihuman_fast import InputError, MagiHumanPipeline
from magihuman_fast.checkpoints import loading
from magihuman_fast.checkpoints.synthetic.turbo_vae import TINY_CONFIG
from magihuman_fast.kernels import launch, ops
from magihuman_fast.kernels.self_check import trust as kernel_trust
from magihuman_fast.kernels.self_check.cases import CASES
from magihuman_fast.kernels.self_check.child import Finding
from magihuman_fast.model import turbo_vae as reference_vae
from magihuman_fast.runtime.engine import Engine
from magihuman_fast.runtime.environment import KERNELS, REFERENCE
from magihuman_fast.runtime.memory_plan import MemoryPlan, ModelSizes, memory_plan
from magihuman_fast.runtime.turbo_vae import TurboVAE
from turbo_vae_cases import tiny_state_dict

# --- what is kept ---------------------------------------------------------------------------------------------


def test_one_check_for_a_gpu_and_build(kernel_checks: Checks, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="magihuman_fast"):
        assert kernel_trust.why_not(GPU) is None
        assert "checking the kernels once for this GPU and build" in caplog.text
        caplog.clear()
        assert kernel_trust.why_not(GPU, "models") is None
        kernel_trust.forget()
        assert kernel_trust.why_not(GPU, "decoder") is None
        assert (kernel_checks.count, caplog.text) == (1, "")
    assert kernel_trust.why_not(GPU, check=True) is None
    assert kernel_checks.count == 2


def test_faults_are_kept_too(kernel_checks: Checks) -> None:
    kernel_checks.faults = (MODEL_FAULT,)
    for _ in range(2):
        assert kernel_trust.why_not(GPU, "models") == MODEL_REASON
        assert kernel_trust.why_not(GPU, "decoder") is None
        kernel_trust.forget()
    assert kernel_checks.count == 1
    kernel_checks.faults = ()
    assert kernel_trust.why_not(GPU, "models", check=True) is None
    kernel_trust.forget()
    assert kernel_trust.why_not(GPU, "models") is None
    assert kernel_checks.count == 2


def test_skipping_asks_nobody(kernel_checks: Checks) -> None:
    kernel_checks.faults = (MODEL_FAULT, DECODER_FAULT)
    kernel_trust.examine(GPU)
    assert kernel_trust.why_not(GPU, check=False) is None
    assert kernel_checks.count == 1


@pytest.mark.parametrize("name", ["device", "uuid", "driver", "torch", "build"])
def test_another_gpu_or_build_is_checked(name: str, kernel_checks: Checks, made_for: dict[str, str]) -> None:
    kernel_trust.examine(GPU)
    kernel_trust.forget()
    before = made_for[name]
    made_for[name] = "another"
    assert kernel_trust.known(GPU) is None
    kernel_trust.examine(GPU)
    assert kernel_checks.count == 2
    kernel_trust.forget()
    made_for[name] = before
    kernel_trust.examine(GPU)  # what was kept for the first is still there
    assert kernel_checks.count == 2


def changed(values: dict[str, Any], **changes: Any) -> str:
    return json.dumps(values | changes)


def first_changed(values: dict[str, Any], **changes: Any) -> str:
    first, *rest = values["findings"]
    return changed(values, findings=[first | changes, *rest])


@pytest.mark.parametrize(
    "spoil",
    [
        lambda values: "",
        lambda values: json.dumps(values)[:-9],
        lambda values: "[]",
        lambda values: "{}",
        lambda values: changed(values, findings=values["findings"][1:]),
        lambda values: changed(values, findings=None),
        lambda values: first_changed(values, verdict="fine"),
        lambda values: first_changed(values, error="?"),
        lambda values: first_changed(values, more=1),
        lambda values: changed(values, made_for=values["made_for"] | {"driver": "another"}),
    ],
)
def test_a_spoilt_file_costs_a_check(spoil: Any, kernel_checks: Checks, kernel_cache: Path) -> None:
    kernel_trust.examine(GPU)
    kernel_trust.forget()
    (file,) = kernel_cache.iterdir()
    good = file.read_text()
    file.write_text(spoil(json.loads(good)))
    assert kernel_trust.known(GPU) is None
    kernel_trust.examine(GPU)
    assert kernel_checks.count == 2
    assert file.read_text() == good


def test_bytes_that_are_no_text_cost_a_check(kernel_checks: Checks, kernel_cache: Path) -> None:
    kernel_trust.examine(GPU)
    kernel_trust.forget()
    (file,) = kernel_cache.iterdir()
    file.write_bytes(b"\xff\xfe\x00")
    kernel_trust.examine(GPU)
    assert kernel_checks.count == 2


def test_a_cache_that_cannot_be_written_is_no_error(
    kernel_checks: Checks, kernel_cache: Path, caplog: pytest.LogCaptureFixture
) -> None:
    kernel_cache.parent.mkdir()
    kernel_cache.write_text("a file where the folder should be")
    with caplog.at_level(logging.DEBUG, logger="magihuman_fast"):
        assert kernel_trust.why_not(GPU) is None
    assert "what was found about the kernels is not kept" in caplog.text
    assert not [record for record in caplog.records if record.levelno > logging.INFO]
    kernel_trust.examine(GPU)  # known to this process all the same
    assert kernel_checks.count == 1


def test_half_a_file_is_never_there(
    kernel_checks: Checks, kernel_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", fail)
        kernel_trust.examine(GPU)
    assert list(kernel_cache.iterdir()) == []


def test_the_cache_is_the_users(
    kernel_checks: Checks, made_for: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    for value in ("", "relative/is/not/meant"):
        monkeypatch.setenv("XDG_CACHE_HOME", value)
        file = kernel_trust.cache_file(made_for)
        assert file is not None
        assert file.parent == tmp_path / ".cache" / "magihuman_fast"


def test_what_could_not_be_checked_is_not_kept_and_not_used(
    kernel_checks: Checks, kernel_cache: Path
) -> None:
    kernel_checks.faults = (Finding("head", "unchecked", "there was no memory"),)
    reason = kernel_trust.why_not(GPU, "models")
    assert reason == (
        "1 of 35 kernels could not be checked, the first because there was no memory "
        "(check_kernels=False uses them unchecked)"
    )
    assert kernel_trust.why_not(GPU, "decoder") is None
    kernel_trust.examine(GPU)  # once a process
    assert kernel_checks.count == 1
    assert not kernel_cache.exists()
    # Beside a fault in the same part, checking it would change nothing.
    kernel_checks.faults += (MODEL_FAULT,)
    kernel_trust.examine(GPU, anew=True)
    assert len(list(kernel_cache.iterdir())) == 1


def test_what_took_too_long_is_not_used_and_not_kept(kernel_checks: Checks, kernel_cache: Path) -> None:
    """Others may have used the GPU meanwhile."""
    kernel_checks.faults = (DECODER_FAULT,)
    assert kernel_trust.why_not(GPU, "decoder") == DECODER_REASON
    assert kernel_trust.why_not(GPU, "models") is None
    assert kernel_checks.count == 1
    assert not kernel_cache.exists()
    kernel_trust.forget()
    kernel_checks.faults = ()
    assert kernel_trust.why_not(GPU, "decoder") is None
    assert kernel_checks.count == 2


def test_many_faults_are_counted(kernel_checks: Checks) -> None:
    kernel_checks.faults = tuple(replace(DECODER_FAULT, kernel=name) for name in CASES)
    reason = kernel_trust.why_not(GPU)
    assert reason is not None
    assert reason.startswith(
        "59 of 59 kernels are wrong on this GPU: gemm_qkv (one expert; 128x256, pairs) did "
    )
    assert reason.endswith("; and 56 more")


def test_what_a_finding_depends_on() -> None:
    plain = kernel_trust._made_for(torch.device("cpu"), "reference")
    assert set(plain) == {"device", "backend", "build", "driver", "torch"}
    builds = {kernel_trust._build(backend) for backend in ("reference", "sim")}
    assert len(builds) == 2


def test_a_build_is_all_that_launches_kernels_and_checks_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "package"
    for room in ("kernels", "model", "cli"):
        (package / room).mkdir(parents=True)
    monkeypatch.setattr(kernel_trust, "_PACKAGE", package)
    build = kernel_trust._build.__wrapped__
    builds = [build("gpu")]
    for name in ("kernels/launch.py", "kernels/products.py", "model/operations.py", "kernels/_C.abi.so"):
        (package / name).write_text("one")
        builds.append(build("gpu"))
        (package / name).write_text("two")
        builds.append(build("gpu"))
    (package / "cli" / "parser.py").touch()
    assert len(set(builds)) == 9
    assert build("gpu") == builds[-1]
    # The patterns are those of files that there are.
    for pattern in kernel_trust.SOURCES:
        assert list(Path(ops.__file__).parents[1].glob(pattern))


def test_a_driver_is_known_by_its_cuda_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not every container shows its version in /proc."""
    monkeypatch.setattr(kernel_trust, "driver_version", lambda: None)
    monkeypatch.setattr(
        torch.cuda, "get_device_properties", lambda device: SimpleNamespace(name="H200", uuid="7")
    )
    keys = []
    for version in (12080, 13000):
        kernels = SimpleNamespace(cuda_versions=lambda version=version: (12080, version))
        monkeypatch.setattr(launch, "_module", lambda name, kernels=kernels: kernels)
        keys.append(kernel_trust._made_for(GPU, "gpu"))
    assert keys[0] | {"cuda": "13000"} == keys[1] != keys[0]


@pytest.mark.gpu
def test_the_kernels_of_a_gpu(kernel_cache: Path) -> None:
    """Nothing replaced: a child process on the GPU, and what is kept of it."""
    report = kernel_trust.examine("cuda")
    assert [finding for finding in report.findings if finding.verdict != "right"] == []
    kernel_trust.forget()
    assert kernel_trust.known("cuda") == report


# --- what follows ---------------------------------------------------------------------------------------------


def on_a_gpu() -> Any:
    """As much of a model as choosing a path takes."""
    return SimpleNamespace(device=GPU, config=CONFIG, dtype=torch.bfloat16)


def test_the_engine_falls_back_and_says_so(kernel_checks: Checks, caplog: pytest.LogCaptureFixture) -> None:
    kernel_checks.faults = (MODEL_FAULT, DECODER_FAULT)
    engine = Engine(on_a_gpu(), on_a_gpu())
    assert (engine.backend, engine.path.name, engine.path.reason) == (None, REFERENCE, MODEL_REASON)
    (record,) = [record for record in caplog.records if record.levelno >= logging.WARNING]
    assert record.getMessage() == f"the models run on the {REFERENCE}: {MODEL_REASON}"
    with pytest.raises(
        InputError, match=r"kernels: expected .* they run on: .* gated_attention \(window; 128x176\) "
    ):
        Engine(on_a_gpu(), kernels=True)
    assert kernel_checks.count == 1


def test_the_engine_trusts_what_it_is_told_to(kernel_checks: Checks) -> None:
    kernel_checks.faults = (MODEL_FAULT,)
    engine = Engine(random_model(), check=False)
    assert (engine.backend, engine.path.name) == ("gpu", KERNELS)
    assert engine.path.reason.endswith("unchecked, as asked for")
    assert Engine(random_model(), kernels=False).path.reason == "asked for"
    assert kernel_checks.count == 0
    kernel_checks.faults = (DECODER_FAULT,)
    for check, count in ((None, 1), (None, 1), (True, 2)):
        engine = Engine(random_model(), check=check)
        assert (engine.backend, kernel_checks.count) == ("gpu", count)
        assert engine.path.reason.endswith("which agree with PyTorch here")


def tiny_vae(backend: ops.Backend | None = None, **options: Any) -> TurboVAE:
    model = reference_vae.TurboVAE.from_state_dict(TINY_CONFIG, tiny_state_dict(), dtype=torch.bfloat16)
    return TurboVAE(model, backend, **options)


def test_the_decoder_falls_back_and_says_so(kernel_checks: Checks, caplog: pytest.LogCaptureFixture) -> None:
    kernel_checks.faults = (DECODER_FAULT,)
    assert tiny_vae().backend == "reference"
    (record,) = [record for record in caplog.records if record.levelno >= logging.WARNING]
    assert record.getMessage() == f"Turbo VAE: in PyTorch: {DECODER_REASON}"
    assert tiny_vae(check=False).backend == "gpu"
    assert tiny_vae("gpu").backend == "gpu"
    assert kernel_checks.count == 1
    with pytest.raises(InputError, match=r"Turbo VAE backend 'gpu': .* conv_picture \(bytes\) did not end"):
        tiny_vae("gpu", check=True)
    kernel_checks.faults = (MODEL_FAULT,)
    assert tiny_vae(check=True).backend == "gpu"
    # Where it would not run on the kernels, they are not asked.
    vae = TurboVAE.from_state_dict(TINY_CONFIG, tiny_state_dict(), check=True)
    assert (vae.backend, kernel_checks.count) == ("reference", 3)


def load(root: Path, **options: Any) -> MagiHumanPipeline:
    return MagiHumanPipeline.from_pretrained(root, device="cpu", **options)


@pytest.mark.parametrize(
    ("faults", "paths"),
    [
        ((), (KERNELS, "gpu")),
        ((MODEL_FAULT,), (REFERENCE, "gpu")),
        ((DECODER_FAULT,), (KERNELS, "reference")),
        ((MODEL_FAULT, DECODER_FAULT), (REFERENCE, "reference")),
    ],
)
def test_each_part_of_a_pipeline_takes_its_path(
    faults: tuple[Finding, ...],
    paths: tuple[str, str],
    kernel_checks: Checks,
    tiny_checkpoint: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    planned: list[ModelSizes] = []

    def plan(sizes: ModelSizes) -> list[MemoryPlan]:
        planned.append(sizes)
        return memory_plan(sizes)

    monkeypatch.setattr(loading, "memory_plan", plan)
    kernel_checks.faults = faults
    pipe = load(tiny_checkpoint)
    assert (pipe.engine.path.name, pipe.turbo_vae.backend) == paths
    for sizes in (*planned, pipe._sizes):
        assert (sizes.kernels, sizes.kernel_decoder) == (paths[0] == KERNELS, paths[1] == "gpu")
    assert len(planned) == 1
    assert kernel_checks.count == 1


def test_a_pipeline_checks_anew_once_or_not_at_all(kernel_checks: Checks, tiny_checkpoint: Path) -> None:
    kernel_checks.faults = (MODEL_FAULT, DECODER_FAULT)
    pipe = load(tiny_checkpoint, check_kernels=False)
    assert (pipe.engine.path.name, pipe.turbo_vae.backend, kernel_checks.count) == (KERNELS, "gpu", 0)
    load(tiny_checkpoint)
    assert kernel_checks.count == 1
    kernel_checks.faults = ()
    pipe = load(tiny_checkpoint, check_kernels=True)
    assert (pipe.engine.path.name, pipe.turbo_vae.backend, kernel_checks.count) == (KERNELS, "gpu", 2)
    load(tiny_checkpoint, kernels=False, check_kernels=True)
    load(tiny_checkpoint, precision="fp32", check_kernels=True)
    assert kernel_checks.count == 2


@pytest.mark.parametrize("fault", [MODEL_FAULT, DECODER_FAULT])
def test_insisting_on_a_wrong_kernel_is_refused_before_loading(
    fault: Finding, kernel_checks: Checks, tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kernel_checks.faults = (fault,)
    monkeypatch.setattr(
        TurboVAE, "from_pretrained", lambda *args, **options: pytest.fail("something was loaded")
    )
    with pytest.raises(InputError, match=r"kernels: expected kernels that are right: ") as caught:
        load(tiny_checkpoint, kernels=True)
    assert fault.kernel in str(caught.value)
