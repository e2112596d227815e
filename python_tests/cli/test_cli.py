"""The shell command: what it prints where, its exit codes, and what it refuses before loading anything."""

from __future__ import annotations

import io
import json
import logging
import os
import re
import shutil
import subprocess
import sys
from collections import namedtuple
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from PIL import Image

from magihuman_fast.checkpoints.synthetic import MODELS
from magihuman_fast.checkpoints.synthetic.disk_size import checkpoint_bytes
from magihuman_fast.cli import commands
from magihuman_fast.errors import InputError
from magihuman_fast.kernels import ops
from magihuman_fast.model.dit import DiT
from magihuman_fast.pipeline.pipeline import MagiHumanPipeline


def test_generate_from_files(
    run: Any, tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing replaced: prompt, picture and sound from files, the model from its folder, one JSON object out."""
    monkeypatch.setattr(commands, "cpu_bf16_instructions", lambda: ["avx512_bf16"])
    (tmp_path / "prompt.txt").write_text("A woman speaks.\n", encoding="utf-8")
    Image.fromarray(np.full((80, 90, 3), 128, np.uint8)).save(tmp_path / "face.png")
    soundfile.write(tmp_path / "speech.wav", np.random.default_rng(0).normal(0, 0.1, 24000), 16000)
    inputs = ["--prompt-file", tmp_path / "prompt.txt", "--image", tmp_path / "face.png"]
    inputs += ["--audio", tmp_path / "speech.wav", "--seconds", 2]
    inputs += ["--size", "96x64", "--steps", 1, "--seed", 3, "--device", "cpu"]
    output = tmp_path / "out.mp4"
    code, out, err = run("generate", "--model", tiny_checkpoint, *inputs, "--output", output, "--json")
    assert code == 0
    assert (
        err == "warning: the driving sound lasts 1.500 s: the clip has 38 frames and lasts 1.52 s, not 2 s\n"
    )
    values = json.loads(out)
    assert out.count("\n") == 1
    expected = {"output": str(output), "frames": 38, "width": 96, "height": 64, "fps": 25, "seed": 3}
    assert {key: values[key] for key in expected} == expected
    assert (values["device"], values["sample_rate"], values["sr"]) == ("cpu", 44100, None)
    assert values["audio_seconds"] == 1.52
    assert values["load_seconds"] > 0
    assert {"text", "audio_encode", "image_encode", "denoise", "decode", "sound", "save", "total"} == set(
        values["timings"]
    )
    assert output.stat().st_size > 1000


def test_table_for_people(run: Any, loaded: object, request_: list[object]) -> None:
    code, out, err = run(*request_)
    assert code == 0
    assert "25 frames of 64x64 at 25 fps" in out
    for stage in ("load", "text", "denoise", "super_resolution", "decode", "sound", "save", "total"):
        assert f"\n{stage} " in out
    assert "a library talks" in err
    assert "a library talks" not in out


def test_options_reach_the_pipeline(
    run: Any, loaded: MagiHumanPipeline, request_: list[object], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: dict[str, Any] = {}

    def load(root: Path, **options: Any) -> MagiHumanPipeline:
        seen.update(options, root=root)
        return loaded

    def call(pipe: object, prompt: str, **options: Any) -> None:
        seen.update(options, prompt=prompt)
        raise InputError("enough")

    monkeypatch.setattr(MagiHumanPipeline, "from_pretrained", load)
    monkeypatch.setattr(MagiHumanPipeline, "__call__", call)
    loading = {
        "device": "cpu",
        "precision": "fp32",
        "text_encoder_on": "disk",
        "variant": "base",
        "sr": "1080p",
    }
    clip = {"seconds": 60, "steps": 3, "sr_steps": 7, "seed": 2**64 - 1, "negative_prompt": "a tree"}
    folders = {name: Path(name) for name in ("text_encoder", "image_vae", "audio_vae")}
    given = [("--" + name.replace("_", "-"), value) for name, value in (loading | clip | folders).items()]
    more = ["--size", "96x64", "--sr-size", "128x96", "--sr-guidance", "--reference", "--no-check-kernels"]
    assert run(*request_, *(text for pair in given for text in pair), *more)[0] == 2
    expected = loading | clip | folders | {"kernels": False, "check_kernels": False, "sr_guidance": True}
    expected |= {"width": 96, "height": 64, "sr_size": (128, 96), "prompt": "A woman speaks."}
    assert {name: seen[name] for name in expected} == expected
    assert seen.keys() - expected.keys() == {"root", "on_load", "on_step"}
    run(*request_)
    expected = {
        "text_encoder_on": "auto",
        "device": "auto",
        "precision": "bf16",
        "variant": "distill",
        "seed": 42,
    }
    expected |= {"kernels": None, "check_kernels": None, "sr_guidance": False, "sr_steps": 1}
    assert {name: seen[name] for name in expected} == expected


def test_quiet(run: Any, loaded: object, request_: list[object]) -> None:
    request_[request_.index("64x64")] = "70x64"
    _, _, err = run(*request_)
    assert err.count("warning: size 70x64 becomes 64x64") == 1
    code, out, err = run(*request_, "--quiet")
    assert (code, out) == (0, "")
    assert "warning" not in err
    assert not logging.getLogger("magihuman_fast").handlers


def test_slow_precision_is_told(
    run: Any, loaded: object, request_: list[object], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(commands, "cpu_bf16_instructions", lambda: [])
    assert "--precision fp32 is many times faster" in run(*request_, "--device", "cpu")[2]
    assert "--precision" not in run(*request_, "--device", "cpu", "--precision", "fp32")[2]
    monkeypatch.setattr(commands, "cpu_bf16_instructions", lambda: ["amx_bf16"])
    assert "--precision" not in run(*request_, "--device", "cpu")[2]


def test_progress_bars_on_a_terminal(
    run: Any, loaded: object, request_: list[object], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    for extra, expected in (([], True), (["--json"], False), (["--quiet"], False)):
        terminal = Terminal()
        monkeypatch.setattr(sys, "stderr", terminal)
        assert run(*request_, *extra)[0] == 0
        for stage in ("distill", "denoise", "super_resolution", "decode"):
            assert (f"{stage}: 100%" in terminal.getvalue()) is expected


def test_no_progress_without_a_terminal(run: Any, loaded: object, request_: list[object]) -> None:
    assert "100%" not in run(*request_)[2]


@pytest.mark.parametrize(
    ("extra", "code", "message"),
    [
        (["--output", "FOLDER/out.avi"], 4, "ends in .mp4"),
        (["--output", "FOLDER/nothing/out.mp4"], 4, "expected an existing folder"),
        (["--image", "FOLDER/nothing.png"], 2, "expected a file, found nothing"),
        (["--image", "FOLDER/text.txt"], 2, "image FOLDER/text.txt"),
        (["--audio", "FOLDER/nothing.wav"], 2, "expected a file, found nothing"),
        (["--audio", "FOLDER/short.wav"], 2, "audio: expected at least 1 s, got 0.500 s"),
        (["--model", "MODEL", "--image", "FOLDER/face.png"], 2, "--image needs the image VAE"),
        (["--image", "FOLDER/face.png", "--image-background", "pale"], 2, "expected a colour such as white"),
        (["--image-background", "red"], 2, "--keep-image-profile need --image"),
        (["--keep-image-profile"], 2, "--keep-image-profile need --image"),
        (
            ["--model", "FOLDER", "--image", "FOLDER/no.png", "--output", "no/x"],
            3,
            "FOLDER: expected distill/, ",
        ),
        (["--model", "TINY/distill", "--image", "FOLDER/no.png"], 3, "; was TINY meant?"),
        (["--model", "TINY/.", "--sr", "1080p", "--output", "no/x.avi"], 4, "ends in .mp4"),
        (["--seconds", "0.5"], 2, "seconds: expected 1 to 60, got 0.5"),
        (["--seconds", "nan"], 2, "seconds: expected 1 to 60, got nan"),
        (["--size", "32x64"], 2, "size: expected sides of 64 to"),
        (["--size", "big"], 2, "expected WIDTHxHEIGHT such as 448x256, got 'big'"),
        (["--sr", "540p", "--sr-size", "9999x64"], 2, "sr_size: expected sides of"),
        (["--sr-guidance"], 2, "need --sr 540p"),
        (["--seed", "-1"], 2, "seed: expected"),
        (["--seed", f"{2**64}"], 2, "seed: expected an integer from 0 to 2^64 - 1, got 18446744073709551616"),
        (["--steps", "0"], 2, "steps"),
        (["--variant", "turbo"], 2, "invalid choice: 'turbo'"),
        (["--prompt-file", "FOLDER/text.txt"], 2, "not allowed with argument --prompt"),
        (["--negative-prompt", " "], 2, "negative prompt: expected text"),
        (["--prompt", ""], 2, "prompt: expected text, got ''"),
        (["--frames", "3"], 2, "unrecognized arguments: --frames 3"),
        (["--json", "--seconds", "99"], 2, "seconds: expected 1 to 60, got 99"),
    ],
)
def test_refused_before_loading(
    extra: list[str],
    code: int,
    message: str,
    run: Any,
    tiny_checkpoint: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def load(*args: object, **options: object) -> None:
        pytest.fail("the model was loaded for a request that cannot be served")

    monkeypatch.setattr(MagiHumanPipeline, "from_pretrained", load)
    (tmp_path / "text.txt").write_text("text")
    Image.new("RGB", (64, 64)).save(tmp_path / "face.png")
    soundfile.write(tmp_path / "short.wav", np.zeros(8000), 16000)
    without_vae = tmp_path / "without"
    shutil.copytree(
        tiny_checkpoint, without_vae, copy_function=os.link, ignore=shutil.ignore_patterns("Wan2.2*")
    )
    names = {"FOLDER": str(tmp_path), "MODEL": str(without_vae), "TINY": str(tiny_checkpoint)}

    def named(text: str) -> str:
        return re.sub("|".join(names), lambda match: names[match[0]], text)

    before = sorted(tmp_path.iterdir())
    request = ["generate", "--model", tiny_checkpoint, "--prompt", "Hello.", "--output", tmp_path / "out.mp4"]
    got, out, err = run(*request, *map(named, extra))
    assert got == code
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert named(message) in err
    if "--json" in extra:
        assert json.loads(out)["error"] == {"kind": "InputError", "message": err[7:-1], "exit_code": 2}
    else:
        assert out == ""
    assert sorted(tmp_path.iterdir()) == before


def test_usage(run: Any) -> None:
    for argv in ([], ["paint"], ["generate", "--prompt", "Hello."]):
        code, out, err = run(*argv)
        assert (code, out, err.count("\n")) == (2, "", 1)
        assert "--help" in err
    code, out, err = run("--help")
    assert (code, err) == (0, "")
    assert "hf download GAIR/daVinci-MagiHuman" in out
    for command in ("generate", "check", "synth", "info"):
        code, out, _ = run(command, "--help")
        assert code == 0
        assert "example" in out
    assert run("--version")[1].startswith("magihuman-fast 0.")


def test_bad_checkpoint(run: Any, request_: list[object], tmp_path: Path) -> None:
    request_[request_.index("--model") + 1] = tmp_path
    code, out, err = run(*request_, "--json")
    assert code == 3
    assert json.loads(out)["error"]["kind"] == "CheckpointError"
    assert str(tmp_path) in err
    assert not (tmp_path / "out.mp4").exists()


def fail_in_mid_run(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    def velocity(*args: object, **options: object) -> None:
        raise error

    monkeypatch.setattr(DiT, "velocity", velocity)


def test_interrupted(
    run: Any, loaded: object, request_: list[object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fail_in_mid_run(monkeypatch, KeyboardInterrupt())
    code, out, err = run(*request_, "--json")
    assert code == 130
    assert err.endswith("error: interrupted\n")
    assert json.loads(out)["error"]["exit_code"] == 130
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"),
        MemoryError(),
    ],
)
def test_out_of_memory(
    error: BaseException, run: Any, loaded: object, request_: list[object], monkeypatch: pytest.MonkeyPatch
) -> None:
    fail_in_mid_run(monkeypatch, error)
    code, _, err = run(*request_)
    assert code == 1
    assert "error: out of memory: " in err
    assert "magihuman-fast check" in err


def test_traceback_only_when_asked_for(
    run: Any, loaded: object, request_: list[object], monkeypatch: pytest.MonkeyPatch
) -> None:
    fail_in_mid_run(monkeypatch, RuntimeError("first\nsecond"))
    code, _, err = run(*request_)
    assert code == 1
    assert "error: unexpected RuntimeError: first second" in err
    assert "Traceback" not in err
    assert "Traceback" in run(*request_, "--verbose")[2]


def test_output_that_cannot_be_written(
    run: Any,
    loaded: MagiHumanPipeline,
    request_: list[object],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def replace(*args: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", replace)
    code, _, err = run(*request_)
    assert code == 4
    assert "No space left" in err
    assert list(tmp_path.iterdir()) == []


def test_check(run: Any, tiny_checkpoint: Path, tmp_path: Path) -> None:
    code, out, err = run("check", tiny_checkpoint, "--sr", "1080p")
    assert (code, err) == (0, "")
    assert "ok      distill" in out
    for path in ("kernels", "reference"):
        assert re.search(rf"1080p 1920x1088 +{path} +device +66046 ", out)
    assert out.endswith("ok: everything needed is there\n")
    shutil.copytree(tiny_checkpoint / "distill", tmp_path / "distill", copy_function=os.link)
    (tmp_path / "distill" / "model-00002-of-00013.safetensors").unlink()
    code, out, _ = run("check", tmp_path, "--json")
    assert code == 3
    report = json.loads(out)
    assert report["ok"] is False
    distill = report["components"][0]
    assert (distill["name"], distill["status"]) == ("distill", "broken")
    code, out, _ = run("check", tmp_path)
    assert code == 3
    assert "broken  distill" in out
    assert "          - model-00002-of-00013.safetensors: missing" in out
    assert "MISSING audio VAE" in out
    assert run("check", tmp_path / "nothing")[0] == 3


def test_synth(run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "model"
    code, out, err = run("synth", folder, "--models", "distill", "--json")
    assert code == 0
    values = json.loads(out)
    assert "RANDOM weights" in err
    written = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    assert values["bytes"] == written
    assert 0.95 < checkpoint_bytes("tiny", ["distill"]) / written < 1.05
    code, _, err = run("synth", folder)
    assert code == 4
    assert "--force" in err
    assert run("synth", folder / "turbo_vae" / "checkpoint-340000.ckpt")[0] == 4

    written_to = []
    monkeypatch.setattr(commands, "write_checkpoint", lambda folder, **options: written_to.append(folder))
    assert run("synth", folder, "--force", "--quiet") == (0, "", "")
    assert written_to == [folder]
    Usage = namedtuple("Usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(10**12, 0, 10**10))
    code, _, err = run("synth", tmp_path / "new", "--size", "full", "--models", "distill,base")
    assert code == 4
    assert "GiB of free disk, found 9.3 GiB" in err
    assert "expected some of distill,base,540p,1080p" in run("synth", tmp_path / "new", "--models", "x")[2]
    assert written_to == [folder]


def test_full_size_is_the_published_one() -> None:
    """57 GiB a model in float32, 28.5 GiB with bfloat16 linears; all else is small beside it."""
    one, two = (checkpoint_bytes("full", models) / 2**30 for models in (["distill"], ["distill", "base"]))
    assert 57 < one < 62
    assert 28.4 < two - one < 28.8
    assert checkpoint_bytes("full", list(MODELS)) / 2**30 > 3 * 57 + 28.5


def test_info(run: Any) -> None:
    code, out, err = run("info")
    assert (code, err) == (0, "")
    assert "Hopper kernels: " in out
    assert str(ops.gpu_unavailable()) in out
    assert f"torch {torch.__version__}" in out
    code, out, _ = run("info", "--json")
    machine = json.loads(out)
    assert machine["cpu"]["cores"] >= 1
    assert machine["codecs"] == {"libx264": True, "aac": True}
    assert len(machine["cuda"]["devices"]) == torch.cuda.device_count()


def test_help_does_not_wait_for_torch() -> None:
    probe = "import sys, magihuman_fast.cli as c; c.main(['generate', '--help']); sys.exit('torch' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", probe], capture_output=True, cwd=Path(__file__).resolve().parents[2]
    )
    assert done.returncode == 0


def test_as_a_module() -> None:
    command = [sys.executable, "-m", "magihuman_fast", "generate", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).resolve().parents[2])
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert json.loads(done.stdout)["error"]["exit_code"] == 2
