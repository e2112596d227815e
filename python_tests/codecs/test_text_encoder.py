"""The text encoder against transformers and against a float64 computation of its own; damaged folders; prompts."""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import shutil
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from cases import GOLDEN
from magihuman_fast.checkpoints.synthetic.text_encoder import write_text_encoder
from magihuman_fast.codecs.text_encoder import TextEncoder, load_negative_prompt
from magihuman_fast.errors import CheckpointError, InputError
from numerics import rel_err

INDEX = "model.safetensors.index.json"
SHARDS = [f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]
PROMPT = "A woman looks at the camera and says: <pad> grüß dich, 日本 \U0001f600\n  bye"
SOFTCAP = 50.0


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in the published layout; tests must not change it."""
    folder = tmp_path_factory.mktemp("t5gemma")
    write_text_encoder(folder, hidden=64, layers=2, seed=3)
    return folder


@pytest.fixture(scope="module")
def encoder(published: Path) -> TextEncoder:
    return TextEncoder.from_pretrained(published)


@pytest.fixture
def copied(published: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    return shutil.copytree(published, tmp_path / "t5gemma")


def token_ids(folder: Path, prompt: str) -> list[int]:
    from tokenizers import Tokenizer

    return Tokenizer.from_file(str(folder / "tokenizer.json")).encode(prompt).ids


def transformers_hidden(folder: Path, prompt: str) -> torch.Tensor:
    """The whole published model, loaded by transformers itself; its encoder's last hidden state."""
    from transformers import T5GemmaForConditionalGeneration

    model = T5GemmaForConditionalGeneration.from_pretrained(
        folder, dtype=torch.bfloat16, attn_implementation="eager", local_files_only=True
    ).eval()
    ids = torch.tensor([token_ids(folder, prompt)])
    with torch.no_grad():
        out = model.model.encoder(input_ids=ids, attention_mask=torch.ones_like(ids))
    return out.last_hidden_state[0]


def oracle(folder: Path, prompt: str, softcap: float | None) -> torch.Tensor:
    """The encoder in float64 from its published formulas: (tokens, hidden)."""
    weights = {name: w.double() for shard in SHARDS[:2] for name, w in load_file(folder / shard).items()}
    config = json.loads((folder / "config.json").read_text())["encoder"]
    heads, kv_heads, dim = (config[k] for k in ("num_attention_heads", "num_key_value_heads", "head_dim"))
    ids = torch.tensor(token_ids(folder, prompt))
    angles = torch.arange(len(ids)).double()[:, None] * 10000.0 ** (-torch.arange(0, dim, 2).double() / dim)
    cos, sin = angles.cos(), angles.sin()

    def norm(x: torch.Tensor, name: str) -> torch.Tensor:
        return x * (x.pow(2).mean(-1, keepdim=True) + 1e-6).rsqrt() * (1 + weights[name])

    def rotated(x: torch.Tensor) -> torch.Tensor:
        a, b = x.chunk(2, dim=-1)
        return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)

    x = weights["model.encoder.embed_tokens.weight"][ids] * math.sqrt(config["hidden_size"])
    for i in range(config["num_hidden_layers"]):
        layer = f"model.encoder.layers.{i}."
        h = norm(x, layer + "pre_self_attn_layernorm.weight")
        q, k, v = (
            (h @ weights[f"{layer}self_attn.{name}_proj.weight"].T).unflatten(1, (-1, dim)).transpose(0, 1)
            for name in "qkv"
        )
        k, v = (t.repeat_interleave(heads // kv_heads, dim=0) for t in (k, v))
        logits = rotated(q) @ rotated(k).mT * config["query_pre_attn_scalar"] ** -0.5
        if softcap is not None:
            logits = softcap * torch.tanh(logits / softcap)
        attended = (logits.softmax(-1) @ v).transpose(0, 1).flatten(1)
        out = attended @ weights[layer + "self_attn.o_proj.weight"].T
        x = x + norm(out, layer + "post_self_attn_layernorm.weight")
        h = norm(x, layer + "pre_feedforward_layernorm.weight")
        gate, up = (h @ weights[f"{layer}mlp.{name}_proj.weight"].T for name in ("gate", "up"))
        h = (torch.nn.functional.gelu(gate, approximate="tanh") * up) @ weights[
            layer + "mlp.down_proj.weight"
        ].T
        x = x + norm(h, layer + "post_feedforward_layernorm.weight")
    return norm(x, "model.encoder.norm.weight")


def edit_shard(shard: Path, edit: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    tensors = load_file(shard)
    edit(tensors)
    save_file(tensors, shard)


def edit_json(file: Path, edit: Callable[[Any], Any]) -> None:
    content = json.loads(file.read_text())
    edit(content)
    file.write_text(json.dumps(content))


def test_encode_equals_transformers(published: Path, encoder: TextEncoder) -> None:
    embedding = encoder.encode(PROMPT)
    ids = token_ids(published, PROMPT)
    assert (embedding.num_tokens, encoder.hidden_size, encoder.path) == (len(ids), 64, published)
    assert embedding.hidden.dtype == torch.float32
    assert embedding.hidden.shape == (len(ids), 64)
    expected = transformers_hidden(published, PROMPT).to(torch.float16).float()
    assert torch.equal(embedding.hidden, expected)


def test_attention_logits_are_capped_at_50(copied: Path) -> None:
    """Large query weights: with the cap the encoder agrees with the float64 oracle, without it would be far off."""

    def enlarge(tensors: dict[str, torch.Tensor]) -> None:
        for name in tensors:
            if name.endswith("q_proj.weight"):
                tensors[name] *= 32

    for shard in SHARDS[:2]:
        edit_shard(copied / shard, enlarge)
    got = TextEncoder.from_pretrained(copied, dtype=torch.float32).encode(PROMPT).hidden
    capped, uncapped = (oracle(copied, PROMPT, cap) for cap in (SOFTCAP, None))
    assert rel_err(got, capped) < 5e-4  # float16 rounding of the result
    assert rel_err(uncapped, capped) > 5e-2


def test_tokenizer_knows_every_text_and_starts_with_bos(published: Path, encoder: TextEncoder) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(published, local_files_only=True)
    for prompt in (PROMPT, "the woman speaks", "\x00\t\u202e", "नमस्ते"):
        ids = tokenizer(prompt)["input_ids"]
        assert ids == token_ids(published, prompt)
        assert ids[0] == tokenizer.bos_token_id
        assert tokenizer.bos_token_id not in ids[1:]
        assert tokenizer.unk_token_id not in ids
        assert encoder.encode(prompt).num_tokens == len(ids)


def test_weights_take_the_asked_dtype_and_the_result_is_rounded_to_float16(published: Path) -> None:
    encoder = TextEncoder.from_pretrained(published, dtype=torch.float32)
    full = encoder.encode(PROMPT).hidden
    assert rel_err(full, oracle(published, PROMPT, SOFTCAP)) < 5e-4
    assert torch.equal(full, full.to(torch.float16).float())
    half = TextEncoder.from_pretrained(published, dtype=torch.bfloat16)
    assert 5e-4 < rel_err(half.encode(PROMPT).hidden, oracle(published, PROMPT, SOFTCAP)) < 3e-2


def test_decoder_shards_need_not_be_present(copied: Path, encoder: TextEncoder) -> None:
    held = json.loads((copied / INDEX).read_text())["weight_map"]
    assert {name.split(".")[1] for name, shard in held.items() if shard == SHARDS[2]} == {"decoder"}
    (copied / SHARDS[2]).unlink()
    got = TextEncoder.from_pretrained(copied).encode(PROMPT).hidden
    assert torch.equal(got, encoder.encode(PROMPT).hidden)


def test_one_file_without_index_loads_too(copied: Path, encoder: TextEncoder) -> None:
    save_file({k: t for s in SHARDS for k, t in load_file(copied / s).items()}, copied / "model.safetensors")
    for name in (INDEX, *SHARDS):
        (copied / name).unlink()
    got = TextEncoder.from_pretrained(copied).encode(PROMPT).hidden
    assert torch.equal(got, encoder.encode(PROMPT).hidden)


EMBED = "model.encoder.embed_tokens.weight"


def _drop_shard(folder: Path) -> None:
    (folder / SHARDS[1]).unlink()


def _truncate_shard(folder: Path) -> None:
    with (folder / SHARDS[0]).open("r+b") as file:
        file.truncate(50_000)


def _wrong_shape(folder: Path) -> None:
    edit_shard(folder / SHARDS[0], lambda t: t.update({EMBED: torch.zeros(7, 64)}))


def _integers(folder: Path) -> None:
    edit_shard(folder / SHARDS[0], lambda t: t.update({EMBED: t[EMBED].to(torch.int8)}))


def _unexpected_key(folder: Path) -> None:
    edit_shard(folder / SHARDS[0], lambda t: t.update({"model.encoder.extra": torch.zeros(1)}))
    edit_json(folder / INDEX, lambda i: i["weight_map"].update({"model.encoder.extra": SHARDS[0]}))


def _missing_key(folder: Path) -> None:
    edit_shard(folder / SHARDS[0], lambda t: t.pop(EMBED))
    edit_json(folder / INDEX, lambda i: i["weight_map"].pop(EMBED))


def _unlisted_key(folder: Path) -> None:
    edit_json(folder / INDEX, lambda i: i["weight_map"].pop(EMBED))


def _escape_upwards(folder: Path) -> None:
    shutil.copy(folder / SHARDS[0], folder.parent / "outside.safetensors")
    edit_json(folder / INDEX, lambda i: i["weight_map"].update({EMBED: "../outside.safetensors"}))


def _escape_absolute(folder: Path) -> None:
    edit_json(folder / INDEX, lambda i: i["weight_map"].update({EMBED: str(folder / SHARDS[0])}))


def _config_gone(folder: Path) -> None:
    (folder / "config.json").unlink()


def _config_no_json(folder: Path) -> None:
    (folder / "config.json").write_text("{")


def _config_other_model(folder: Path) -> None:
    edit_json(folder / "config.json", lambda c: c.update(model_type="llama"))


def _config_bad_value(folder: Path) -> None:
    edit_json(folder / "config.json", lambda c: c["encoder"].update(hidden_size="wide"))


def _config_more_layers(folder: Path) -> None:
    def edit(config: Any) -> None:
        config["encoder"].update(num_hidden_layers=3, layer_types=["full_attention"] * 3)

    edit_json(folder / "config.json", edit)


def _tokenizer_gone(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()


def _tokenizer_garbage(folder: Path) -> None:
    (folder / "tokenizer.json").write_text("[]")


def _tokenizer_too_large(folder: Path) -> None:
    edit_json(folder / "tokenizer.json", lambda t: t["model"]["vocab"].update({"many": 100_000}))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_drop_shard, SHARDS[1]),
        (_truncate_shard, SHARDS[0]),
        (_wrong_shape, rf"wrong shapes: {EMBED} \(expected \[\d+, 64\], got \[7, 64\]\)"),
        (_integers, rf"{SHARDS[0]}: {EMBED} expected floating point, got torch.int8"),
        (_unexpected_key, "unexpected keys: model.encoder.extra"),
        (_missing_key, f"missing keys: {EMBED}"),
        (_unlisted_key, f"{SHARDS[0]}.*{EMBED}"),
        (_escape_upwards, "outside the folder"),
        (_escape_absolute, "outside the folder"),
        (_config_gone, r"config\.json"),
        (_config_no_json, r"config\.json"),
        (_config_other_model, r"config\.json: expected model_type 't5gemma', got 'llama'"),
        (_config_bad_value, r"config\.json: expected a T5Gemma config"),
        (_config_more_layers, r"missing keys: model\.encoder\.layers\.2\..* and 6 more"),
        (_tokenizer_gone, r"tokenizer\.json"),
        (_tokenizer_garbage, r"tokenizer\.json: expected a tokenizer"),
        (_tokenizer_too_large, r"tokenizer\.json: expected token ids below .*, got 100000"),
    ],
)
def test_damaged_folder_is_refused(copied: Path, damage: Callable[[Path], None], message: str) -> None:
    damage(copied)
    with pytest.raises(CheckpointError, match=message):
        TextEncoder.from_pretrained(copied)


def test_missing_folder_is_refused_and_not_looked_up(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="t5gemma-9b-9b-ul2"):
        TextEncoder.from_pretrained(tmp_path / "google" / "t5gemma-9b-9b-ul2")


def test_code_beside_the_tokenizer_is_never_run(copied: Path) -> None:
    """Whether such a folder is refused or its code ignored is the library's choice."""
    edit_json(
        copied / "tokenizer_config.json",
        lambda c: c.update(
            tokenizer_class="Custom", auto_map={"AutoTokenizer": ["code.Custom", "code.Custom"]}
        ),
    )
    trace = copied / "code_was_run"
    (copied / "code.py").write_text(f"open({str(trace)!r}, 'w').close()\nclass Custom: ...\n")
    with contextlib.suppress(CheckpointError):
        TextEncoder.from_pretrained(copied)
    assert not trace.exists()


def test_loading_and_encoding_use_no_network_and_leave_the_environment(
    published: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []

    def refuse(*args: object, **kwargs: object) -> None:
        calls.append(repr(args))
        raise OSError("no network in this test")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    before = dict(os.environ)
    TextEncoder.from_pretrained(published).encode("offline")
    assert calls == []
    assert dict(os.environ) == before


@pytest.mark.parametrize("prompt", ["", " \n\t", None, 7, "half a pair \ud83d"])
def test_bad_prompt_is_refused(encoder: TextEncoder, prompt: Any) -> None:
    with pytest.raises(InputError, match="prompt: expected"):
        encoder.encode(prompt)


def test_prompt_beyond_the_encoder_positions_is_refused(encoder: TextEncoder) -> None:
    with pytest.raises(InputError, match="at most 8192 tokens, got 9001"):
        encoder.encode("z" * 9000)


def test_long_prompt_is_encoded_whole_then_trimmed_with_one_warning(
    published: Path, encoder: TextEncoder, caplog: pytest.LogCaptureFixture
) -> None:
    prompt = "abcdefghi " * 80
    count = len(token_ids(published, prompt))
    assert count > 640
    with caplog.at_level(logging.WARNING, logger="magihuman_fast"):
        embedding = encoder.encode(prompt)
    messages = [r.getMessage() for r in caplog.records if r.name.startswith("magihuman_fast")]
    assert len(messages) == 1
    assert str(count) in messages[0]
    assert embedding.num_tokens == 640
    whole = transformers_hidden(published, prompt)
    assert len(whole) == count
    assert torch.equal(embedding.hidden, whole[:640].to(torch.float16).float())


def test_the_last_16_prompts_are_kept(published: Path) -> None:
    encoder = TextEncoder.from_pretrained(published)
    first, second = encoder.encode("first"), encoder.encode("second")
    for i in range(14):
        encoder.encode(f"filler {i}")
    assert encoder.encode("first") is first  # also makes "second" the oldest
    encoder.encode("one more")
    assert encoder.encode("first") is first
    again = encoder.encode("second")
    assert again is not second
    assert torch.equal(again.hidden, second.hidden)


def test_negative_prompt_is_the_published_one(encoder: TextEncoder) -> None:
    prompt = load_negative_prompt()
    assert prompt.encode() == (GOLDEN / "official" / "negative_prompt.txt").read_bytes()
    assert encoder.encode(prompt).num_tokens == 640


def test_synthetic_encoder_depends_on_its_arguments_only(published: Path, tmp_path: Path) -> None:
    write_text_encoder(tmp_path / "same", hidden=64, layers=2, seed=3)
    write_text_encoder(tmp_path / "other", hidden=32, layers=1, seed=4, shards=2)
    for file in published.iterdir():
        assert (tmp_path / "same" / file.name).read_bytes() == file.read_bytes(), file.name
    other = TextEncoder.from_pretrained(tmp_path / "other").encode(PROMPT).hidden
    assert other.shape[1] == 32
    assert torch.isfinite(other).all()


def test_config_without_the_logit_cap_is_refused(tmp_path: Path) -> None:
    write_text_encoder(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["encoder"]["attn_logit_softcapping"] = None
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"expected attn_logit_softcapping 50.0, got None"):
        TextEncoder.from_pretrained(tmp_path)
