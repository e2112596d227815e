"""A small T5Gemma with random weights in the published folder layout, for tests and demonstrations."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from ...guards.file_paths import atomic_output
from .files import save_tensors

_SPECIAL = ("<pad>", "<eos>", "<bos>", "<unk>", "<mask>")
_WORDS = ("▁the", "▁and", "▁with", "▁woman", "▁man", "▁speaks", "▁says", "▁camera", "▁looks", "▁voice")
_HEADS, _KV_HEADS, _HEAD_DIM = 4, 2, 16


def write_text_encoder(
    folder: Path,
    *,
    hidden: int = 64,
    layers: int = 2,
    seed: int = 0,
    shards: int = 3,
) -> None:
    """Write config, tokenizer, index and `shards` bfloat16 shards; only the last shard holds decoder tensors.

    `hidden` must be a multiple of 4. Equal arguments give equal weights.
    """
    if shards < 2:
        raise ValueError(f"shards: expected at least 2, one of them the decoder's, got {shards}")
    folder.mkdir(parents=True, exist_ok=True)
    _write_tokenizer(folder)
    config = _config(hidden, layers, vocab_size=len(_vocabulary()))
    _write_json(folder / "config.json", config)
    _write_weights(folder, config, seed, shards)


def _config(hidden: int, layers: int, vocab_size: int) -> dict[str, Any]:
    """The published config's fields with small sizes."""
    module = {
        "model_type": "t5_gemma_module",
        "vocab_size": vocab_size,
        "hidden_size": hidden,
        "intermediate_size": 2 * hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": _HEADS,
        "num_key_value_heads": _KV_HEADS,
        "head_dim": _HEAD_DIM,
        "hidden_activation": "gelu_pytorch_tanh",
        "max_position_embeddings": 8192,
        "query_pre_attn_scalar": _HEAD_DIM,
        "layer_types": ["full_attention" if i % 2 else "sliding_attention" for i in range(layers)],
        "sliding_window": 4096,
        "rope_theta": 10000.0,
        "rms_norm_eps": 1e-6,
        "attention_bias": False,
        "attention_dropout": 0.0,
        "dropout_rate": 0.0,
        "attn_logit_softcapping": 50.0,
        "final_logit_softcapping": 30.0,
        "pad_token_id": 0,
        "eos_token_id": 1,
        "bos_token_id": 2,
        "torch_dtype": "bfloat16",
    }
    return {
        "architectures": ["T5GemmaForConditionalGeneration"],
        "model_type": "t5gemma",
        "is_encoder_decoder": True,
        "vocab_size": vocab_size,
        "dropout_rate": 0.0,
        "attention_dropout": 0.0,
        "pad_token_id": 0,
        "eos_token_id": 1,
        "bos_token_id": 2,
        "torch_dtype": "bfloat16",
        "encoder": module,
        "decoder": {**module, "is_decoder": True, "cross_attention_hidden_size": hidden},
    }


def _write_weights(folder: Path, config: dict[str, Any], seed: int, shards: int) -> None:
    from transformers import T5GemmaConfig, T5GemmaForConditionalGeneration

    with torch.device("meta"):
        model = T5GemmaForConditionalGeneration(T5GemmaConfig.from_dict(config))
    # The published files leave the output layer out: it is tied to the decoder's embedding.
    shapes = {n: t.shape for n, t in model.state_dict().items() if n.startswith("model.")}
    generator = torch.Generator().manual_seed(seed)
    tensors = {
        name: (
            torch.randn(shape, generator=generator) * (0.1 if len(shape) == 1 else shape[-1] ** -0.5)
        ).bfloat16()
        for name, shape in sorted(shapes.items())
    }
    encoder = [name for name in tensors if name.startswith("model.encoder.")]
    step = -(-len(encoder) // (shards - 1))
    parts = [encoder[i : i + step] for i in range(0, len(encoder), step)]
    parts.append([name for name in tensors if name.startswith("model.decoder.")])

    weight_map: dict[str, str] = {}
    for i, names in enumerate(parts, start=1):
        shard = f"model-{i:05d}-of-{len(parts):05d}.safetensors"
        with atomic_output(folder / shard) as temporary:
            save_tensors({name: tensors[name] for name in names}, temporary)
        weight_map |= dict.fromkeys(names, shard)
    index = {
        "metadata": {"total_size": sum(t.nbytes for t in tensors.values())},
        "weight_map": dict(sorted(weight_map.items())),
    }
    _write_json(folder / "model.safetensors.index.json", index)


def _merges() -> list[tuple[str, str]]:
    """Byte-pair merges that build each word from its left end."""
    steps = {(word[:i], word[i]): None for word in _WORDS for i in range(1, len(word))}
    return list(steps)


def _vocabulary() -> dict[str, int]:
    pieces = [*_SPECIAL, *(f"<0x{byte:02X}>" for byte in range(256))]
    pieces += sorted({letter for word in _WORDS for letter in word})
    pieces += [left + right for left, right in _merges()]
    return {piece: i for i, piece in enumerate(dict.fromkeys(pieces))}


def _write_tokenizer(folder: Path) -> None:
    """A Gemma tokenizer in miniature: byte-pair encoding that falls back to bytes, so no text is unknown."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

    vocabulary = _vocabulary()
    tokenizer = Tokenizer(
        models.BPE(
            vocab=vocabulary,
            merges=_merges(),
            unk_token="<unk>",
            fuse_unk=True,
            byte_fallback=True,
            dropout=None,
        )
    )
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", behavior="merged_with_previous")
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", vocabulary["<bos>"])]
    )
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in _SPECIAL])
    with atomic_output(folder / "tokenizer.json") as temporary:
        tokenizer.save(str(temporary))

    names = {f"{token.strip('<>')}_token": token for token in _SPECIAL}
    config = {
        "tokenizer_class": "GemmaTokenizer",
        "add_bos_token": True,
        "add_eos_token": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": 1000000000000000019884624838656,
        **names,
    }
    _write_json(folder / "tokenizer_config.json", config)
    _write_json(folder / "special_tokens_map.json", names)


def _write_json(path: Path, values: Any) -> None:
    with atomic_output(path) as temporary:
        temporary.write_text(json.dumps(values, indent=2), encoding="utf-8")
