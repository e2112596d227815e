"""Reading checkpoints: every layout, and every way a file can be wrong."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from cases import GOLDEN
from magihuman_fast.checkpoints.synthetic import files, random_dit_tensors, write_dit
from magihuman_fast.errors import CheckpointError, OutputError
from magihuman_fast.model.config import DiTConfig, is_layer_linear
from magihuman_fast.model.dit import DiT, infer_config, load_dit
from magihuman_fast.model.weights import Checkpoint, TensorEntry, load_torch_file, open_checkpoint, read_json

CONFIG = DiTConfig(
    num_layers=5, hidden_size=128, num_query_groups=1, text_in_channels=8, mm_layers=(0, 4), gelu7_layers=(0,)
)
INDEX = "model.safetensors.index.json"


def published_shapes() -> dict[str, dict]:
    return json.loads((GOLDEN / "official" / "dit_state_dict.json").read_text())


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_dit(tmp_path / "dit", CONFIG, shards=4)
    return tmp_path / "dit"


def test_published_keys_and_shapes() -> None:
    published = published_shapes()
    assert len(published) == 331
    assert {k: tuple(v["shape"]) for k, v in published.items()} == DiTConfig().state_dict_shapes()
    for name, info in published.items():
        assert (info["dtype"] == "bfloat16") == is_layer_linear(name)


def test_full_size_model_on_the_meta_device() -> None:
    tensors = {
        name: torch.empty(info["shape"], dtype=getattr(torch, info["dtype"]), device="meta")
        for name, info in published_shapes().items()
    }
    dit = DiT.from_state_dict(DiTConfig(), tensors, device="meta")
    assert dit.layers[0].qkvg.shape == (3, 7208, 5120)
    assert dit.layers[4].up_gate.shape == (1, 27304, 5120)
    assert dit.layers[39].down.shape == (3, 5120, 13652)


@pytest.mark.parametrize("name", sorted(published_shapes()))
def test_each_published_key_is_needed_at_its_shape(name: str) -> None:
    shapes = {key: tuple(info["shape"]) for key, info in published_shapes().items()}
    tensors = {key: torch.empty(shape, device="meta") for key, shape in shapes.items() if key != name}
    with pytest.raises(CheckpointError, match=f"missing keys: {re.escape(name)}$"):
        DiT.from_state_dict(DiTConfig(), tensors, device="meta")
    tensors[name] = torch.empty((*shapes[name][:-1], shapes[name][-1] + 1), device="meta")
    with pytest.raises(CheckpointError, match=f"wrong shapes: {re.escape(name)} "):
        DiT.from_state_dict(DiTConfig(), tensors, device="meta")


def variants(folder: Path, target: Path) -> dict[str, Path]:
    """The same tensors in every accepted layout."""
    tensors = {k: v for file in sorted(folder.glob("*.safetensors")) for k, v in load_file(file).items()}
    single = target / "single"
    single.mkdir()
    save_file(tensors, single / "model.safetensors")
    write_dit(target / "zst", CONFIG, shards=4, compress=True)
    mixed = target / "mixed"
    shutil.copytree(folder, mixed)
    first = sorted(mixed.glob("*.safetensors"))[0]
    shutil.copy(target / "zst" / f"{first.name}.zst", mixed)
    first.unlink()
    named = target / "named"  # an index that names the compressed files themselves
    shutil.copytree(target / "zst", named)
    (named / INDEX).write_text((named / INDEX).read_text().replace(".safetensors", ".safetensors.zst"))
    return {
        "shards": folder,
        "single": single,
        "file": single / "model.safetensors",
        "zst": target / "zst",
        "mixed": mixed,
        "named": named,
    }


def test_every_layout_loads_the_same(folder: Path, tmp_path: Path) -> None:
    expected = dict(random_dit_tensors(CONFIG))
    for layout, path in variants(folder, tmp_path).items():
        found = dict(open_checkpoint(path).tensors())
        assert found.keys() == expected.keys(), layout
        for name, tensor in expected.items():
            assert torch.equal(found[name], tensor), (layout, name)


def test_model_runs_in_the_stored_dtype(tmp_path: Path) -> None:
    for stored in (torch.float32, torch.bfloat16):
        write_dit(tmp_path / str(stored), CONFIG, linear_dtype=stored)
        dit = load_dit(tmp_path / str(stored))
        assert dit.dtype == torch.bfloat16
        assert dit.layers[0].attn_norm.dtype == dit.adapter["text"][0].dtype == torch.float32
        assert dit.config.mm_layers == CONFIG.mm_layers
        assert dit.config.gelu7_layers == CONFIG.gelu7_layers
        assert dit.config.num_kv_heads == CONFIG.num_kv_heads


def test_published_windowed_layers(tmp_path: Path) -> None:
    shapes = {k: tuple(v["shape"]) for k, v in published_shapes().items()}
    entries = {k: TensorEntry(tmp_path, s, torch.float32) for k, s in shapes.items()}
    config = infer_config(Checkpoint(tmp_path, entries))
    full = {3, 7, 11, 15, 19, 23, 27, 31}
    assert set(config.local_attn_layers) == set(range(40)) - full
    assert config == DiTConfig(local_attn_layers=config.local_attn_layers)


def edit_index(folder: Path, **changes: str | None) -> None:
    index = json.loads((folder / INDEX).read_text())
    for name, shard in changes.items():
        key = name.replace("__", ".")
        if shard is None:
            del index["weight_map"][key]
        else:
            index["weight_map"][key] = shard
    (folder / INDEX).write_text(json.dumps(index))


def replace_tensor(folder: Path, name: str, tensor: torch.Tensor | None, rename: str | None = None) -> None:
    """Rewrite one shard with a tensor changed, dropped or renamed, the index following."""
    index = json.loads((folder / INDEX).read_text())
    file = folder / index["weight_map"][name]
    tensors = load_file(file)
    old = tensors.pop(name)
    shard = index["weight_map"].pop(name)
    if tensor is not None or rename is not None:
        tensors[rename or name] = old if tensor is None else tensor
        index["weight_map"][rename or name] = shard
    save_file(tensors, file)
    (folder / INDEX).write_text(json.dumps(index))


UP = "block.layers.1.mlp.up_gate_proj.weight"


def test_missing_folder_and_empty_folder(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"expected model.safetensors.index.json .*no folder"):
        open_checkpoint(tmp_path / "absent")
    with pytest.raises(CheckpointError, match=r"an empty folder"):
        open_checkpoint(tmp_path)


def test_missing_shard(folder: Path) -> None:
    (folder / "model-00002-of-00004.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"missing shards model-00002-of-00004.safetensors"):
        open_checkpoint(folder)


@pytest.mark.parametrize("keep", [0, 5, 200, -1])
def test_truncated_shard(folder: Path, keep: int) -> None:
    file = folder / "model-00002-of-00004.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(
        CheckpointError, match=r"model-00002-of-00004.safetensors: expected a safetensors file"
    ):
        open_checkpoint(folder)


@pytest.mark.parametrize("keep", [0, 5, 40])
def test_truncated_compressed_header(tmp_path: Path, keep: int) -> None:
    write_dit(tmp_path, CONFIG, shards=2, compress=True)
    file = tmp_path / "model-00001-of-00002.safetensors.zst"
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(
        CheckpointError, match=r"model-00001-of-00002.safetensors.zst: (truncated|expected a zstd)"
    ):
        open_checkpoint(tmp_path)


def test_truncated_compressed_data(tmp_path: Path) -> None:
    write_dit(tmp_path, CONFIG, shards=2, compress=True)
    file = tmp_path / "model-00001-of-00002.safetensors.zst"
    file.write_bytes(file.read_bytes()[:-1000])
    with pytest.raises(
        CheckpointError, match=r"model-00001-of-00002.safetensors.zst: (truncated|expected a zstd)"
    ):
        load_dit(tmp_path)


@pytest.mark.parametrize(
    "header",
    [
        b"[]",
        b"{",
        b'{"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}',
        b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}}',
        b'{"a": {"dtype": "X9", "shape": [1], "data_offsets": [0, 4]}}',
        b'{"a": {"dtype": "F32", "shape": [-1], "data_offsets": [0, -4]}}',
        b'{"a": 3}',
    ],
)
def test_lying_compressed_header(tmp_path: Path, header: bytes) -> None:
    import zstandard

    data = len(header).to_bytes(8, "little") + header + bytes(8)
    (tmp_path / "model.safetensors.zst").write_bytes(zstandard.compress(data))
    with pytest.raises(CheckpointError, match=r"model.safetensors.zst"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize("name", ["../other.safetensors", "/etc/passwd", "a/b.safetensors", "..", "", "x\\y"])
def test_index_outside_its_folder(folder: Path, name: str) -> None:
    edit_index(folder, **{UP.replace(".", "__"): name})
    with pytest.raises(CheckpointError, match=r"is outside the folder"):
        open_checkpoint(folder)


@pytest.mark.parametrize("text", ["", "{", "[]", '{"weight_map": 3}', '{"weight_map": {"a": 7}}', "\udcff"])
def test_bad_index(folder: Path, text: str) -> None:
    (folder / INDEX).write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(CheckpointError, match=INDEX):
        open_checkpoint(folder)


def test_index_disagrees_with_a_shard(folder: Path) -> None:
    edit_index(folder, **{UP.replace(".", "__"): None})
    with pytest.raises(CheckpointError, match=rf"disagrees with {INDEX}.*unexpected \['{UP}'\]"):
        open_checkpoint(folder)


def test_wrong_shape(folder: Path) -> None:
    # Of a layer whose sizes the others do not take theirs from.
    name = "block.layers.2.attention.linear_proj.weight"
    replace_tensor(folder, name, torch.zeros(128, 127))
    with pytest.raises(
        CheckpointError, match=rf"wrong shapes: {name} \(expected \[128, 128\], got \[128, 127\]\)"
    ):
        load_dit(folder)


def test_unexpected_and_missing_key(folder: Path) -> None:
    replace_tensor(folder, "final_linear_audio.weight", None, rename="final_linear_sound.weight")
    with pytest.raises(
        CheckpointError,
        match=r"missing keys: final_linear_audio.weight; unexpected keys: final_linear_sound.weight",
    ):
        load_dit(folder)


def test_not_a_dit(tmp_path: Path) -> None:
    save_file({"other.weight": torch.zeros(2)}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"not a MagiHuman DiT: no 'final_norm_video.weight'"):
        load_dit(tmp_path)


def test_wrong_rotary_bands(folder: Path) -> None:
    replace_tensor(folder, "adapter.rope.bands", torch.ones(16))
    with pytest.raises(CheckpointError, match=r"rope.bands expected"):
        load_dit(folder)


def test_integer_weights(folder: Path) -> None:
    replace_tensor(folder, "final_norm_audio.weight", torch.ones(128, dtype=torch.int32))
    with pytest.raises(CheckpointError, match=r"final_norm_audio.weight expected a floating-point dtype"):
        load_dit(folder)


class Exploit:
    def __reduce__(self) -> tuple:
        return (print, ("code ran",))


def test_pickle_with_code_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save({"weights": Exploit()}, tmp_path / "evil.ckpt")
    with pytest.raises(CheckpointError, match=r"evil.ckpt: expected a torch file with nothing but weights"):
        load_torch_file(tmp_path / "evil.ckpt")
    assert "code ran" not in capsys.readouterr().out


@pytest.mark.parametrize("data", [b"", b"not a file of tensors", b"PK\x03\x04"])
def test_damaged_torch_file(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "bad.ckpt").write_bytes(data)
    with pytest.raises(CheckpointError, match=r"bad.ckpt"):
        load_torch_file(tmp_path / "bad.ckpt")


def test_missing_file_lists_the_folder(tmp_path: Path) -> None:
    (tmp_path / "other.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"config.json: expected a file, found only: other.json"):
        read_json(tmp_path / "config.json")


@pytest.mark.parametrize("text", ["1" * 5000, '{"a": ' * 100_000])
def test_json_beyond_the_parser(tmp_path: Path, text: str) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"config.json: expected JSON"):
        read_json(tmp_path / "config.json")


def test_shard_name_beyond_the_file_system(folder: Path) -> None:
    edit_index(folder, **{UP.replace(".", "__"): "x" * 300})
    with pytest.raises(CheckpointError, match=r"has a name that is too long"):
        open_checkpoint(folder)


def compressed(header: bytes, data: bytes) -> bytes:
    import zstandard

    return zstandard.compress(len(header).to_bytes(8, "little") + header + data)


def test_lengths_of_a_compressed_header(tmp_path: Path) -> None:
    import zstandard

    file = tmp_path / "model.safetensors.zst"
    file.write_bytes(compressed(b"{}", b""))  # the shortest there is
    assert dict(open_checkpoint(file).tensors()) == {}
    for length in (0, 1, 100_000_001, 2**64 - 1):
        file.write_bytes(zstandard.compress(length.to_bytes(8, "little") + b"{}"))
        with pytest.raises(CheckpointError, match=f"header of {length} bytes, expected 2 to 100000000"):
            open_checkpoint(file)


def test_compressed_tensor_beyond_memory(tmp_path: Path) -> None:
    count = 10**15
    header = f'{{"a": {{"dtype": "F32", "shape": [{count}], "data_offsets": [0, {4 * count}]}}}}'.encode()
    (tmp_path / "model.safetensors.zst").write_bytes(compressed(header, bytes(8)))
    with pytest.raises(
        CheckpointError, match=r"model.safetensors.zst: a tensor of .* does not fit in memory"
    ):
        list(open_checkpoint(tmp_path).tensors())


def test_data_after_the_last_compressed_tensor(tmp_path: Path) -> None:
    header = b'{"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}'
    file = tmp_path / "model.safetensors.zst"
    file.write_bytes(compressed(header, bytes(8)))
    assert [name for name, _ in open_checkpoint(tmp_path).tensors()] == ["a"]
    file.write_bytes(compressed(header, bytes(9)))
    with pytest.raises(CheckpointError, match=r"expected nothing after the last tensor"):
        list(open_checkpoint(tmp_path).tensors())


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
def test_a_loaded_model_holds_no_file(tmp_path: Path, stored: torch.dtype) -> None:
    write_dit(tmp_path, CONFIG, linear_dtype=stored)
    dit = load_dit(tmp_path)
    weight = dit.layers[0].qkvg.clone()
    assert str(tmp_path) not in Path("/proc/self/maps").read_text()
    for file in tmp_path.glob("*.safetensors"):
        half = file.stat().st_size // 2
        with file.open("r+b") as shard:
            shard.seek(half)
            shard.write(bytes(half))
    assert torch.equal(dit.layers[0].qkvg, weight)


def test_full_disk_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(tensors: object, path: Path, **options: object) -> None:
        raise SafetensorError("No space left on device")

    monkeypatch.setattr(files, "save_file", full)
    with pytest.raises(OutputError, match=r"No space left on device"):
        write_dit(tmp_path, CONFIG)
    assert not list(tmp_path.iterdir())


def test_written_files_are_readable_by_others(folder: Path) -> None:
    modes = {file.stat().st_mode & 0o777 for file in folder.iterdir()}
    (folder / "plain").write_text("")
    assert modes == {(folder / "plain").stat().st_mode & 0o777}
