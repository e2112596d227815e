"""Prompts to embeddings: the encoder of `google/t5gemma-9b-9b-ul2`, in transformers (MODEL.md section 5)."""

from __future__ import annotations

import logging
import os
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from importlib.resources import files
from math import prod
from pathlib import Path
from typing import Any

import torch

from ..errors import CheckpointError, InputError
from ..model.config import MAX_TEXT_TOKENS
from ..model.weights import open_checkpoint, read_json, require_file, unreadable

logger = logging.getLogger(__name__)

_PREFIX = "model.encoder."
_CACHED_PROMPTS = 16
_OPTIONAL_TOKENIZER_FILES = ("special_tokens_map.json", "added_tokens.json")
_LOGIT_CAP = 50.0  # of the attention logits, tanh-shaped


@dataclass(frozen=True, eq=False)
class TextEmbedding:
    """One encoded prompt: its true rows only, since rows beyond them never become tokens."""

    hidden: torch.Tensor  # (num_tokens, C) float32, values rounded to float16
    num_tokens: int


def load_negative_prompt() -> str:
    """The fixed prompt of the guidance branch, exactly as published."""
    return files(__package__).joinpath("negative_prompt.txt").read_text(encoding="utf-8")


class TextEncoder:
    """Turns prompts into `TextEmbedding`s, which stay on the encoder's device; the last 16 are kept.

    A returned embedding may be handed out again for the same prompt: do not write into it.
    """

    def __init__(self, path: Path, tokenizer: Any, model: Any) -> None:
        """Put loaded parts together; `from_pretrained` is the usual way."""
        self.path = path
        self.hidden_size: int = model.encoder.config.hidden_size
        self._max_positions: int = model.encoder.config.max_position_embeddings
        self._tokenizer, self._model = tokenizer, model
        self._cache: OrderedDict[str, TextEmbedding] = OrderedDict()
        self._lock = threading.Lock()

    @classmethod
    def from_pretrained(
        cls,
        folder: str | os.PathLike[str],
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.bfloat16,
    ) -> TextEncoder:
        """Load a local folder in the layout of `google/t5gemma-9b-9b-ul2`; nothing is ever downloaded.

        Only the shards that hold `model.encoder.*` are needed. Each tensor goes straight to `device`, cast to
        `dtype` once, so the peak is the encoder's own size plus one tensor.

        Raises:
            CheckpointError: a file is missing or invalid, or a key or shape is not as the config asks.
        """
        folder, device = Path(folder), torch.device(device)
        config_file = folder / "config.json"
        model = _meta_model(config_file, read_json(config_file))
        encoder_config = model.encoder.config
        tokenizer = _load_tokenizer(folder, vocab_size=encoder_config.vocab_size)

        expected = {f"model.{name}": tuple(t.shape) for name, t in model.state_dict().items()}
        checkpoint = open_checkpoint(folder, prefix=_PREFIX)
        checkpoint.check(expected, "T5Gemma encoder")
        for name, entry in checkpoint.entries.items():
            if not entry.dtype.is_floating_point:
                raise CheckpointError(f"{entry.file}: {name} expected floating point, got {entry.dtype}")
        state = {
            name.removeprefix("model."): tensor.to(device=device, dtype=dtype, copy=True)
            for name, tensor in checkpoint.tensors(expected)
        }
        model.load_state_dict(state, assign=True)
        # Rotary frequencies are computed, not stored: built on the meta device they hold no values.
        with torch.device(device):
            model.encoder.rotary_emb = type(model.encoder.rotary_emb)(config=encoder_config)
        model.eval().requires_grad_(False)
        return cls(folder, tokenizer, model)

    @property
    def device(self) -> torch.device:
        """Where the weights are; "meta" where they are on disk."""
        return next(self._model.parameters()).device

    @staticmethod
    def weight_bytes(folder: str | os.PathLike[str], dtype: torch.dtype = torch.bfloat16) -> int:
        """Memory that the encoder in `folder` takes in `dtype`, from its files' headers alone."""
        entries = open_checkpoint(Path(folder), prefix=_PREFIX).entries.values()
        return sum(prod(entry.shape) for entry in entries) * dtype.itemsize

    def loaded(self) -> AbstractContextManager[TextEncoder]:
        """The encoder, for as long as prompts are to be encoded: here simply itself."""
        return nullcontext(self)

    @torch.no_grad()
    def encode(self, prompt: str, *, name: str = "prompt") -> TextEmbedding:
        """Encode one prompt, without padding or truncation; of the result the first 640 rows are kept.

        `name` is what messages call it.

        Raises:
            InputError: the prompt is empty, not valid text, or longer than the encoder's positions.
        """
        _require_text(prompt, name)
        with self._lock:
            if prompt in self._cache:
                self._cache.move_to_end(prompt)
                return self._cache[prompt]
        embedding = self._encode(prompt, name)
        with self._lock:
            self._cache[prompt] = embedding
            if len(self._cache) > _CACHED_PROMPTS:
                self._cache.popitem(last=False)
        return embedding

    def tokens(self, prompt: str, *, name: str = "prompt") -> list[int]:
        """The ids of a prompt's tokens, which needs no weights.

        Raises:
            InputError: as of `encode`.
        """
        _require_text(prompt, name)
        try:
            prompt.encode("utf-8")
        except UnicodeEncodeError as error:
            raise InputError(f"{name}: expected valid Unicode text: {error}") from error
        ids: list[int] = self._tokenizer(prompt, padding=False, truncation=False, verbose=False)["input_ids"]
        if len(ids) > self._max_positions:
            raise InputError(f"{name}: expected at most {self._max_positions} tokens, got {len(ids)}")
        return ids

    def _encode(self, prompt: str, name: str) -> TextEmbedding:
        ids = self.tokens(prompt, name=name)
        input_ids = torch.tensor([ids], device=self.device)
        # Given explicitly: left out, transformers would mask a token spelled "<pad>" in the prompt.
        mask = torch.ones_like(input_ids)
        hidden = self._model(input_ids=input_ids, attention_mask=mask).last_hidden_state[0]
        if len(ids) > MAX_TEXT_TOKENS:
            logger.warning("%s has %d tokens; only the first %d are used", name, len(ids), MAX_TEXT_TOKENS)
        hidden = hidden[:MAX_TEXT_TOKENS].to(torch.float16).to(torch.float32)
        return TextEmbedding(hidden, hidden.shape[0])


class TextEncoderOnDisk(TextEncoder):
    """A text encoder that is on its device only while it encodes; the last 16 prompts need no loading."""

    _load: Callable[[], TextEncoder]

    def __init__(self, path: Path, tokenizer: Any, model: Any) -> None:
        super().__init__(path, tokenizer, model)
        self._block = threading.RLock()
        self._depth = 0
        self._loaded: TextEncoder | None = None

    @classmethod
    def from_pretrained(
        cls,
        folder: str | os.PathLike[str],
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.bfloat16,
    ) -> TextEncoderOnDisk:
        """As `TextEncoder.from_pretrained`, but reads headers and tokenizer only, which finds most faults."""
        encoder = super().from_pretrained(folder, device="meta", dtype=dtype)
        assert isinstance(encoder, cls)
        encoder._load = partial(TextEncoder.from_pretrained, folder, device=device, dtype=dtype)
        return encoder

    @contextmanager
    def loaded(self) -> Iterator[TextEncoder]:
        """Within the block all prompts share one loading, which the first that is not known yet brings about."""
        with self._block:
            self._depth += 1
            try:
                yield self
            finally:
                self._depth -= 1
                if self._depth == 0 and self._loaded is not None:
                    self._loaded = None
                    if torch.cuda.is_initialized():
                        torch.cuda.empty_cache()  # room for whatever is allocated otherwise

    def encode(self, prompt: str, *, name: str = "prompt") -> TextEmbedding:
        with self.loaded():
            return super().encode(prompt, name=name)

    def _encode(self, prompt: str, name: str) -> TextEmbedding:
        if self._loaded is None:
            self._loaded = self._load()
        return self._loaded._encode(prompt, name)


def _require_text(prompt: object, name: str) -> None:
    if not isinstance(prompt, str) or not prompt.strip():
        raise InputError(f"{name}: expected text, got {prompt!r}")


def _meta_model(config_file: Path, values: Any) -> Any:
    """The encoder without storage, from the published encoder-decoder config."""
    from transformers import AutoModelForTextEncoding, T5GemmaConfig

    model_type = values.get("model_type") if isinstance(values, Mapping) else None
    if model_type != "t5gemma":
        raise CheckpointError(f"{config_file}: expected model_type 't5gemma', got {model_type!r}")
    try:
        config = T5GemmaConfig.from_dict(dict(values), is_encoder_decoder=False)
        with torch.device("meta"):
            # Eager is the implementation that caps the attention logits.
            model = AutoModelForTextEncoding.from_config(config, attn_implementation="eager")
    except Exception as error:  # the library validates piecemeal: any exception type can come of a bad value
        raise CheckpointError(f"{config_file}: expected a T5Gemma config: {error!r}") from error
    cap = model.encoder.config.attn_logit_softcapping
    if cap != _LOGIT_CAP:
        raise CheckpointError(f"{config_file}: expected attn_logit_softcapping {_LOGIT_CAP}, got {cap}")
    return model


def _load_tokenizer(folder: Path, *, vocab_size: int) -> Any:
    from transformers import AutoTokenizer

    tokenizer_file = require_file(folder / "tokenizer.json")
    read_json(folder / "tokenizer_config.json")
    for name in _OPTIONAL_TOKENIZER_FILES:  # read by the library wherever they are
        if os.path.lexists(folder / name):
            read_json(folder / name)
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            str(folder.resolve()), local_files_only=True, trust_remote_code=False
        )
    except Exception as error:  # the tokenizers library raises bare `Exception`
        raise unreadable(tokenizer_file, "a tokenizer", repr(error)) from error
    largest = max(tokenizer.get_vocab().values())
    if largest >= vocab_size:
        raise CheckpointError(
            f"{tokenizer_file}: expected token ids below the encoder's vocab_size {vocab_size}, got {largest}"
        )
    return tokenizer
