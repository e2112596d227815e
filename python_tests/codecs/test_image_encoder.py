"""Reference image: preprocessing and the Wan 2.2 encoder, against golden vectors and against diffusers itself."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from cases import GOLDEN, draw_weights, load_golden
from magihuman_fast.checkpoints.synthetic.image_vae import wan_vae_shapes, write_image_vae
from magihuman_fast.codecs.image_encoder import ImageEncoder, preprocess_image
from magihuman_fast.codecs.picture_files import load_image
from magihuman_fast.errors import CheckpointError, InputError, OutputError
from magihuman_fast.model.latent_statistics import LATENT_MEAN, LATENT_STD
from numerics import rel_err

FILE = "Wan2.2_VAE.pth"
SHAPES = {
    name: tuple(shape) for name, shape in json.loads((GOLDEN / "wan_vae/a_keys.json").read_text()).items()
}


@pytest.fixture(scope="module")
def state_dict() -> dict[str, torch.Tensor]:
    return draw_weights(SHAPES, load_golden("wan_vae/a_encode").meta)


@pytest.fixture(scope="module")
def encoder(state_dict: dict[str, torch.Tensor]) -> ImageEncoder:
    return ImageEncoder.from_state_dict(state_dict)


@pytest.fixture(scope="module")
def diffusers_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small autoencoder as diffusers saves it."""
    from diffusers import AutoencoderKLWan

    torch.manual_seed(5)
    model = AutoencoderKLWan(
        base_dim=16,
        decoder_base_dim=8,
        z_dim=48,
        dim_mult=[1, 2, 4, 4],
        temperal_downsample=[False, True, True],
        latents_mean=list(LATENT_MEAN),
        latents_std=list(LATENT_STD),
        is_residual=True,
        in_channels=12,
        out_channels=12,
        patch_size=2,
        scale_factor_spatial=16,
    )
    folder = tmp_path_factory.mktemp("wan") / "vae"
    model.save_pretrained(folder)
    return folder


def image(height: int = 64, width: int = 96) -> torch.Tensor:
    return torch.rand(3, height, width, generator=torch.Generator().manual_seed(3)) * 2 - 1


def test_encode_golden(encoder: ImageEncoder) -> None:
    golden = load_golden("wan_vae/a_encode")
    out = encoder.encode(golden["in.image"][0, :, 0])
    assert out.dtype == torch.float32
    assert not out.requires_grad
    assert rel_err(out, golden.batch0("out.latent")) <= 1e-5


def test_statistics_are_those_of_the_golden_run() -> None:
    golden = load_golden("wan_vae/a_encode")
    torch.testing.assert_close(torch.tensor(LATENT_MEAN), golden["mean"], rtol=0, atol=0)
    torch.testing.assert_close(torch.tensor(LATENT_STD), golden["std"], rtol=0, atol=0)


def test_diffusers_layout_matches_diffusers(diffusers_folder: Path) -> None:
    from diffusers import AutoencoderKLWan

    model = AutoencoderKLWan.from_pretrained(diffusers_folder)
    with torch.no_grad():
        mean = model.encode(image()[None, :, None]).latent_dist.mode()[0]
    statistics = [torch.tensor(values)[:, None, None, None] for values in (LATENT_MEAN, LATENT_STD)]
    for path in (diffusers_folder, diffusers_folder.parent):
        out = ImageEncoder.from_pretrained(path).encode(image())
        assert rel_err(out, (mean - statistics[0]) / statistics[1]) <= 1e-5


def test_published_layout_from_file_and_folder(
    tmp_path: Path, state_dict: dict[str, torch.Tensor], encoder: ImageEncoder
) -> None:
    torch.save(state_dict, tmp_path / FILE)
    expected = encoder.encode(image())
    for path in (tmp_path, str(tmp_path), tmp_path / FILE):
        assert torch.equal(ImageEncoder.from_pretrained(path).encode(image()), expected)


def test_decoder_is_neither_needed_nor_kept(
    state_dict: dict[str, torch.Tensor], encoder: ImageEncoder
) -> None:
    without = {n: t for n, t in state_dict.items() if not n.startswith(("decoder.", "conv2."))}
    assert len(without) < len(state_dict)
    lean = ImageEncoder.from_state_dict(without)
    assert torch.equal(lean.encode(image()), encoder.encode(image()))
    held = [p for part in vars(lean).values() if isinstance(part, torch.nn.Module) for p in part.parameters()]
    assert held
    assert not any(p.is_meta or p.requires_grad for p in held)
    used = [t for n, t in without.items() if "time_conv" not in n]
    assert sum(p.numel() for p in held) == sum(
        t.numel() // (t.shape[2] if t.ndim == 5 else 1) for t in used
    )  # one time tap of each kernel


def test_weights_are_copied(state_dict: dict[str, torch.Tensor]) -> None:
    own = {name: tensor.clone() for name, tensor in state_dict.items()}
    encoder = ImageEncoder.from_state_dict(own)
    before = encoder.encode(image())
    for tensor in own.values():
        tensor.zero_()
    assert torch.equal(encoder.encode(image()), before)


def test_bfloat16_is_near(state_dict: dict[str, torch.Tensor], encoder: ImageEncoder) -> None:
    out = ImageEncoder.from_state_dict(state_dict, dtype=torch.bfloat16).encode(image())
    assert out.dtype == torch.float32
    assert 1e-5 < rel_err(out, encoder.encode(image())) < 3e-2


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda s: s.pop("encoder.middle.1.proj.bias"), "encoder.middle.1.proj.bias"),
        (lambda s: s.pop("encoder.conv1.weight"), "missing keys: encoder.conv1.weight"),
        (lambda s: s.update({"encoder.extra": torch.zeros(1)}), "unexpected keys: encoder.extra"),
        (
            lambda s: s.update({"conv1.bias": torch.zeros(5)}),
            r"wrong shapes: conv1.bias \(expected \[96\], got \[5\]\)",
        ),
        (lambda s: s.update({"conv1.bias": 3}), "'conv1.bias' expected a tensor, got int"),
        (
            lambda s: s.update({"conv1.bias": torch.zeros(96, dtype=torch.int64)}),
            "conv1.bias: expected floating point",
        ),
        (lambda s: s.update({"encoder.conv1.weight": torch.zeros(0, 12, 3, 3, 3)}), "encoder.conv1.weight"),
    ],
)
def test_bad_state_dict(
    state_dict: dict[str, torch.Tensor], change: Callable[[dict[str, Any]], object], named: str
) -> None:
    changed: dict[str, Any] = dict(state_dict)
    change(changed)
    with pytest.raises(CheckpointError, match=named):
        ImageEncoder.from_state_dict(changed)


class _Runs:
    def __reduce__(self) -> tuple[Callable[..., object], tuple[str]]:
        return Path.touch, (Path("ran"),)


def test_bad_files(
    tmp_path: Path, state_dict: dict[str, torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    file = tmp_path / FILE
    with pytest.raises(
        CheckpointError, match=rf"{FILE}.*config.json and diffusion_pytorch_model.safetensors"
    ):
        ImageEncoder.from_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="absent"):
        ImageEncoder.from_pretrained(tmp_path / "absent")

    torch.save(state_dict, file)
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(CheckpointError, match=FILE):
        ImageEncoder.from_pretrained(tmp_path)
    torch.save([1], file)
    with pytest.raises(CheckpointError, match=f"{FILE}: expected a dict of named tensors, got list"):
        ImageEncoder.from_pretrained(file)
    torch.save({0: torch.zeros(1)}, file)
    with pytest.raises(CheckpointError, match=f"{FILE}: expected a dict of named tensors"):
        ImageEncoder.from_pretrained(file)
    for write in (lambda: torch.save({"a": _Runs()}, file), lambda: file.write_bytes(pickle.dumps(_Runs()))):
        write()
        with pytest.raises(CheckpointError, match=FILE):
            ImageEncoder.from_pretrained(file)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("z_dim", 16),
        ("is_residual", False),
        ("patch_size", None),
        ("dim_mult", [1, 2, 4]),
        ("_class_name", "AutoencoderKL"),
    ],
)
def test_other_diffusers_config(tmp_path: Path, diffusers_folder: Path, field: str, value: object) -> None:
    config = json.loads((diffusers_folder / "config.json").read_text())
    config[field] = value
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "diffusion_pytorch_model.safetensors").touch()
    with pytest.raises(CheckpointError, match=rf"config.json: not supported: {field} \(expected .*, got "):
        ImageEncoder.from_pretrained(tmp_path)


def test_bad_diffusers_files(tmp_path: Path, diffusers_folder: Path) -> None:
    weights = tmp_path / "diffusion_pytorch_model.safetensors"
    config = tmp_path / "config.json"
    whole = (diffusers_folder / weights.name).read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])
    config.write_text((diffusers_folder / "config.json").read_text())
    with pytest.raises(CheckpointError, match=weights.name):
        ImageEncoder.from_pretrained(tmp_path)
    for text in ("{", "[]", "null"):
        config.write_text(text)
        with pytest.raises(CheckpointError, match=config.name):
            ImageEncoder.from_pretrained(tmp_path)
    config.unlink()
    with pytest.raises(CheckpointError, match=config.name):
        ImageEncoder.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("pixels", "named"),
    [
        (torch.zeros(1, 3, 64, 64), r"\(1, 3, 64, 64\)"),
        (torch.zeros(4, 64, 64), r"\(4, 64, 64\)"),
        (torch.zeros(3, 64, 72), r"multiples of 16, got \(3, 64, 72\)"),
        (torch.zeros(3, 0, 64), r"\(3, 0, 64\)"),
        (torch.zeros(3, 64, 64, dtype=torch.uint8), "torch.uint8"),
        (np.zeros((3, 64, 64), np.float32), "float32"),
        ("picture", "str"),
        (torch.full((3, 64, 64), 255.0), "got 255.0 to 255.0"),
        (torch.zeros(3, 64, 64).index_fill(2, torch.tensor([5]), torch.nan), "nan"),
        (torch.zeros(3, 64, 64).index_fill(2, torch.tensor([5]), -torch.inf), "-inf"),
    ],
)
def test_bad_pixels(encoder: ImageEncoder, pixels: Any, named: str) -> None:
    with pytest.raises(InputError, match=named):
        encoder.encode(pixels)


@pytest.mark.parametrize("name", ["tall", "wide"])
def test_preprocess_golden(name: str) -> None:
    golden = load_golden(f"image/{name}")
    source = golden["in.image"].numpy()
    for picture in (source, Image.fromarray(source)):
        out = preprocess_image(picture, int(golden.meta["width"]), int(golden.meta["height"]))
        assert out.dtype == torch.float32
        assert rel_err(out, golden.batch0("out.pixels")) <= 1e-5


def test_preprocess_resizes_as_diffusers_does() -> None:
    from diffusers.video_processor import VideoProcessor

    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (48, 84, 3), np.uint8))
    expected = VideoProcessor(vae_scale_factor=16).preprocess(picture, height=64, width=112)[0]
    assert torch.equal(preprocess_image(picture, 112, 64), expected)


@pytest.mark.parametrize(("width", "left"), [(17, 0), (18, 1), (19, 2), (16, 0)])
def test_crop_offset_rounds_half_to_even(width: int, left: int) -> None:
    columns = np.arange(width, dtype=np.uint8)
    picture = np.broadcast_to(columns[None, :, None], (16, width, 3))
    values = (preprocess_image(picture, 16, 16) + 1) * 127.5
    assert values[0, 0].round().tolist() == list(range(left, left + 16))
    standing = (preprocess_image(picture.transpose(1, 0, 2), 16, 16) + 1) * 127.5
    assert standing[0, :, 0].round().tolist() == list(range(left, left + 16))


@pytest.mark.parametrize(
    "mode", ["L", "LA", "La", "P", "PA", "RGBA", "RGBa", "1", "CMYK", "YCbCr", "I;16", "RGB"]
)
def test_image_modes(mode: str) -> None:
    grey = Image.fromarray(np.repeat(np.array([0, 255], np.uint8), 8)[None].repeat(16, 0))
    if mode == "I;16":
        picture = Image.fromarray(np.asarray(grey).astype(np.uint16) * 257)
    elif mode == "CMYK":
        picture = grey.convert("RGB").convert(mode)
    elif mode in ("La", "RGBa"):
        picture = grey.convert(mode.upper()).convert(mode)
    else:
        picture = grey.convert(mode)
    assert picture.mode == mode
    out = preprocess_image(picture, 16, 16)
    assert torch.equal(out[:, :, :8], torch.full((3, 16, 8), -1.0))
    assert torch.equal(out[:, :, 8:], torch.full((3, 16, 8), 1.0))


def test_transparent_image_is_laid_on_white(caplog: pytest.LogCaptureFixture) -> None:
    """Told once, however often what `load_image` made of it is prepared."""
    picture = Image.new("RGBA", (16, 16), (200, 0, 0, 0))
    assert torch.equal(preprocess_image(picture, 16, 16), torch.ones(3, 16, 16))
    caplog.clear()
    loaded = load_image(picture)
    for _ in range(2):
        assert torch.equal(preprocess_image(loaded, 16, 16), torch.ones(3, 16, 16))
    assert [r.levelname for r in caplog.records] == ["WARNING"]


def test_sixteen_bit_greyscale_is_scaled() -> None:
    picture = Image.fromarray(np.full((16, 16), 0xFF00, np.uint16))
    assert preprocess_image(picture, 16, 16).unique().tolist() == pytest.approx([2 * 254 / 255 - 1])


def test_exif_orientation_is_applied(tmp_path: Path) -> None:
    pixels = np.zeros((16, 16, 3), np.uint8)
    pixels[:8] = 255  # bright above as stored
    picture = Image.fromarray(pixels)
    exif = picture.getexif()
    exif[0x0112] = 3  # turned by 180 degrees
    picture.save(tmp_path / "turned.png", exif=exif)
    with Image.open(tmp_path / "turned.png") as turned:
        out = preprocess_image(turned, 16, 16)
    assert torch.equal(out[:, 8:], torch.ones(3, 8, 16))
    assert torch.equal(out[:, :8], -torch.ones(3, 8, 16))


@pytest.mark.parametrize(
    ("picture", "width", "height", "named"),
    [
        (Image.new("RGB", (64, 64)), 40, 64, "width must be a positive multiple of 16, got 40"),
        (Image.new("RGB", (64, 64)), 64, 0, "height must be a positive multiple of 16, got 0"),
        (Image.new("RGB", (64, 64)), 64.0, 64, "width must be a positive multiple of 16, got 64.0"),
        (Image.new("RGB", (1, 1000)), 1600, 16, "1x1000 is too narrow"),
        (Image.new("RGB", (0, 5)), 16, 16, "0x5"),
        (Image.new("F", (64, 64)), 64, 64, "mode 'F'"),
        (np.zeros((64, 64, 3), np.float32), 64, 64, "float32"),
        (np.zeros((64, 64), np.uint8), 64, 64, r"\(64, 64\)"),
        (np.zeros((64, 64, 4), np.uint8), 64, 64, r"\(64, 64, 4\)"),
        (np.zeros((0, 64, 3), np.uint8), 64, 64, r"\(0, 64, 3\)"),
        ("picture.png", 64, 64, "str"),
    ],
)
def test_bad_images(picture: Any, width: Any, height: Any, named: str) -> None:
    with pytest.raises(InputError, match=named):
        preprocess_image(picture, width, height)


def test_truncated_image_file(tmp_path: Path) -> None:
    path = tmp_path / "cut.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)).save(path)
    path.write_bytes(path.read_bytes()[:4000])
    with Image.open(path) as picture, pytest.raises(InputError, match="cannot be read"):
        preprocess_image(picture, 64, 64)


def test_synthetic_names_and_shapes() -> None:
    assert wan_vae_shapes(16, 8) == SHAPES
    full = wan_vae_shapes()
    assert full["encoder.conv1.weight"] == (160, 12, 3, 3, 3)
    assert full["decoder.conv1.weight"] == (1024, 48, 3, 3, 3)
    assert full.keys() == SHAPES.keys()


def test_synthetic_encodes_to_unit_latents(tmp_path: Path) -> None:
    write_image_vae(tmp_path / "a", seed=1)
    write_image_vae(tmp_path / "b", seed=1)
    write_image_vae(tmp_path / "c", seed=2)
    out = {name: ImageEncoder.from_pretrained(tmp_path / name).encode(image()) for name in "abc"}
    assert torch.equal(out["a"], out["b"])
    assert rel_err(out["c"], out["a"]) > 0.5
    for latent in out.values():
        assert abs(float(latent.mean())) < 0.3
        assert 0.5 < float(latent.std()) < 1.5
    assert [path.name for path in (tmp_path / "a").iterdir()] == [FILE]


def test_synthetic_names_the_folder_it_cannot_write(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match="file"):
        write_image_vae(tmp_path / "file" / "vae")


@pytest.mark.parametrize(
    ("tensor", "message"),
    [
        (torch.zeros(1).expand(16, 12, 3, 3, 3), "expected a value for each element"),
        (torch.zeros(16, 12, 3, 3, 3, device="meta"), "expected a dense tensor, got no data"),
        (torch.full((16, 12, 3, 3, 3), float("nan")), "expected finite values"),
    ],
)
def test_tensors_that_are_not_weights(tmp_path: Path, tensor: torch.Tensor, message: str) -> None:
    write_image_vae(tmp_path)
    state_dict = torch.load(tmp_path / FILE, weights_only=True)
    state_dict["encoder.conv1.weight"] = tensor
    with pytest.raises(CheckpointError, match=message):
        ImageEncoder.from_state_dict(state_dict)
