"""Audio autoencoder against golden vectors, against diffusers itself, and on files that are not right."""

from __future__ import annotations

import copy
import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn.functional import pad

from cases import GOLDEN, draw_weights, load_golden
from magihuman_fast.checkpoints.synthetic.audio_vae import audio_vae_shapes, model_config, write_audio_vae
from magihuman_fast.codecs import audio_vae
from magihuman_fast.codecs.audio_vae import AudioVAE, merge_overlapping
from magihuman_fast.errors import CheckpointError, InputError, OutputError
from numerics import rel_err

PREFIX = "pretransform.model."
KEYS = {
    name: tuple(shape) for name, shape in json.loads((GOLDEN / "audio_vae/a_keys.json").read_text()).items()
}
CONFIG = json.loads((GOLDEN / "audio_vae/a_model_config.json").read_text())
HOP = 2048


@pytest.fixture(scope="module")
def state_dict() -> dict[str, torch.Tensor]:
    """The golden weights under their names without the prefix."""
    shapes = {name.removeprefix(PREFIX): shape for name, shape in KEYS.items()}
    return draw_weights(shapes, load_golden("audio_vae/a_decode").meta)


@pytest.fixture(scope="module")
def vae(state_dict: dict[str, torch.Tensor]) -> AudioVAE:
    return AudioVAE.from_state_dict(CONFIG, state_dict)


@pytest.fixture(scope="module")
def published_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("published")
    write_audio_vae(folder, seed=7)
    return folder


@pytest.fixture(scope="module")
def published(published_folder: Path) -> AudioVAE:
    return AudioVAE.from_pretrained(published_folder)


@pytest.fixture(scope="module")
def diffusers_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small autoencoder as diffusers saves it, with the published latent width."""
    folder = tmp_path_factory.mktemp("diffusers") / "vae"
    diffusers_model().save_pretrained(folder)
    return folder


def diffusers_model() -> Any:
    from diffusers import AutoencoderOobleck

    torch.manual_seed(5)
    model = AutoencoderOobleck(encoder_hidden_size=4, decoder_channels=4)
    # The library ties the latent width to the encoder's.
    wide = torch.nn.utils.weight_norm(torch.nn.Conv1d(64, 128, kernel_size=3, padding=1))
    model.encoder.conv2 = wide
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("alpha", "beta")):
                parameter.normal_(std=0.1)  # zero as built, which would hide a swap
    return model


def noise_like(frames: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(frames, 64, generator=torch.Generator().manual_seed(seed))


def sound(samples: int) -> torch.Tensor:
    return 0.2 * torch.randn(2, samples, generator=torch.Generator().manual_seed(2))


def test_decode_golden(vae: AudioVAE) -> None:
    golden = load_golden("audio_vae/a_decode")
    waveform = vae.decode_waveform(golden["in.latent"])
    assert waveform.dtype == torch.float32
    assert rel_err(waveform, golden.batch0("out.waveform")) <= 1e-5
    out = vae.decode(golden["in.latent"])
    assert out.dtype == torch.float32
    assert rel_err(out, golden["out.resampled"]) <= 1e-5


def test_encode_golden(vae: AudioVAE) -> None:
    golden = load_golden("audio_vae/a_encode")
    waveform = golden.batch0("in.waveform")
    out = vae.encode(waveform, noise=golden.batch0("noise").T)
    assert out.dtype == torch.float32
    assert rel_err(out, golden.batch0("out.latent").T) <= 1e-5
    mean, scale = golden.batch0("out.pre_bottleneck").T.chunk(2, dim=1)
    assert rel_err(vae.encode(waveform, noise=torch.zeros(6, 64)), mean) <= 1e-5
    one = vae.encode(waveform, noise=torch.ones(6, 64))
    assert rel_err(one - mean, torch.nn.functional.softplus(scale) + 1e-4) <= 1e-5


def test_merge_golden() -> None:
    golden = load_golden("audio_vae/a_encode")
    ratio = float(golden.meta["merge.overlap_ratio"])
    for windows in (golden["merge.in"], list(golden["merge.in"])):
        assert rel_err(merge_overlapping(windows, ratio), golden.batch0("merge.out")) <= 1e-5


def test_merge_of_odd_windows() -> None:
    # 5 latents, of which int(2.5) = 2 are shared: the windows start 3 apart.
    out = merge_overlapping([torch.zeros(5, 1), torch.ones(5, 1), torch.full((5, 1), 2.0)], 0.5)
    assert out[:, 0].tolist() == [0, 0, 0, 0, 0.5, 1, 1, 1.5, 2, 2, 2]
    windows = torch.arange(6.0).reshape(3, 2, 1)
    assert merge_overlapping(windows, 0.0)[:, 0].tolist() == [0, 1, 2, 3, 4, 5]
    assert torch.equal(merge_overlapping(windows[:1], 0.5), windows[0])


@pytest.mark.parametrize(
    ("windows", "ratio", "named"),
    [
        ([], 0.5, r"got \[\]"),
        ([torch.zeros(4, 2), torch.zeros(3, 2)], 0.5, r"\(3, 2\)"),
        (torch.zeros(2, 4), 0.5, r"\(4,\)"),
        (torch.zeros(2, 4, 2), 1.0, "got 1.0"),
        (torch.zeros(2, 4, 2), 1.5, "got 1.5"),
        (torch.zeros(2, 4, 2), -0.1, "got -0.1"),
    ],
)
def test_bad_merge(windows: Any, ratio: float, named: str) -> None:
    with pytest.raises(InputError, match=named):
        merge_overlapping(windows, ratio)


def test_rates(vae: AudioVAE) -> None:
    assert (vae.sample_rate, vae.input_rate, vae.samples_per_latent, vae.latent_channels) == (
        44100,
        51200,
        2048,
        64,
    )
    assert audio_vae.WINDOW_SAMPLES == 29 * 51200
    assert vae.decode(noise_like(3)).shape == (3 * 1764, 2)
    assert vae.encode(sound(4 * HOP + 2047)).shape == (4, 64)


def test_noise_is_drawn_channel_major_from_the_generator(vae: AudioVAE) -> None:
    waveform = sound(5 * HOP)
    drawn = torch.randn(1, 64, 5, generator=torch.Generator().manual_seed(9))
    out = vae.encode(waveform, generator=torch.Generator().manual_seed(9))
    assert torch.equal(out, vae.encode(waveform, noise=drawn[0].T))
    assert not torch.equal(out, vae.encode(waveform, generator=torch.Generator().manual_seed(8)))


def test_long_sound_is_encoded_in_windows(vae: AudioVAE, monkeypatch: pytest.MonkeyPatch) -> None:
    window, step = 8 * HOP, 4 * HOP
    waveform = sound(17 * HOP + 100)
    padded = pad(waveform, (0, 20 * HOP - waveform.shape[1]))
    noise = noise_like(4 * 8).reshape(4, 8, 64)
    pieces = [vae.encode(padded[:, i * step : i * step + window], noise=noise[i]) for i in range(4)]
    seen: list[int] = []
    hook = vae._encoder.register_forward_pre_hook(lambda _, args: seen.append(args[0].shape[-1]))
    monkeypatch.setattr(audio_vae, "WINDOW_SAMPLES", window)
    try:
        out = vae.encode(waveform, noise=noise)
    finally:
        hook.remove()
    assert seen == [window] * 4
    assert out.shape == (18, 64)
    assert torch.equal(out, merge_overlapping(pieces, 0.5)[:18])
    assert vae.encode(sound(window)).shape == (8, 64)
    assert vae.encode(sound(window + 1)).shape == (9, 64)
    with pytest.raises(InputError, match=r"noise must be \(4, 8, 64\) .* got \(8, 64\)"):
        vae.encode(waveform, noise=noise[0])


def test_decode_windows_do_not_show(vae: AudioVAE, monkeypatch: pytest.MonkeyPatch) -> None:
    latent = noise_like(40)
    whole = vae.decode_waveform(latent)
    seen: list[int] = []
    hook = vae._decoder.register_forward_pre_hook(lambda _, args: seen.append(args[0].shape[-1]))
    monkeypatch.setattr(audio_vae, "DECODE_WINDOW", 16)
    try:
        out = vae.decode_waveform(latent)
    finally:
        hook.remove()
    assert rel_err(out, whole) <= 3e-6
    assert len(seen) == 3
    assert max(seen) <= 16 + 2 * 11


def test_prefix_and_other_keys(state_dict: dict[str, torch.Tensor], vae: AudioVAE) -> None:
    published = {f"{PREFIX}{name}": tensor for name, tensor in state_dict.items()}
    assert published.keys() == KEYS.keys()
    published["model.model.transformer.weight"] = torch.zeros(3)
    out = AudioVAE.from_state_dict(CONFIG, published).decode(noise_like(2))
    assert torch.equal(out, vae.decode(noise_like(2)))


def test_two_of_one_configuration_share_nothing(state_dict: dict[str, torch.Tensor], vae: AudioVAE) -> None:
    """Although their layers are laid out once."""
    other = AudioVAE.from_state_dict(CONFIG, {name: w * 0.5 for name, w in state_dict.items()})
    again = AudioVAE.from_state_dict(CONFIG, state_dict)
    assert torch.equal(again.decode(noise_like(2)), vae.decode(noise_like(2)))
    assert not torch.equal(other.decode(noise_like(2)), vae.decode(noise_like(2)))


def test_no_warning_reaches_the_caller(state_dict: dict[str, torch.Tensor]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        AudioVAE.from_state_dict(CONFIG, state_dict)


def test_half_precision_is_near(state_dict: dict[str, torch.Tensor], vae: AudioVAE) -> None:
    out = AudioVAE.from_state_dict(CONFIG, state_dict, dtype=torch.bfloat16).decode_waveform(noise_like(4))
    assert out.dtype == torch.float32
    assert 1e-5 < rel_err(out, vae.decode_waveform(noise_like(4))) < 0.1


def test_diffusers_layout_matches_diffusers(diffusers_folder: Path) -> None:
    model = diffusers_model()
    latent, waveform = noise_like(6), sound(6 * HOP)
    with torch.no_grad():
        decoded = model.decode(latent.T[None]).sample[0]
        mean = model.encode(waveform[None]).latent_dist.mean[0].T
    for path in (diffusers_folder, diffusers_folder.parent):
        loaded = AudioVAE.from_pretrained(path)
        assert rel_err(loaded.decode_waveform(latent), decoded) <= 1e-5
        assert rel_err(loaded.encode(waveform, noise=torch.zeros(6, 64)), mean) <= 1e-5


def test_published_layout_from_folder(published_folder: Path, published: AudioVAE) -> None:
    tensors = load_file(published_folder / "model.safetensors")
    assert any(not name.startswith(PREFIX) for name in tensors)
    expected = AudioVAE.from_state_dict(model_config(4), tensors).decode(noise_like(3))
    assert torch.equal(published.decode(noise_like(3)), expected)


def test_layout_is_decided_by_the_files(
    tmp_path: Path, published_folder: Path, published: AudioVAE, diffusers_folder: Path
) -> None:
    latent = noise_like(2)
    expected = published.decode(latent)
    (tmp_path / "vae").symlink_to(diffusers_folder)
    (tmp_path / "model_config.json").symlink_to(published_folder / "model_config.json")
    assert rel_err(AudioVAE.from_pretrained(tmp_path).decode(latent), expected) > 0.1
    (tmp_path / "model.safetensors").symlink_to(published_folder / "model.safetensors")
    assert torch.equal(AudioVAE.from_pretrained(str(tmp_path)).decode(latent), expected)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda s: s.pop("decoder.layers.7.weight_g"), "missing keys: decoder.layers.7.weight_g"),
        (
            lambda s: s.update({"decoder.layers.7.bias": torch.zeros(2)}),
            "unexpected keys: decoder.layers.7.bias",
        ),
        (
            lambda s: s.update({"encoder.layers.6.alpha": torch.zeros(1, 64, 1)}),
            r"expected \[64\], got \[1, 64, 1\]",
        ),
        (lambda s: s.update({"encoder.layers.6.alpha": None}), "expected a tensor, got NoneType"),
        (
            lambda s: s.update({"encoder.layers.6.alpha": torch.zeros(64).int()}),
            "expected floating point, got torch.int32",
        ),
        (lambda s: s.clear(), "missing keys"),
    ],
)
def test_bad_state_dict(
    state_dict: dict[str, torch.Tensor], change: Callable[[dict[str, Any]], object], named: str
) -> None:
    changed: dict[str, Any] = dict(state_dict)
    change(changed)
    with pytest.raises(CheckpointError, match=named):
        AudioVAE.from_state_dict(CONFIG, changed)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("sample_rate", 48000),
        ("audio_channels", 1),
        ("model.pretransform.type", "wavelet"),
        ("model.pretransform.scale", 2.0),
        ("model.pretransform.config.encoder.type", "dac"),
        ("model.pretransform.config.encoder.config.channels", 0),
        ("model.pretransform.config.encoder.config.c_mults", [1, 2, 4, 8]),
        ("model.pretransform.config.encoder.config.strides", [2, 4, 4, 8, 4]),
        ("model.pretransform.config.encoder.config.strides", "24488"),
        ("model.pretransform.config.encoder.config.latent_dim", 64),
        ("model.pretransform.config.decoder.type", "seanet"),
        ("model.pretransform.config.decoder.config.final_tanh", True),
        ("model.pretransform.config.decoder.config.final_tanh", None),
        ("model.pretransform.config.decoder.config.use_snake", False),
        ("model.pretransform.config.decoder.config.use_nearest_upsample", True),
        ("model.pretransform.config.decoder.config.channels", [4]),
        ("model.pretransform.config.decoder.config.strides", [8, 8, 4, 4, 2]),
        ("model.pretransform.config.bottleneck.type", "rvq"),
        ("model.pretransform.config", None),
    ],
)
def test_unsupported_config_is_named(state_dict: dict[str, torch.Tensor], field: str, value: object) -> None:
    config = copy.deepcopy(CONFIG)
    *parents, last = field.split(".")
    inner = config
    for name in parents:
        inner = inner[name]
    inner[last] = value
    with pytest.raises(CheckpointError, match=rf"{field}\b.*expected"):
        AudioVAE.from_state_dict(config, state_dict)


def test_harmless_config_fields(state_dict: dict[str, torch.Tensor], vae: AudioVAE) -> None:
    config = copy.deepcopy(CONFIG)
    config["training"] = {}
    config["model"]["pretransform"]["scale"] = 1
    out = AudioVAE.from_state_dict(config, state_dict).decode(noise_like(2))
    assert torch.equal(out, vae.decode(noise_like(2)))


def test_bad_files(tmp_path: Path, published_folder: Path) -> None:
    with pytest.raises(CheckpointError, match=r"model_config.json and model.safetensors, or config.json"):
        AudioVAE.from_pretrained(tmp_path)
    config, weights = tmp_path / "model_config.json", tmp_path / "model.safetensors"
    config.write_text((published_folder / config.name).read_text())
    with pytest.raises(CheckpointError, match=weights.name):
        AudioVAE.from_pretrained(tmp_path)
    whole = (published_folder / weights.name).read_bytes()
    for broken in (whole[: len(whole) // 2], whole[:4], b"", b"\xff" * 64):
        weights.write_bytes(broken)
        with pytest.raises(CheckpointError, match=weights.name):
            AudioVAE.from_pretrained(tmp_path)
    save_file({"model.model.weight": torch.zeros(1)}, weights)
    with pytest.raises(CheckpointError, match=rf"{weights.name}: missing keys"):
        AudioVAE.from_pretrained(tmp_path)
    for text in ("{", "[]", '{"model": 3}'):
        config.write_text(text)
        with pytest.raises(CheckpointError, match=config.name):
            AudioVAE.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("_class_name", "AutoencoderKL"),
        ("sampling_rate", 16000),
        ("decoder_input_channels", 32),
        ("downsampling_ratios", [2, 4]),
        ("decoder_channels", None),
    ],
)
def test_other_diffusers_config(tmp_path: Path, diffusers_folder: Path, field: str, value: object) -> None:
    config = json.loads((diffusers_folder / "config.json").read_text())
    config[field] = value
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "diffusion_pytorch_model.safetensors").touch()
    with pytest.raises(CheckpointError, match=rf"config.json: .*{field}"):
        AudioVAE.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("latent", "named"),
    [
        (torch.zeros(0, 64), r"\(0, 64\)"),
        (torch.zeros(64, 5), r"\(64, 5\)"),
        (torch.zeros(1, 5, 64), r"\(1, 5, 64\)"),
        (torch.zeros(5, 64).int(), "torch.int32"),
        (np.zeros((5, 64)), "ndarray"),
        (torch.full((5, 64), torch.nan), "finite"),
    ],
)
def test_bad_latents(vae: AudioVAE, latent: Any, named: str) -> None:
    for decode in (vae.decode, vae.decode_waveform):
        with pytest.raises(InputError, match=named):
            decode(latent)


@pytest.mark.parametrize(
    ("waveform", "named"),
    [
        (torch.zeros(2, HOP - 1), r"n >= 2048, got \(2, 2047\)"),
        (torch.zeros(HOP, 2), r"\(2048, 2\)"),
        (torch.zeros(HOP), r"\(2048,\)"),
        (torch.zeros(2, HOP, dtype=torch.int16), "torch.int16"),
        (torch.full((2, HOP), torch.inf), "finite"),
    ],
)
def test_bad_waveforms(vae: AudioVAE, waveform: torch.Tensor, named: str) -> None:
    with pytest.raises(InputError, match=named):
        vae.encode(waveform)


def test_bad_noise(vae: AudioVAE) -> None:
    with pytest.raises(InputError, match=r"noise must be \(2, 64\) for 4096 samples, got \(64, 2\)"):
        vae.encode(sound(2 * HOP), noise=torch.zeros(64, 2))
    with pytest.raises(InputError, match="not both"):
        vae.encode(sound(2 * HOP), noise=torch.zeros(2, 64), generator=torch.Generator())


def test_synthetic_names_shapes_and_config() -> None:
    assert audio_vae_shapes(4) == KEYS
    assert model_config(4) == CONFIG
    full = audio_vae_shapes()
    assert full[f"{PREFIX}encoder.layers.7.weight_v"] == (128, 2048, 3)
    assert full[f"{PREFIX}decoder.layers.1.layers.1.weight_v"] == (2048, 1024, 16)


def test_synthetic_is_audible_and_unclipped(
    tmp_path: Path, published_folder: Path, published: AudioVAE
) -> None:
    write_audio_vae(tmp_path / "same", seed=7)
    for name in ("model.safetensors", "model_config.json"):
        assert (tmp_path / "same" / name).read_bytes() == (published_folder / name).read_bytes()
    heard = published.decode(noise_like(50))
    assert 0.05 < float(heard.square().mean().sqrt()) < 0.2
    assert float(heard.abs().max()) < 1
    power = np.abs(np.fft.rfft(heard[:, 0].numpy())) ** 2
    hertz = np.fft.rfftfreq(len(heard), 1 / 44100)
    assert power[(hertz > 50) & (hertz < 16000)].sum() > 0.5 * power.sum()
    assert 0.3 < float(published.encode(sound(20 * HOP)).std()) < 5
    assert sorted(path.name for path in (tmp_path / "same").iterdir()) == [
        "model.safetensors",
        "model_config.json",
    ]


def test_synthetic_names_the_folder_it_cannot_write(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match="file"):
        write_audio_vae(tmp_path / "file" / "vae")
