"""A diffusion transformer with random weights in the published folder layout."""

from __future__ import annotations

import json
import math
import shutil
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from tempfile import TemporaryFile

import torch

from ...guards.file_paths import atomic_output
from ...model.config import DiTConfig, is_layer_linear
from ...model.dit import rope_bands
from .files import save_tensors


def random_dit_tensors(
    config: DiTConfig, seed: int = 0, linear_dtype: torch.dtype = torch.float32
) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield (name, tensor) of every published key, in file order; each depends on `seed` and its name alone."""
    for name, shape in config.state_dict_shapes().items():
        if name.endswith("rope.bands"):
            yield name, rope_bands(config)
            continue
        generator = torch.Generator().manual_seed(zlib.crc32(f"{seed}:{name}".encode()))
        if "norm" in name:
            scale = 0.1  # norm weights are offsets from 1
        elif name.endswith(".bias"):
            scale = 0.02
        else:
            scale = 1 / math.sqrt(shape[1])
        tensor = torch.randn(shape, generator=generator).mul_(scale)
        yield name, tensor.to(linear_dtype if is_layer_linear(name) else torch.float32)


def write_dit(
    folder: Path,
    config: DiTConfig,
    *,
    seed: int = 0,
    shards: int = 13,
    linear_dtype: torch.dtype = torch.float32,
    compress: bool = False,
    on_file: Callable[[str, int, int], object] | None = None,
) -> None:
    """Write an index and `shards` safetensors files, one shard in memory at a time.

    The published base model has 7 shards with bfloat16 layer linears, the others 13 in float32. `compress` writes
    `.safetensors.zst`. `on_file` is called as (file name, files done, files).
    """
    folder.mkdir(parents=True, exist_ok=True)

    def nbytes(name: str, shape: tuple[int, ...]) -> int:
        return math.prod(shape) * (linear_dtype.itemsize if is_layer_linear(name) else 4)

    total = sum(nbytes(name, shape) for name, shape in config.state_dict_shapes().items())
    weight_map: dict[str, str] = {}
    shard: dict[str, torch.Tensor] = {}
    written = done = 0

    def flush() -> None:
        nonlocal done
        done += 1
        file = f"model-{done:05d}-of-{shards:05d}.safetensors"
        if compress:
            file += ".zst"
        with atomic_output(folder / file) as temporary:
            save_tensors(shard, temporary)
            if compress:
                _compress(temporary)
        weight_map.update(dict.fromkeys(shard, file.removesuffix(".zst")))
        shard.clear()
        if on_file is not None:
            on_file(file, done, shards)

    for name, tensor in random_dit_tensors(config, seed, linear_dtype):
        shard[name] = tensor
        written += tensor.nbytes
        if written >= total * (done + 1) / shards and done + 1 < shards:
            flush()
    flush()
    while done < shards:  # fewer tensors than shards
        flush()
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    with atomic_output(folder / "model.safetensors.index.json") as temporary:
        temporary.write_text(json.dumps(index, indent=2), encoding="utf-8")


def _compress(file: Path) -> None:
    """Replace what `file` holds by its zstd-compressed form."""
    import zstandard

    with TemporaryFile(dir=file.parent) as plain:
        with file.open("rb") as source:
            shutil.copyfileobj(source, plain)
        plain.seek(0)
        with file.open("wb") as target:
            zstandard.ZstdCompressor(level=1).copy_stream(plain, target)
