"""Reference image → video latent: the encoder half of the Wan 2.2 TI2V-5B autoencoder (MODEL.md section 6).

The network is diffusers' `AutoencoderKLWan`. Only one frame is ever encoded, so the decoder is never given storage,
and every causal convolution is cut to its last time tap: the frames before the first are zeros.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from ..errors import CheckpointError, InputError
from ..guards.download_faults import contents, hints
from ..guards.number_checks import as_integer, value_text
from ..model.config import LATENT_CHANNELS, VAE_STRIDE
from ..model.conv_precision import conv_precision
from ..model.latent_statistics import LATENT_MEAN, LATENT_STD
from ..model.weights import check_state_dict, load_torch_file, open_checkpoint, read_json, shapes_of
from .diffusers_vae import (
    CONFIG_FILE,
    WEIGHTS_FILE,
    check_config,
    copy_weight,
    diffusers_files,
    fill,
    find_diffusers_folder,
)
from .picture_files import to_rgb

if TYPE_CHECKING:
    from PIL.Image import Image

PUBLISHED_FILE = "Wan2.2_VAE.pth"
_PUBLISHED_DIM = 160
_RANGE_SLACK = 1e-3  # a pixel may leave [-1, 1] by rounding
_ARCHITECTURE: dict[str, Any] = {
    "z_dim": LATENT_CHANNELS,
    "dim_mult": [1, 2, 4, 4],
    "num_res_blocks": 2,
    "attn_scales": [],
    "temperal_downsample": [False, True, True],
    "is_residual": True,
    "in_channels": 12,
    "patch_size": 2,
}
# diffusers' names → the published file's, applied in this order.
_RENAMES = tuple(
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (r"(resnets\.\d+)\.norm1\.", r"\1.residual.0."),
        (r"(resnets\.\d+)\.conv1\.", r"\1.residual.2."),
        (r"(resnets\.\d+)\.norm2\.", r"\1.residual.3."),
        (r"(resnets\.\d+)\.conv2\.", r"\1.residual.6."),
        (r"(resnets\.\d+)\.conv_shortcut\.", r"\1.shortcut."),
        (r"^encoder\.down_blocks\.(\d+)\.resnets\.", r"encoder.downsamples.\1.downsamples."),
        (r"^encoder\.down_blocks\.(\d+)\.downsampler\.", r"encoder.downsamples.\1.downsamples.2."),
        (r"^encoder\.mid_block\.resnets\.0\.", "encoder.middle.0."),
        (r"^encoder\.mid_block\.attentions\.0\.", "encoder.middle.1."),
        (r"^encoder\.mid_block\.resnets\.1\.", "encoder.middle.2."),
        (r"^encoder\.norm_out\.", "encoder.head.0."),
        (r"^encoder\.conv_out\.", "encoder.head.2."),
        (r"^encoder\.conv_in\.", "encoder.conv1."),
        (r"^quant_conv\.", "conv1."),
    )
)
_NOT_NEEDED = {"published": ("decoder.", "conv2."), "diffusers": ("decoder.", "post_quant_conv.")}


def _published_name(name: str) -> str:
    for pattern, replacement in _RENAMES:
        name = pattern.sub(replacement, name)
    return name


def preprocess_image(image: Image | np.ndarray, width: int, height: int) -> torch.Tensor:
    """Centre-crop an image to the aspect ratio of `width` x `height`, resize (Lanczos) and scale it.

    MODEL.md section 6. The result is that of diffusers' `VideoProcessor(vae_scale_factor=16).preprocess`.

    Args:
        image: any PIL image, or a uint8 array (H, W, 3), made upright, opaque sRGB as `load_image` does by default.
        width, height: target size in pixels, multiples of 16.

    Returns:
        float32 (3, height, width) in [-1, 1].

    Raises:
        InputError: not an image, unreadable, too narrow for the aspect ratio, or a bad size.
    """
    from PIL.Image import Resampling

    sides = []
    for name, value in (("width", width), ("height", height)):
        side = as_integer(value)
        if side is None or side < 1 or side % VAE_STRIDE:
            raise InputError(
                f"image {name} must be a positive multiple of {VAE_STRIDE}, got {value_text(value)}"
            )
        sides.append(side)
    width, height = sides
    upright = to_rgb(image)
    w, h = upright.size
    # Cross-multiplied as integers: no rounding decides which side is cut.
    new_w, new_h = (w, w * height // width) if h * width > w * height else (h * width // height, h)
    left, top, right, bottom = (round(edge / 2) for edge in (w - new_w, h - new_h, w + new_w, h + new_h))
    if left == right or top == bottom:
        raise InputError(
            f"image of {w}x{h} is too narrow to be cropped to the aspect ratio of {width}x{height}"
        )
    resized = upright.crop((left, top, right, bottom)).resize((width, height), Resampling.LANCZOS)
    pixels = torch.from_numpy(np.array(resized, dtype=np.float32)).permute(2, 0, 1)
    return (2.0 * (pixels / 255.0) - 1.0).contiguous()


class ImageEncoder:
    """Image → normalised video latent of one frame. Holds the encoder only; made by `from_pretrained`."""

    def __init__(
        self,
        encoder: nn.Module,
        quant_conv: nn.Module,
        device: torch.device,
        dtype: torch.dtype,
        allow_tf32: bool,
    ) -> None:
        self.device = device
        self.dtype = dtype
        self.allow_tf32 = allow_tf32
        self._encoder = encoder
        self._quant_conv = quant_conv
        self._mean, self._std = (
            torch.tensor(values, device=device)[:, None, None, None] for values in (LATENT_MEAN, LATENT_STD)
        )

    @classmethod
    def from_pretrained(
        cls,
        path: Path | str,
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        allow_tf32: bool = False,
    ) -> ImageEncoder:
        """Load `Wan2.2_VAE.pth` (the file or a folder with it) or a diffusers folder (itself or its `vae/`).

        Raises:
            CheckpointError: none of these there, unreadable, or of another configuration, with other keys or shapes.
        """
        path = Path(path)
        file = path if path.is_file() else path / PUBLISHED_FILE
        if file.is_file():
            content = load_torch_file(file)
            if not isinstance(content, dict) or not all(isinstance(name, str) for name in content):
                raise CheckpointError(
                    f"{file}: expected a dict of named tensors, got {type(content).__name__}"
                )
            return cls._load(content, "published", file, device, dtype, allow_tf32)
        folder = find_diffusers_folder(path)
        if folder is None:
            raise CheckpointError(
                f"{path}: no image encoder: expected {PUBLISHED_FILE}, "
                f"or {CONFIG_FILE} and {WEIGHTS_FILE} here or in vae/; found {contents(path)}"
                + hints([file, *diffusers_files(path)])
            )
        config = read_json(folder / CONFIG_FILE)
        check_config(config, {"_class_name": "AutoencoderKLWan"} | _ARCHITECTURE, folder / CONFIG_FILE)
        checkpoint = open_checkpoint(folder / WEIGHTS_FILE)
        needed = [name for name in checkpoint.entries if not name.startswith(_NOT_NEEDED["diffusers"])]
        return cls._load(
            dict(checkpoint.tensors(needed)), "diffusers", folder / WEIGHTS_FILE, device, dtype, allow_tf32
        )

    @classmethod
    def from_state_dict(
        cls,
        state_dict: Mapping[str, torch.Tensor],
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        allow_tf32: bool = False,
    ) -> ImageEncoder:
        """Build from the published file's names; the width is read off the shapes. Decoder keys are ignored.

        On a GPU float32 means float32; `allow_tf32` leaves that to torch's settings, which by default trade exactness
        (about 1e-3) for speed.
        """
        return cls._load(state_dict, "published", "image encoder", device, dtype, allow_tf32)

    @classmethod
    def _load(
        cls,
        state_dict: Mapping[str, torch.Tensor],
        layout: str,
        where: object,
        device: torch.device | str,
        dtype: torch.dtype,
        allow_tf32: bool,
    ) -> ImageEncoder:
        state_dict = {n: t for n, t in state_dict.items() if not n.startswith(_NOT_NEEDED[layout])}
        shapes = shapes_of(state_dict, where)
        rename = _published_name if layout == "published" else str
        stem = shapes.get(rename("encoder.conv_in.weight"), ())
        dim = stem[0] if len(stem) == 5 and 0 < stem[0] <= 4096 else _PUBLISHED_DIM
        parts, expected = _meta_parts(dim)
        check_state_dict(shapes, {rename(n): s for n, s in expected.items()}, where)
        for prefix, module in parts.items():
            weights = {}
            for name, parameter in module.state_dict().items():
                tensor = state_dict[rename(prefix + name)]
                used = tensor[:, :, -1:] if parameter.ndim == 5 else tensor
                weights[name] = copy_weight(rename(prefix + name), used, device, dtype, where)
            fill(module, weights)
        return cls(parts["encoder."], parts["quant_conv."], torch.device(device), dtype, allow_tf32)

    def encode(self, pixels: torch.Tensor) -> torch.Tensor:
        """Encode one image.

        Args:
            pixels: (3, H, W) in [-1, 1], H and W multiples of 16 (see `preprocess_image`).

        Returns:
            float32 (48, 1, H/16, W/16) on the model's device: the posterior's mean, normalised channel by channel.

        Raises:
            InputError: another shape or dtype, or values that are not finite or out of range.
        """
        if not isinstance(pixels, torch.Tensor) or not pixels.is_floating_point():
            raise InputError(
                f"pixels must be a floating-point tensor, got {getattr(pixels, 'dtype', type(pixels))}"
            )
        if (
            pixels.ndim != 3
            or pixels.shape[0] != 3
            or not pixels.numel()
            or any(n % VAE_STRIDE for n in pixels.shape[1:])
        ):
            raise InputError(
                f"pixels must be (3, H, W) with H and W multiples of {VAE_STRIDE}, got {tuple(pixels.shape)}"
            )
        low, high = (float(v) for v in torch.aminmax(pixels))
        if not (low >= -1 - _RANGE_SLACK and high <= 1 + _RANGE_SLACK):
            raise InputError(f"pixels must be finite and in [-1, 1], got {low} to {high}")
        _, h, w = pixels.shape
        x = pixels.to(self.device, self.dtype).reshape(3, h // 2, 2, w // 2, 2)
        x = x.permute(0, 4, 2, 1, 3).reshape(1, 12, 1, h // 2, w // 2)  # (rgb, column, row of a 2x2 patch)
        with torch.no_grad(), conv_precision(self.device, self.allow_tf32):
            posterior = self._quant_conv(self._encoder(x))
        return (posterior[0, :LATENT_CHANNELS].float() - self._mean) / self._std


def _meta_parts(dim: int) -> tuple[dict[str, nn.Module], dict[str, tuple[int, ...]]]:
    """The two modules an encode needs, without storage, cut to one frame; and every shape before the cut."""
    from diffusers import AutoencoderKLWan

    with torch.device("meta"):
        model = AutoencoderKLWan(base_dim=dim, scale_factor_spatial=VAE_STRIDE, **_ARCHITECTURE)
        needed = ("encoder.", "quant_conv.")
        expected = {n: tuple(t.shape) for n, t in model.state_dict().items() if n.startswith(needed)}
        for parent in [model, *model.encoder.modules()]:
            for name, child in list(parent.named_children()):
                if name == "time_conv":  # downsampling in time starts with the second frame
                    delattr(parent, name)
                elif isinstance(child, nn.Conv3d):
                    setattr(parent, name, _last_tap(child))
    return {"encoder.": model.encoder, "quant_conv.": model.quant_conv}, expected


def _last_tap(conv: nn.Conv3d) -> nn.Conv3d:
    _, kh, kw = conv.kernel_size
    return nn.Conv3d(conv.in_channels, conv.out_channels, (1, kh, kw), padding=(0, kh // 2, kw // 2))
