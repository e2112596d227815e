"""Turbo VAE: its configuration, and loading it from state dicts and files, good and bad."""

from __future__ import annotations

import json
import logging
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from cases import GOLDEN
from magihuman_fast.checkpoints.synthetic.turbo_vae import TINY_CONFIG, write_turbo_vae
from magihuman_fast.errors import CheckpointError, InputError, OutputError
from magihuman_fast.model.latent_statistics import LATENT_MEAN, LATENT_STD
from magihuman_fast.model.turbo_vae import CHECKPOINT_NAME, CONFIG_NAME, TurboVAE
from magihuman_fast.model.turbo_vae_config import PUBLISHED_CONFIG, TurboVAEConfig
from turbo_vae_cases import random_latent, tiny_state_dict

OFFICIAL_CONFIG: dict[str, Any] = json.loads((GOLDEN / "official/turbo_vae_config.json").read_text())


# The configuration


def test_published_config_and_state_dict() -> None:
    config = TurboVAEConfig.from_dict(OFFICIAL_CONFIG)
    assert config == TurboVAEConfig()
    assert PUBLISHED_CONFIG == OFFICIAL_CONFIG
    published = json.loads((GOLDEN / "official/turbo_vae_state_dict.json").read_text())
    assert config.state_dict_shapes() == {name: tuple(shape) for name, shape in published.items()}


def test_latent_statistics_are_the_published_ones() -> None:
    published = json.loads((GOLDEN / "official/latent_statistics.json").read_text())
    assert list(LATENT_MEAN) == published["mean"]
    assert list(LATENT_STD) == published["std"]


def test_unknown_fields_are_ignored_with_one_log_line(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="magihuman_fast"):
        TurboVAEConfig.from_dict(OFFICIAL_CONFIG)
        assert caplog.messages == []
        config = TurboVAEConfig.from_dict(OFFICIAL_CONFIG | {"surprise": 1, "another": [2]})
    assert config == TurboVAEConfig()
    assert caplog.messages == ["Turbo VAE config: ignoring unknown fields ['another', 'surprise']"]


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"decoder_is_dw_conv": [False, False, True, False, False]}, "decoder_is_dw_conv .*depthwise"),
        ({"decoder_is_dw_conv": [False] * 4}, r"decoder_is_dw_conv must have .*\(5\), got 4"),
        ({"decoder_is_dw_conv": False}, "decoder_is_dw_conv must be a list of false"),
        ({"use_unpatchify": False}, "use_unpatchify must be True, got False"),
        ({"decoder_causal": True}, "decoder_causal must be False, got True"),
        ({"decoder_causal": 0}, "decoder_causal must be False, got 0"),
        ({"patch_size_t": 2}, "patch_size_t must be 1, got 2"),
        ({"patch_size_t": True}, "patch_size_t must be 1, got True"),
        ({"patch_size": "2"}, "patch_size must be an integer from 1 to 1024, got '2'"),
        ({"patch_size": 4}, "patch_size must give 4x in time and 16x in space, got 4x and 32x"),
        ({"latent_channels": 16}, "latent_channels must be 48, got 16"),
        ({"out_channels": 1}, "out_channels must be 3, got 1"),
        ({"resnet_norm_eps": 1e-5}, "resnet_norm_eps must be 1e-06, got 1e-05"),
        ({"scaling_factor": 0.5}, "scaling_factor must be 1, got 0.5"),
        ({"spatial_compression_ratio": 8}, "spatial_compression_ratio must be 16, got 8"),
        ({"temporal_compression_ratio": 8}, "temporal_compression_ratio must be 4, got 8"),
        ({"first_chunk_size": 0}, "first_chunk_size must be an integer from 1"),
        ({"step_size": 7.0}, "step_size must be an integer from 1 to 1024, got 7.0"),
        ({"step_size": True}, "step_size must be an integer from 1 to 1024, got True"),
        ({"step_size": 10**9}, "step_size must be an integer from 1 to 1024"),
        ({"decoder_block_out_channels": 64}, "decoder_block_out_channels must be a list"),
        (
            {"decoder_block_out_channels": []},
            "decoder_block_out_channels must have at least one value, got 0",
        ),
        ({"decoder_block_out_channels": [64, 128, None, 512]}, "decoder_block_out_channels .*got None"),
        ({"decoder_layers_per_block": [2, 2, 2, 3]}, "decoder_layers_per_block must have 5 values, got 4"),
        ({"decoder_layers_per_block": [2, 2, 2, 3, 10**9]}, "decoder_layers_per_block .*from 1 to 64"),
        ({"decoder_spatio_only": [False] * 3}, "decoder_spatio_only must have 4 values, got 3"),
        (
            {"decoder_spatio_only": [False, 1, False, False]},
            "decoder_spatio_only must hold true or false, got 1",
        ),
        ({"decoder_spatio_only": [True, False, False, False]}, "decoder_spatio_only must be false where"),
        ({"decoder_spatio_only": [False] * 4}, "4x in time and 16x in space, got 8x and 16x"),
    ],
)
def test_configs_that_cannot_be_served_are_refused_by_name(change: dict[str, Any], match: str) -> None:
    with pytest.raises(CheckpointError, match=match):
        TurboVAEConfig.from_dict(OFFICIAL_CONFIG | change)


def test_missing_fields_are_named_together() -> None:
    values = {k: v for k, v in OFFICIAL_CONFIG.items() if k not in ("step_size", "decoder_causal")}
    with pytest.raises(CheckpointError, match=r"missing fields \['step_size', 'decoder_causal'\]"):
        TurboVAEConfig.from_dict(values)


# State dicts


def test_module_prefix_and_foreign_keys() -> None:
    plain = tiny_state_dict()
    wrapped = {f"module.{k}": v for k, v in plain.items()}
    wrapped |= {
        "module.encoder.conv_in.conv.weight": torch.zeros(1),
        "aligned_feature_projection_heads.0.weight": 3,
    }
    latent = random_latent(1, 1, 1)
    expected = TurboVAE.from_state_dict(TINY_CONFIG, plain).decode(latent)
    assert torch.equal(TurboVAE.from_state_dict(TINY_CONFIG, wrapped).decode(latent), expected)


def test_the_model_does_not_share_memory_with_the_state_dict() -> None:
    weights = tiny_state_dict()
    model = TurboVAE.from_state_dict(TINY_CONFIG, weights)
    for tensor in weights.values():
        tensor.fill_(float("nan"))
    assert torch.isfinite(model.decode(random_latent(1, 1, 1))).all()


def test_every_bad_key_is_named_in_one_error() -> None:
    weights = tiny_state_dict()
    del weights["decoder.conv_out.conv.bias"]
    weights["decoder.up_blocks.9.surprise"] = torch.zeros(1)
    weights["decoder.conv_in.conv.weight"] = torch.zeros(16, 48, 3, 3, 1)
    weights["decoder.conv_in.conv.bias"] = torch.zeros(16, dtype=torch.int64)
    weights["decoder.mid_block.resnets.0.conv1.conv.bias"] = "text"
    weights["module.decoder.mid_block.resnets.0.conv2.conv.bias"] = torch.zeros(16)
    with pytest.raises(CheckpointError) as caught:
        TurboVAE.from_state_dict(TINY_CONFIG, weights)
    message = str(caught.value)
    assert "decoder.conv_out.conv.bias is missing, expected (12,)" in message
    assert "decoder.up_blocks.9.surprise is unexpected" in message
    assert "decoder.conv_in.conv.weight: expected shape (16, 48, 3, 3, 3), got (16, 48, 3, 3, 1)" in message
    assert "decoder.conv_in.conv.bias: expected floating-point values, got torch.int64" in message
    assert "conv1.conv.bias: expected a tensor of shape (16,), got str" in message
    assert "decoder.mid_block.resnets.0.conv2.conv.bias is there twice" in message


def test_many_bad_keys_are_counted() -> None:
    num_keys = len(TurboVAEConfig.from_dict(TINY_CONFIG).state_dict_shapes())
    with pytest.raises(CheckpointError, match=f"conv_in.conv.weight is missing.*and {num_keys - 8} more"):
        TurboVAE.from_state_dict(TINY_CONFIG, {})


def test_other_dtypes_are_refused() -> None:
    with pytest.raises(InputError, match=r"expected torch.float32 or torch.bfloat16, got torch.float16"):
        TurboVAE.from_state_dict(TINY_CONFIG, tiny_state_dict(), dtype=torch.float16)


# Files


def test_written_folder_loads_and_gives_a_sane_picture(tmp_path: Path) -> None:
    write_turbo_vae(tmp_path / "turbo_vae", seed=5)
    assert sorted(p.name for p in (tmp_path / "turbo_vae").iterdir()) == [CONFIG_NAME, CHECKPOINT_NAME]
    video = TurboVAE.from_pretrained(tmp_path / "turbo_vae").decode(random_latent(3, 4, 4))
    assert 0.2 < float(video.std()) < 0.6
    assert float((video.abs() > 1).float().mean()) < 0.05


def test_written_weights_come_back_exactly(tmp_path: Path) -> None:
    config = dict(TINY_CONFIG) | {
        "decoder_block_out_channels": [3, 4, 5, 6],
        "first_chunk_size": 2,
        "step_size": 3,
    }
    write_turbo_vae(tmp_path, config=config, seed=1)
    file = torch.load(tmp_path / CHECKPOINT_NAME, weights_only=True)["ema_state_dict"]
    assert all(key.startswith("module.") for key in file)
    assert "module.aligned_feature_projection_heads.0.weight" in file
    model = TurboVAE.from_pretrained(tmp_path)
    assert model.config == TurboVAEConfig.from_dict(config)
    for key in model.config.state_dict_shapes():
        assert torch.equal(model.weights[key.removeprefix("decoder.")], file[f"module.{key}"])
    half = TurboVAE.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert {w.dtype for w in half.weights.values()} == {torch.bfloat16}


def test_writer_follows_its_seed(tmp_path: Path) -> None:
    latent = random_latent(1, 1, 1)
    videos = []
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        write_turbo_vae(tmp_path / name, seed=seed)
        videos.append(TurboVAE.from_pretrained(tmp_path / name).decode(latent))
    assert torch.equal(videos[0], videos[1])
    assert not torch.equal(videos[0], videos[2])


def test_writer_refuses_what_it_cannot_write(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="decoder_causal"):
        write_turbo_vae(tmp_path / "a", config=dict(TINY_CONFIG) | {"decoder_causal": True})
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="file"):
        write_turbo_vae(tmp_path / "file")
    assert [p.name for p in tmp_path.iterdir()] == ["file"]
    (tmp_path / "b" / CHECKPOINT_NAME).mkdir(parents=True)
    with pytest.raises(OutputError, match="cannot write the Turbo VAE"):
        write_turbo_vae(tmp_path / "b")
    assert sorted(p.name for p in (tmp_path / "b").iterdir()) == [CONFIG_NAME, CHECKPOINT_NAME]


@pytest.mark.parametrize("name", [CONFIG_NAME, CHECKPOINT_NAME])
def test_missing_files_are_named(tmp_path: Path, name: str) -> None:
    write_turbo_vae(tmp_path)
    (tmp_path / name).unlink()
    with pytest.raises(CheckpointError, match=f"{name}: no such file"):
        TurboVAE.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("content", "match"),
    [
        (b"{", "expected JSON: "),
        (b"\xff\xfe\x00", "expected JSON: "),
        (b"[" * 200_000, "expected JSON: "),
        (b"[1]", "expected a JSON object, got list"),
        (b"{}", "missing fields"),
    ],
)
def test_bad_config_files_are_named(tmp_path: Path, content: bytes, match: str) -> None:
    write_turbo_vae(tmp_path)
    (tmp_path / CONFIG_NAME).write_bytes(content)
    with pytest.raises(CheckpointError, match=f"{CONFIG_NAME}: .*{match}"):
        TurboVAE.from_pretrained(tmp_path)


class Hostile:
    """Unpickling this makes a folder: a harmless stand-in for any command."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.mkdir, (str(self.path),)


def test_a_pickle_with_code_is_refused_and_not_run(tmp_path: Path) -> None:
    write_turbo_vae(tmp_path)
    checkpoint = tmp_path / CHECKPOINT_NAME
    torch.save({"ema_state_dict": tiny_state_dict(), "extra": Hostile(tmp_path / "ran")}, checkpoint)
    with pytest.raises(CheckpointError, match=f"{CHECKPOINT_NAME}: .*code in it"):
        TurboVAE.from_pretrained(tmp_path)
    assert not (tmp_path / "ran").exists()
    torch.load(checkpoint, weights_only=False)
    assert (tmp_path / "ran").exists()  # so the file would have run


def test_damaged_checkpoints_are_named(tmp_path: Path) -> None:
    write_turbo_vae(tmp_path)
    checkpoint = tmp_path / CHECKPOINT_NAME
    whole = checkpoint.read_bytes()
    found = {
        b"": "an empty file",
        b"hello": "text",
        whole[: len(whole) // 2]: "cut short",
        b"\x80": "damaged",
    }
    for content, message in found.items():
        checkpoint.write_bytes(content)
        with pytest.raises(CheckpointError, match=f"{CHECKPOINT_NAME}: .*{message}"):
            TurboVAE.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("content", "match"),
    [
        ({"state_dict": {}, "step": 3}, r"under 'ema_state_dict', got \['state_dict', 'step'\]"),
        ({"ema_state_dict": [1]}, r"under 'ema_state_dict', got \['ema_state_dict'\]"),
        ([1, 2], "under 'ema_state_dict', got list"),
        ({"ema_state_dict": {"encoder.x": 1}}, "decoder.conv_in.conv.weight is missing"),
    ],
)
def test_checkpoints_without_a_decoder_are_named(tmp_path: Path, content: Any, match: str) -> None:
    write_turbo_vae(tmp_path)
    torch.save(content, tmp_path / CHECKPOINT_NAME)
    with pytest.raises(CheckpointError, match=f"{CHECKPOINT_NAME}: .*{match}"):
        TurboVAE.from_pretrained(tmp_path)
