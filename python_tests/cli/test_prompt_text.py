"""Prompts from files, standard input and the command line: equal bytes are one prompt, whatever wrote them."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from magihuman_fast.cli.prompt_text import MAX_BYTES, plain, read_prompt
from magihuman_fast.errors import InputError
from magihuman_fast.pipeline.pipeline import MagiHumanPipeline

ROOT = Path(__file__).resolve().parents[2]
PROMPT = "A man sings:\n“Grüße, 世界”."
WRITTEN = {
    "plain": PROMPT.encode(),
    "with a newline": f"{PROMPT}\n".encode(),
    "with a mark": PROMPT.encode("utf-8-sig"),
    "by Notepad": PROMPT.replace("\n", "\r\n").encode("utf-8-sig") + b"\r\n",
    "by PowerShell": b"\xff\xfe" + f"{PROMPT}\n".replace("\n", "\r\n").encode("utf-16-le"),
    "big-endian": b"\xfe\xff" + PROMPT.encode("utf-16-be"),
    "UTF-32": b"\xff\xfe\0\0" + PROMPT.encode("utf-32-le"),
    "old Mac": PROMPT.replace("\n", "\r").encode(),
    "with blanks": f" \t{PROMPT}  \n\n".encode(),
}
NO_TEXT = {
    "zero bytes": (b"a\0b", "got a zero byte"),
    "UTF-16 without a mark": ("Hello.".encode("utf-16-le"), "got a zero byte"),
    "Latin-1": ("Grüße".encode("latin-1"), "can't decode byte 0xfc"),
    "half a character": (b"\xff\xfeA", "truncated data"),
    "a picture": (b"\x89PNG\r\n\x1a\n", "can't decode byte 0x89"),
    "too much": (b"a" * (MAX_BYTES + 1), f"expected at most {MAX_BYTES} bytes of text, got more"),
}


@pytest.mark.parametrize("how", WRITTEN)
def test_every_way_to_write_it_is_one_prompt(
    how: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "prompt.txt"
    file.write_bytes(WRITTEN[how])
    assert read_prompt(file) == PROMPT
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(WRITTEN[how]), encoding="ascii"))
    assert read_prompt(Path("-")) == PROMPT
    if how not in ("by PowerShell", "big-endian", "UTF-32"):  # no shell passes zero bytes
        assert plain(WRITTEN[how].decode()) == PROMPT


@pytest.mark.parametrize("what", NO_TEXT)
def test_no_text(what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data, message = NO_TEXT[what]
    file = tmp_path / "prompt.txt"
    file.write_bytes(data)
    for name in (str(file), "-"):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data)))
        with pytest.raises(InputError) as caught:
            read_prompt(Path(name))
        assert str(caught.value).startswith(f"prompt file {name}: ")
        assert message in str(caught.value)


def test_most_that_is_read(tmp_path: Path) -> None:
    file = tmp_path / "prompt.txt"
    file.write_bytes(b"a" * MAX_BYTES)
    assert len(read_prompt(file)) == MAX_BYTES
    with pytest.raises(InputError, match="at most"):
        read_prompt(Path("/dev/zero"))
    with pytest.raises(InputError, match=r"cannot be read: .*Is a directory"):
        read_prompt(tmp_path)


def stdin_of_a_process(redirection: str) -> subprocess.CompletedProcess[str]:
    code = "from pathlib import Path; from magihuman_fast.cli.prompt_text import read_prompt; "
    code += "print(ascii(read_prompt(Path('-'))))"
    return subprocess.run(
        ["sh", "-c", f'exec "$0" -c "$1" {redirection}', sys.executable, code],
        cwd=ROOT,
        env=os.environ | {"LC_ALL": "C", "PYTHONUTF8": "0"},
        capture_output=True,
        text=True,
    )


def test_stdin_of_a_process(tmp_path: Path) -> None:
    file = tmp_path / "prompt.txt"
    file.write_bytes(WRITTEN["by PowerShell"])
    assert stdin_of_a_process(f"< {file}").stdout == f"{PROMPT!a}\n"
    assert "InputError: prompt file -: expected at most" in stdin_of_a_process("< /dev/zero").stderr
    assert (
        "InputError: prompt file -: expected text on stdin, got no stdin" in stdin_of_a_process("<&-").stderr
    )
    assert stdin_of_a_process("< /dev/null").stdout == "''\n"


def test_closed_stdin_object(monkeypatch: pytest.MonkeyPatch) -> None:
    stdin = io.StringIO("gone")
    stdin.close()
    monkeypatch.setattr(sys, "stdin", stdin)
    with pytest.raises(InputError, match="prompt file -: cannot be read"):
        read_prompt(Path("-"))


def test_command_takes_all_alike(
    run: Any,
    request_: list[object],
    loaded: MagiHumanPipeline,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The prompt from three places, and the negative one, as the text encoder gets them."""
    seen = []
    encode = loaded.text_encoder.encode
    monkeypatch.setattr(
        loaded.text_encoder, "encode", lambda prompt, **_: seen.append(prompt) or encode(prompt)
    )
    (tmp_path / "prompt.txt").write_bytes(WRITTEN["by Notepad"])
    where = request_.index("--prompt")
    as_argument = WRITTEN["by Notepad"].decode().rstrip("\n")
    for option in (
        ["--prompt-file", tmp_path / "prompt.txt"],
        ["--prompt-file", "-"],
        ["--prompt", as_argument],
    ):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(WRITTEN["by Notepad"])))
        request_[where : where + 2] = option
        assert run(*request_, "--sr-guidance", "--negative-prompt", "\ufeffdull\r\n")[0] == 0
        assert seen == [PROMPT, "dull"]
        seen.clear()


def test_prompt_without_stdin(run: Any, request_: list[object], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", None)
    where = request_.index("--prompt")
    request_[where : where + 2] = ["--prompt-file", "-"]
    code, out, err = run(*request_)
    assert (code, out) == (2, "")
    assert "expected text on stdin, got no stdin" in err


def test_prompt_that_is_no_unicode(run: Any, request_: list[object]) -> None:
    request_[request_.index("--prompt") + 1] = "half a pair: \ud800"
    code, out, err = run(*request_)
    assert (code, out) == (2, "")
    assert "prompt: expected valid Unicode" in err
