"""`check`: a sound checkpoint passes, and every planted defect is reported, all of them at once."""

from __future__ import annotations

import json
import os
import shutil
import weakref
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from magihuman_fast.checkpoints import check as checkpoint_check
from magihuman_fast.checkpoints.check import CheckReport, ComponentReport, check_checkpoint
from magihuman_fast.checkpoints.synthetic import SIZES, random_dit_tensors, write_dit
from magihuman_fast.checkpoints.synthetic.text_encoder import write_text_encoder
from magihuman_fast.codecs.audio_vae import AudioVAE
from magihuman_fast.errors import CheckpointError, InputError
from magihuman_fast.model.config import DiTConfig
from magihuman_fast.model.dit import DiT
from magihuman_fast.model.turbo_vae import TurboVAE
from magihuman_fast.model.turbo_vae_config import TurboVAEConfig
from magihuman_fast.runtime.memory_estimate import activation_bytes, decode_bytes

INDEX = "model.safetensors.index.json"
QKV = "block.layers.1.attention.linear_qkv.weight"
PROJ = "block.layers.3.attention.linear_proj.weight"


@pytest.fixture
def complete(tiny_checkpoint: Path, tmp_path: Path) -> Path:
    """A copy with the distilled model only. Files are hard links: defects replace them, never write into them."""
    ignored = shutil.ignore_patterns("base", "540p_sr", "1080p_sr")
    shutil.copytree(tiny_checkpoint, tmp_path / "model", ignore=ignored, copy_function=os.link)
    return tmp_path / "model"


@pytest.fixture
def root(complete: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The same, its audio VAE taken for sound: building one takes longer than everything else together."""
    monkeypatch.setattr(
        AudioVAE, "from_pretrained", lambda path, device: SimpleNamespace(weight=torch.zeros(1))
    )
    return complete


def component(report: CheckReport, name: str) -> ComponentReport:
    return next(c for c in report.components if c.name == name)


def problems(root: Path, name: str = "distill", **options: Any) -> list[str]:
    """What is wrong with one component, which must be what makes the checkpoint unusable."""
    report = check_checkpoint(root, **options)
    assert not report.ok
    assert [c.name for c in report.components if c.stands_in_the_way] == [name]
    return component(report, name).problems


def rewrite(
    folder: Path, key: str, change: Callable[[dict[str, torch.Tensor]], object], index: bool = True
) -> str:
    """Change the tensors of the shard that holds `key`, and the index with them; returns the shard's name."""
    content = json.loads((folder / INDEX).read_text())
    shard = content["weight_map"][key]
    tensors = load_file(folder / shard)
    (folder / shard).unlink()
    change(tensors)
    save_file(tensors, folder / shard)
    if index:
        kept = {name: where for name, where in content["weight_map"].items() if where != shard}
        content["weight_map"] = kept | dict.fromkeys(tensors, shard)
        (folder / INDEX).unlink()
        (folder / INDEX).write_text(json.dumps(content))
    return str(shard)


def test_sound_checkpoint(complete: Path) -> None:
    report = check_checkpoint(complete)
    assert report.ok
    status = {c.name: c.status for c in report.components}
    assert status == {
        "distill": "ok",
        "base": "absent",
        "540p_sr": "absent",
        "1080p_sr": "absent",
        "Turbo VAE": "ok",
        "text encoder": "ok",
        "image VAE": "ok",
        "audio VAE": "ok",
    }
    distill = component(report, "distill")
    config = SIZES["tiny"].dit
    assert distill.tensors == len(config.state_dict_shapes())
    dit = DiT.from_state_dict(config, dict(random_dit_tensors(config)))
    layers = [tensor for layer in dit.layers for tensor in vars(layer).values()]
    rest = [t for pair in (*dit.adapter.values(), *dit.head.values()) for t in pair]
    assert distill.memory_bytes == sum(t.nbytes for t in (*layers, *rest, dit.bands))
    assert distill.disk_bytes == sum(f.stat().st_size for f in (complete / "distill").glob("*.safetensors"))
    assert any("float32 (51)" in note for note in distill.notes)
    assert all(c.memory_bytes > 0 for c in report.components if c.status == "ok")
    assert json.loads(json.dumps(report.to_dict()))["ok"] is True


def test_memory_grows_with_the_preset(root: Path) -> None:
    report = check_checkpoint(root)
    for kernels in (False, True):
        memory = [m for m in report.memory if m.kernels == kernels and m.text_encoder == "device"]
        assert [(m.preset, m.size, m.tokens) for m in memory] == [
            ("256p", (448, 256), 3584 + 126 + 640),
            ("540p", (960, 544), 16320 + 126 + 640),
            ("1080p", (1920, 1088), 65280 + 126 + 640),
        ]
        assert memory[0].needed_bytes < memory[1].needed_bytes < memory[2].needed_bytes
        assert memory[1].weight_bytes > memory[0].weight_bytes
        assert "540p_sr not there" in memory[1].note
    assert {m.text_encoder for m in report.memory} == {"device", "cpu", "disk"}
    # In float32 there is only the reference path.
    assert not any(m.kernels for m in check_checkpoint(root, precision="fp32").memory)


def test_missing_and_truncated_shards_are_all_named(root: Path) -> None:
    folder = root / "distill"
    for number in (2, 5):
        (folder / f"model-{number:05d}-of-00013.safetensors").unlink()
    damaged = folder / "model-00008-of-00013.safetensors"
    content = damaged.read_bytes()
    damaged.unlink()
    damaged.write_bytes(content[:-100])
    found = problems(root)
    assert [p for p in found if "model-00002-of-00013.safetensors: missing" in p]
    assert [p for p in found if "model-00005-of-00013.safetensors: missing" in p]
    assert [
        p for p in found if "model-00008-of-00013.safetensors" in p and "expected a safetensors file" in p
    ]
    assert len(found) == 3


def test_tensors_of_a_missing_shard_are_not_named_again(root: Path) -> None:
    folder = root / "distill"
    rewrite(folder, PROJ, lambda t: t.pop(PROJ))
    content = json.loads((folder / INDEX).read_text())
    content["weight_map"][PROJ] = "lost.safetensors"
    (folder / INDEX).write_text(json.dumps(content))
    assert problems(root) == ["lost.safetensors: missing; tensors in it: 1"]


def test_wrong_shapes_missing_and_unexpected_keys_are_all_named(root: Path) -> None:
    folder = root / "distill"
    rewrite(folder, QKV, lambda t: t.update({QKV: t[QKV][:-1].clone()}))
    rewrite(folder, PROJ, lambda t: (t.pop(PROJ), t.update({"block.layers.3.mlp.extra": torch.zeros(2)})))
    found = problems(root)
    rows = SIZES["tiny"].dit.qkvg_rows
    assert f"{QKV}: expected shape [{rows}, 256], got [{rows - 1}, 256]" in found
    assert f"{PROJ}: missing" in found
    assert "block.layers.3.mlp.extra: unexpected, [2]" in found
    assert len(found) == 3


def test_sizes_that_cannot_be_read_off(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a key that tells a size, only a model of the published sizes can be checked further."""
    embedder = "adapter.text_embedder.weight"
    rewrite(root / "distill", embedder, lambda t: t.pop(embedder))
    rewrite(root / "distill", QKV, lambda t: t.update({QKV: t[QKV][:-1].clone()}))
    (problem,) = problems(root)
    assert f"not a MagiHuman DiT: no '{embedder}'" in problem
    monkeypatch.setattr(checkpoint_check, "DiTConfig", lambda: SIZES["tiny"].dit)
    found = problems(root)
    assert f"{embedder}: missing" in found
    assert len(found) == 2


def test_index_that_disagrees(root: Path) -> None:
    folder = root / "distill"
    shard = rewrite(folder, QKV, lambda t: t.update(stray=torch.zeros(1)), index=False)
    assert problems(root) == [f"{shard}: stray is in it, but not in the index"]


@pytest.mark.parametrize("shard", ["../model.safetensors", ""])
def test_index_that_points_outside(root: Path, shard: str) -> None:
    content = json.loads((root / "distill" / INDEX).read_text())
    content["weight_map"][QKV] = shard
    (root / "distill" / INDEX).unlink()
    (root / "distill" / INDEX).write_text(json.dumps(content))
    assert any("outside the folder" in problem for problem in problems(root))


def test_no_index_and_no_model(root: Path) -> None:
    (root / "distill" / INDEX).unlink()
    (problem,) = problems(root)
    assert INDEX in problem


def test_dtypes_are_told(root: Path) -> None:
    shutil.rmtree(root / "distill")
    write_dit(root / "distill", SIZES["tiny"].dit, linear_dtype=torch.bfloat16, shards=2)
    report = check_checkpoint(root)
    assert report.ok
    assert "layer linears in bfloat16; the published file has float32" in component(report, "distill").notes
    (root / "distill").rename(root / "base")
    base = component(check_checkpoint(root, variant="base"), "base")
    assert base.status == "ok"
    assert not [note for note in base.notes if "published" in note]


def test_integers_are_refused(root: Path) -> None:
    rewrite(root / "distill", QKV, lambda t: t.update({QKV: t[QKV].to(torch.int32)}))
    assert problems(root) == [f"{QKV}: expected a floating-point dtype, got torch.int32"]


def test_rotary_bands_are_the_models(root: Path) -> None:
    name = "adapter.rope.bands"
    rewrite(root / "distill", name, lambda t: t.update({name: t[name] * 2}))
    (problem,) = problems(root)
    assert problem.startswith("adapter.rope.bands: expected [1.0")


def test_compressed_shards(root: Path) -> None:
    shutil.rmtree(root / "distill")
    write_dit(root / "distill", SIZES["tiny"].dit, shards=2, compress=True)
    assert check_checkpoint(root).ok


def test_missing_components(root: Path) -> None:
    shutil.rmtree(root / "stable-audio-open-1.0")
    (root / "turbo_vae" / "checkpoint-340000.ckpt").unlink()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (root / "t5gemma-9b-9b-ul2" / name).unlink()
    report = check_checkpoint(root, sr="1080p")
    assert [c.name for c in report.components if c.stands_in_the_way] == [
        "1080p_sr",
        "Turbo VAE",
        "text encoder",
        "audio VAE",
    ]
    assert component(report, "audio VAE").status == "absent"
    assert component(report, "Turbo VAE").problems == ["checkpoint-340000.ckpt: missing"]
    assert component(report, "text encoder").problems == [
        "tokenizer.json: missing",
        "tokenizer_config.json: missing",
    ]


def test_audio_vae(complete: Path) -> None:
    (complete / "stable-audio-open-1.0" / "model_config.json").unlink()
    assert problems(complete, "audio VAE") == ["model_config.json: missing"]
    (complete / "stable-audio-open-1.0" / "model_config.json").write_text("{}")
    (problem,) = problems(complete, "audio VAE")
    assert "model_config.json" in problem


def test_image_vae_is_optional_but_not_broken(root: Path) -> None:
    file = root / "Wan2.2-TI2V-5B" / "Wan2.2_VAE.pth"
    weights = torch.load(file, weights_only=True)
    del weights["encoder.conv1.bias"]
    file.unlink()
    torch.save(weights, file)
    (problem,) = problems(root, "image VAE")
    assert "encoder.conv1.bias" in problem
    shutil.rmtree(file.parent)
    report = check_checkpoint(root)
    assert report.ok
    assert component(report, "image VAE").notes == ["without it there are no reference images"]
    assert not check_checkpoint(root, image_vae=file.parent).ok


def test_models_not_asked_for_do_not_count(root: Path) -> None:
    (root / "540p_sr").mkdir()
    report = check_checkpoint(root)
    assert report.ok
    assert component(report, "540p_sr").status == "broken"
    assert not check_checkpoint(root, sr="540p").ok


def test_components_elsewhere(root: Path, tmp_path: Path) -> None:
    (root / "t5gemma-9b-9b-ul2").rename(tmp_path / "text")
    assert not check_checkpoint(root).ok
    assert check_checkpoint(root, text_encoder=tmp_path / "text").ok


def test_width_of_the_text_encoder(root: Path) -> None:
    shutil.rmtree(root / "t5gemma-9b-9b-ul2")
    write_text_encoder(root / "t5gemma-9b-9b-ul2", hidden=32)
    (problem,) = problems(root)
    assert "reads text encodings of width 64" in problem
    assert "gives 32" in problem


def test_bad_arguments(root: Path) -> None:
    with pytest.raises(CheckpointError, match="found no folder"):
        check_checkpoint(root / "nothing")
    for options in ({"variant": "turbo"}, {"sr": "4k"}, {"precision": "fp8"}):
        with pytest.raises(InputError, match=next(iter(options))):
            check_checkpoint(root, **options)


class PeakMemory(TorchDispatchMode):
    """Bytes of all tensor storages made while it is active, at their peak."""

    def __init__(self) -> None:
        super().__init__()
        self.live: dict[int, int] = {}
        self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {
            t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)
        }
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                key = storage._cdata
                if key not in given and key not in self.live:
                    self.live[key] = storage.nbytes()
                    weakref.finalize(storage, self.live.pop, key, None)
        self.peak = max(self.peak, sum(self.live.values()))
        return out


@pytest.mark.parametrize("gelu7_layers", [(0, 1), ()], ids=["GELU7", "SwiGLU7"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
def test_activation_estimate(dtype: torch.dtype, gelu7_layers: tuple[int, ...]) -> None:
    config = DiTConfig(
        num_layers=2,
        hidden_size=256,
        num_query_groups=1,
        text_in_channels=64,
        mm_layers=(0,),
        gelu7_layers=gelu7_layers,
    )
    dit = DiT.from_state_dict(config, dict(random_dit_tensors(config)), dtype=dtype)
    inputs = torch.randn(48, 8, 16, 16), torch.randn(60, 64), torch.randn(28, 64)
    with PeakMemory() as memory:
        dit.velocity(*inputs)
    assert 0.85 < memory.peak / activation_bytes(config, 8 * 64 + 88, dtype.itemsize) < 1.1


@pytest.mark.parametrize(
    ("widths", "least"), [([8, 8, 8, 8], 0.8), ([32, 64, 64, 64], 0.85)], ids=["narrow", "wide"]
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
def test_decode_estimate(dtype: torch.dtype, widths: list[int], least: float) -> None:
    """Where the widest map sets it, and where the picture does."""
    values = dict(SIZES["tiny"].turbo_vae) | {"decoder_block_out_channels": widths}
    config = TurboVAEConfig.from_dict(values)
    shapes = config.state_dict_shapes()
    vae = TurboVAE.from_state_dict(values, {n: torch.full(s, 0.01) for n, s in shapes.items()}, dtype=dtype)
    with PeakMemory() as memory:
        frames = vae.decode_frames(torch.randn(48, 9, 2, 2))
    estimate = decode_bytes(config, (32, 32), 9, dtype.itemsize)
    assert least < (memory.peak + frames.nbytes) / estimate < 1.1
