"""What downloads leave in place of model files, and folders mistaken for a checkpoint's: each is named."""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path

import pytest

from magihuman_fast.checkpoints import check as checkpoint_check
from magihuman_fast.checkpoints.check import check_checkpoint
from magihuman_fast.codecs.image_encoder import ImageEncoder
from magihuman_fast.codecs.picture_files import load_image
from magihuman_fast.codecs.sound_files import load_audio
from magihuman_fast.codecs.text_encoder import TextEncoder
from magihuman_fast.errors import CheckpointError, InputError
from magihuman_fast.guards.download_faults import contents, fault
from magihuman_fast.model.weights import open_checkpoint
from magihuman_fast.pipeline.pipeline import MagiHumanPipeline

LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 123456789\n"
HTML = b"\xef\xbb\xbf\n<!DOCTYPE html><html><head><title>Sign in</title></head><body>x</body></html>"
XML = b"<?xml version='1.0'?><Error><Code>AccessDenied</Code><Message>Access Denied</Message></Error>"
GATED = b"Access to model stabilityai/stable-audio-open-1.0 is restricted. You must have access to it.\nmore"
JSON_ERROR = b'{"error": "Repository not found"}'
AGAIN = "download it again"
BODIES = {
    "git-lfs": (LFS, f"a git-lfs pointer, not the file: {AGAIN}"),
    "git-xet": (b"# xet version 0\nfilesize = 3\n", f"a git-xet pointer, not the file: {AGAIN}"),
    "git-annex": (b"/annex/objects/SHA256E-s3--00.pth\n", "a git-annex pointer, not the file: git annex get"),
    "HTML": (HTML, f"an HTML page ('Sign in'), not the file: {AGAIN}"),
    "comment": (b"<!-- a -->\n" + HTML[4:], f"an HTML page ('Sign in'), not the file: {AGAIN}"),
    "Latin-1": (b"<html><title>caf\xe9</title>", f"an HTML page ('caf\u00e9'), not the file: {AGAIN}"),
    "XML": (XML, "an XML message ('Access Denied'), not the file: where the model's page"),
    "text": (b"Entry not found", f"text ('Entry not found'), not the file: {AGAIN}"),
    "gated": (GATED, "is restricted. You must have access to it.'), not the file: where the model's page"),
    "JSON": (JSON_ERROR, f"an error message ('Repository not found'), not the file: {AGAIN}"),
    "empty": (b"", f"an empty file: {AGAIN}"),
}
INDEX = "distill/model.safetensors.index.json"
SHARDS = ["distill/model-00003-of-00013.safetensors", "distill/model-00007-of-00013.safetensors"]
FILES = [
    *SHARDS[:1],
    INDEX,
    "turbo_vae/checkpoint-340000.ckpt",
    "turbo_vae/TurboV3-Wan22-TinyShallow_7_7.json",
    "Wan2.2-TI2V-5B/Wan2.2_VAE.pth",
    "stable-audio-open-1.0/model.safetensors",
    "stable-audio-open-1.0/model_config.json",
    "t5gemma-9b-9b-ul2/tokenizer.json",
    "t5gemma-9b-9b-ul2/tokenizer_config.json",
    "t5gemma-9b-9b-ul2/config.json",
    "t5gemma-9b-9b-ul2/model.safetensors.index.json",
    "t5gemma-9b-9b-ul2/model-00001-of-00003.safetensors",
]


@pytest.fixture
def root(tiny_checkpoint: Path, tmp_path: Path) -> Path:
    """The tiny checkpoint's distilled half; files may be replaced, not written into."""
    ignore = shutil.ignore_patterns("base", "*_sr")
    return Path(shutil.copytree(tiny_checkpoint, tmp_path / "model", copy_function=os.link, ignore=ignore))


def replace(file: Path, content: bytes) -> None:
    file.unlink()  # a hard link
    file.write_bytes(content)


def problems(root: Path) -> list[str]:
    return [problem for component in check_checkpoint(root).components for problem in component.problems]


def load(root: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        MagiHumanPipeline.from_pretrained(root, device="cpu")
    return str(caught.value)


def check(root: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        check_checkpoint(root)
    return str(caught.value)


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("kind", ["git-lfs", "JSON"])
def test_loading_and_check_name_what_is_there(root: Path, name: str, kind: str) -> None:
    body, expected = BODIES[kind]
    replace(root / name, body)
    found = problems(root)
    assert [problem for problem in found if expected in problem and Path(name).name in problem], found
    message = load(root)
    assert str(root / name) in message
    assert expected in message


@pytest.mark.parametrize("kind", BODIES)
@pytest.mark.parametrize("name", ["a.safetensors", "a.ckpt", "a.json", "a.safetensors.zst"])
def test_what_a_server_or_a_tool_left(tmp_path: Path, name: str, kind: str) -> None:
    body, expected = BODIES[kind]
    (tmp_path / name).write_bytes(body)
    assert expected in str(fault(tmp_path / name))


def test_good_files_have_no_fault(root: Path) -> None:
    assert {path: fault(path) for path in root.rglob("*") if path.is_file() and fault(path)} == {}
    assert problems(root) == []


def test_check_lists_every_fault(root: Path) -> None:
    """A clone without git-lfs has pointers for all large files."""
    pointers = [path for path in root.rglob("*") if path.suffix in (".safetensors", ".ckpt", ".pth")]
    for path in pointers:
        replace(path, LFS)
    told = "\n".join(problems(root))
    # The text encoder's last shard holds the decoder, which nobody reads.
    needed = [path for path in pointers if path.name != "model-00003-of-00003.safetensors"]
    assert [path.name for path in needed if f"{path}: " not in told] == []
    assert told.count("a git-lfs pointer") == len(needed) > 15


def test_quotes_are_short_and_harmless(tmp_path: Path) -> None:
    (tmp_path / "a.ckpt").write_bytes(b"no \xe2\x80\xa6 " + b"x" * 5000)
    told = str(fault(tmp_path / "a.ckpt"))
    assert "no … xxx" in told
    assert len(told) < 300
    (tmp_path / "a.ckpt").write_bytes(b"\x1b[2Jcleared")  # moves a terminal's cursor: no text of a server
    assert fault(tmp_path / "a.ckpt") is None


def test_only_the_ends_of_a_large_file_are_read(tmp_path: Path) -> None:
    large = tmp_path / "a.ckpt"
    large.write_bytes(b"<html>" + b" " * 100)
    os.truncate(large, 1 << 40)  # sparse
    assert "an HTML page" not in str(fault(large))  # zeros are no text
    large.write_bytes(b"PK\x03\x04")
    os.truncate(large, 1 << 40)
    assert "cut short" in str(fault(large))


@pytest.mark.parametrize("keep", [3, 100, -1])
def test_safetensors_cut_short(root: Path, keep: int) -> None:
    shard = root / SHARDS[0]
    whole = shard.read_bytes()
    replace(shard, whole[:keep])
    found = len(whole[:keep])
    message = load(root)
    assert "cut short" in message
    assert f"{found} bytes" in message or f"found {found}: {AGAIN}" in message
    if keep == -1:
        assert f"expected {len(whole)} bytes by its header, found {found}: {AGAIN}" in message
    replace(shard, whole + b"more")
    assert f"too long: expected {len(whole)} bytes by its header, found {len(whole) + 4}" in load(root)


def test_lengths_of_a_safetensors_header(tmp_path: Path) -> None:
    file = tmp_path / "a.safetensors"
    for length, text, cut in (
        (2, b"{}", None),
        (2, b"{", "cut short: expected at least 10 bytes by its header, found 9"),
        (2, b"{}}", "too long: expected 10 bytes by its header, found 11"),
        (100_000_000, b"{}", "cut short: expected at least 100000008 bytes by its header, found 10"),
        # No header has such a length: its own reader tells.
        (1, b"", None),
        (100_000_001, b"{}", None),
    ):
        file.write_bytes(length.to_bytes(8, "little") + text)
        found = fault(file)
        assert found is None if cut is None else cut in str(found), (length, text)


@pytest.mark.parametrize("name", ["turbo_vae/checkpoint-340000.ckpt", "Wan2.2-TI2V-5B/Wan2.2_VAE.pth"])
def test_torch_file_cut_short(root: Path, name: str) -> None:
    whole = (root / name).read_bytes()
    replace(root / name, whole[: len(whole) // 2])
    assert f"found {len(whole) // 2} bytes without the directory that ends such a file, cut short" in load(
        root
    )


def test_compressed_shard_cut_short(root: Path) -> None:
    import zstandard

    shard = root / SHARDS[0]
    packed = zstandard.compress(shard.read_bytes())
    shard.unlink()
    shard.with_name(f"{shard.name}.zst").write_bytes(packed[:-100])
    assert re.search(rf"{re.escape(str(shard))}.zst: truncated: .*: {AGAIN}", load(root))


def test_room_that_was_never_filled(root: Path) -> None:
    size = (root / SHARDS[0]).stat().st_size
    replace(root / SHARDS[0], bytes(size))
    assert "nothing but zeros at its start" in load(root)


def test_aria2_has_not_ended(root: Path) -> None:
    """Its file has the full length from the beginning: the weights it lacks would be zeros."""
    shard = root / SHARDS[0]
    shard.with_name(f"{shard.name}.aria2").touch()
    expected = f"a download that has not ended ({shard.name}.aria2 is beside it)"
    assert expected in load(root)
    assert expected in "\n".join(problems(root))


def hub_partial(root: Path, name: str) -> Path:
    """Where `hf download --local-dir ROOT` keeps the unfinished file `name`, asked of the hub's own library."""
    from huggingface_hub._local_folder import get_local_download_paths

    path: Path = get_local_download_paths(root, name).incomplete_path("some-etag")
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


@pytest.mark.parametrize(
    "suffix", [".incomplete", ".part", ".crdownload", ".aria2", ".1a2b.incomplete", "hub"]
)
def test_unfinished_download(root: Path, suffix: str) -> None:
    for name in (*SHARDS, "Wan2.2-TI2V-5B/Wan2.2_VAE.pth", "turbo_vae/checkpoint-340000.ckpt"):
        file = root / name
        file.unlink()
        part = hub_partial(root, name) if suffix == "hub" else file.with_name(file.name + suffix)
        part.write_bytes(bytes(77))
        expected = f"only a part of it ({part}, 77 bytes): its download has not ended"
        assert expected in "\n".join(problems(root)), name
        if name != SHARDS[0]:
            part.unlink()
            continue
        assert expected in load(root)
        part.unlink()
        shutil.copy(root / SHARDS[1], file)
    file = root / "distill" / "model.safetensors.index.json"
    file.unlink()
    file.with_name(f"{file.name}.part").touch()
    assert f"{file.name}: found only a part of it" in load(root)


def test_hub_cache_without_its_blobs(root: Path) -> None:
    """A snapshot is a folder of links to blobs, of which a download may have left none or a part."""
    blobs = root / "blobs"
    blobs.mkdir()
    shard = root / SHARDS[0]
    shard.unlink()
    shard.symlink_to("../blobs/abc")
    gone = f"a link to ../blobs/abc, which is not there: {AGAIN}"
    assert gone in load(root)
    assert gone in "\n".join(problems(root))
    (blobs / "abc.12345678.incomplete").write_bytes(bytes(9))
    part = "a link to ../blobs/abc, of which only a part is there ("
    assert part in load(root)
    assert part in "\n".join(problems(root))
    shutil.copy(root / SHARDS[1], blobs / "abc")
    assert "disagrees with" in load(root)  # another shard's content, but there
    shard.unlink()
    shard.symlink_to("../.git/annex/objects/1/2/SHA256E-s3--00/SHA256E-s3--00")
    assert "a git-annex link without its content: git annex get brings it" in load(root)


def test_component_that_is_a_link_to_nothing(root: Path) -> None:
    shutil.rmtree(root / "stable-audio-open-1.0")
    (root / "stable-audio-open-1.0").symlink_to(root / "unmounted")
    assert f"it is a link to {root / 'unmounted'}, which is not there" in "\n".join(problems(root))
    assert f"it is a link to {root / 'unmounted'}, which is not there" in load(root)


def test_components_say_what_is_there(tmp_path: Path) -> None:
    (tmp_path / "Wan2.2_VAE.pth").symlink_to("../../blobs/abc")
    with pytest.raises(CheckpointError, match=r"a link to \.\./\.\./blobs/abc, which is not there"):
        ImageEncoder.from_pretrained(tmp_path)
    with pytest.raises(
        CheckpointError, match=r"google/t5gemma-9b-9b-ul2 is a model's name on huggingface.co"
    ):
        TextEncoder.from_pretrained("google/t5gemma-9b-9b-ul2")


def test_hub_cache_folder_of_a_component(root: Path, tmp_path: Path) -> None:
    hub = tmp_path / "models--google--t5gemma-9b-9b-ul2"
    (hub / "snapshots").mkdir(parents=True)
    shutil.move(root / "t5gemma-9b-9b-ul2", hub / "snapshots" / "0123abc")
    with pytest.raises(CheckpointError, match=re.escape(f"give {hub / 'snapshots' / '0123abc'})")):
        TextEncoder.from_pretrained(hub)


def test_folder_that_was_meant(root: Path, tmp_path: Path) -> None:
    hub = tmp_path / "hub" / "models--GAIR--daVinci-MagiHuman"
    revision = hub / "snapshots" / "0123abc"
    shutil.copytree(root, revision, copy_function=os.link)
    given = {
        root / "distill": root,
        root / "turbo_vae": root,
        tmp_path: root,
        hub: revision,
        hub.parent: revision,
        revision.parent: revision,
    }
    for folder, meant in given.items():
        expected = f"{folder}: expected "
        for told in (load(folder), check(folder)):
            assert told.startswith(expected)
            assert told.endswith(f"; was {meant} meant?")
    lone = tmp_path / "elsewhere" / "weights"
    shutil.copytree(root / "distill", lone, copy_function=os.link)
    assert load(lone).endswith(f"one model's folder: give the folder above it, {lone.parent}")


def test_roots_that_are_no_folder(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "link").symlink_to("gone")
    told = {
        "GAIR/daVinci-MagiHuman": "if GAIR/daVinci-MagiHuman is a model's name on huggingface.co: nothing is ever",
        "model/distill/model.safetensors.index.json": "found a file",
        "link": "found no folder link: it is a link to gone, which is not there",
        "x" * 300: "found no folder",
    }
    for name, expected in told.items():
        for message in (load(Path(name)), check(Path(name))):
            assert expected in message
    assert "huggingface.co" not in load(Path("model/mistyped"))  # a name in a folder that is there
    shutil.rmtree(root / "turbo_vae")
    assert "expected turbo_vae/ in the checkpoint's root folder, found only: " in load(root)


def test_reading_mapped_tensors_needs_whole_files(root: Path) -> None:
    checkpoint = open_checkpoint(root / "distill")
    replace(root / SHARDS[0], LFS)
    with pytest.raises(CheckpointError, match="a git-lfs pointer"):
        list(checkpoint.tensors())


@pytest.mark.parametrize(
    "what", ["git-lfs", "git-xet", "git-annex", "HTML", "comment", "Latin-1", "XML", "JSON", "empty"]
)
def test_pictures_and_sounds_too(tmp_path: Path, what: str) -> None:
    body, message = BODIES[what]
    for name, load in (("face.png", load_image), ("voice.wav", load_audio)):
        (tmp_path / name).write_bytes(body)
        with pytest.raises(InputError, match=rf"{name}: expected .*, found {re.escape(message)}"):
            load(tmp_path / name)


def test_hostile_files_only_fail(tmp_path: Path) -> None:
    """What puts a fault into words must not fail itself."""
    header = b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,1e999]}}'
    (tmp_path / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)
    with pytest.raises(CheckpointError, match=r"model\.safetensors: expected a safetensors file"):
        open_checkpoint(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map":{"a":"\\ud800.safetensors"}}')
    with pytest.raises(CheckpointError, match="missing shards"):
        open_checkpoint(tmp_path)


def test_folder_of_another_user(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = Path.is_file

    def refused(path: Path) -> bool:
        if path.parent.name == "distill":
            raise PermissionError(13, "Permission denied", str(path))
        return real(path)

    monkeypatch.setattr(Path, "is_file", refused)
    with pytest.raises(CheckpointError, match=r"distill/.*: cannot be read: Permission denied"):
        MagiHumanPipeline.from_pretrained(root, device="cpu")
    with pytest.raises(CheckpointError, match=r"distill/.*: cannot be read: Permission denied"):
        check_checkpoint(root)


def test_file_of_another_user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.pth").write_bytes(b"some")

    def refused(*args: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", refused)
    assert fault(tmp_path / "a.pth") == "a file that cannot be read: Permission denied"
    monkeypatch.setattr(os, "access", lambda *args: False)
    assert contents(tmp_path) == "a folder that cannot be read: permission denied"
    for load in (load_audio, load_image):
        with pytest.raises(InputError, match=r"a\.pth: cannot be read: permission denied"):
            load(tmp_path / "a.pth")


def test_leavings_are_looked_for_beside_few_of_many_shards(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    looked = []
    monkeypatch.setattr(checkpoint_check, "unfinished", lambda path: looked.append(path))
    names = {f"key{i}": f"model-{i:05}-of-01000.safetensors" for i in range(1000)}
    index = root / INDEX
    index.unlink()
    index.write_text(json.dumps({"weight_map": names}))
    report = check_checkpoint(root)
    (distill,) = (c for c in report.components if c.name == "distill")
    assert sum("missing; tensors in it: 1" in problem for problem in distill.problems) == 1000
    assert len(looked) <= 60
