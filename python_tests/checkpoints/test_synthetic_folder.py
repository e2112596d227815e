"""A checkpoint of random weights is written whole or not at all, and what was in its folder before stays."""

from __future__ import annotations

import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from magihuman_fast.checkpoints.synthetic import audio_vae, files, write_checkpoint
from magihuman_fast.checkpoints.synthetic.audio_vae import write_audio_vae
from magihuman_fast.checkpoints.synthetic.image_vae import write_image_vae
from magihuman_fast.checkpoints.synthetic.turbo_vae import write_turbo_vae
from magihuman_fast.cli.ending_signals import Terminated
from magihuman_fast.errors import OutputError


def test_failed_checkpoint_leaves_what_was_there(tmp_path: Path) -> None:
    (tmp_path / "turbo_vae").mkdir()
    (tmp_path / "turbo_vae" / "mine").write_text("mine")

    def fail(*args: object) -> None:
        raise OSError(28, "No space left on device")

    with pytest.raises(OutputError, match="No space left"):
        write_checkpoint(tmp_path, on_file=fail)
    assert [path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*")] == [
        "turbo_vae",
        "turbo_vae/mine",
    ]


def test_checkpoint_that_cannot_be_moved_into_place_leaves_what_was_there(tmp_path: Path) -> None:
    """Refused before any file moves where a folder is in the way; put back where moving fails half-way."""
    write_checkpoint(tmp_path / "old", seed=1)
    before = contents_of(tmp_path / "old")
    config = tmp_path / "old" / "turbo_vae" / "TurboV3-Wan22-TinyShallow_7_7.json"
    text = config.read_bytes()
    config.unlink()
    config.mkdir()
    with pytest.raises(OutputError, match=r"7_7\.json: expected a file or nothing, found a folder"):
        write_checkpoint(tmp_path / "old", seed=2)
    config.rmdir()
    config.write_bytes(text)
    assert contents_of(tmp_path / "old") == before


@pytest.mark.parametrize("moves", [1, 2, 9, 20])
def test_moving_that_ends_half_way_is_taken_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moves: int
) -> None:
    write_checkpoint(tmp_path / "old", seed=1)
    (tmp_path / "old" / "distill" / "model.safetensors.index.json").unlink()
    before = contents_of(tmp_path / "old")
    left, move = [moves], files._move

    def some(source: Path, target: Path) -> None:
        if left[0] == 0:
            left[0] = -1
            raise Terminated(signal.SIGTERM)
        left[0] -= 1
        move(source, target)

    monkeypatch.setattr(files, "_move", some)
    with pytest.raises(Terminated):
        write_checkpoint(tmp_path / "old", seed=2)
    assert contents_of(tmp_path / "old") == before
    left[0] = moves
    with pytest.raises(Terminated):
        write_checkpoint(tmp_path / "new", seed=2)
    assert not (tmp_path / "new").exists()


def contents_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("write", [write_turbo_vae, write_image_vae, write_audio_vae])
def test_component_that_cannot_be_written(
    write: Callable[..., None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(audio_vae, "_set_level", lambda *args: None)  # takes longer than all else
    (tmp_path / "file").write_text("")
    with pytest.raises(
        OutputError, match=r"file/folder: cannot write the (Turbo|image|audio) VAE: .*Not a dir"
    ):
        write(tmp_path / "file" / "folder")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
