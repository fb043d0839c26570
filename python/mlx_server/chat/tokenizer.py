"""Text to token ids and back, for a model directory's `tokenizer.json` or the vocabulary in a GGUF file."""

import re
import sys
from collections.abc import Collection, Sequence
from pathlib import Path

import tokenizers
from tokenizers.decoders import DecodeStream

from mlx_server.chat.gguf_tokenizer import token_of, tokenizer_from_gguf
from mlx_server.chat.template_source import TemplateSource, templates_of_directory, templates_of_gguf
from mlx_server.chat.token_bytes import TokenBytes
from mlx_server.checkpoint.gguf import read_gguf
from mlx_server.checkpoint.json_file import JsonObject, is_missing, read_optional_json, read_text
from mlx_server.checkpoint.model_config import (
    config_from_gguf,
    generation_defaults,
    gguf_end_token_ids,
    is_gguf,
    load_config,
)
from mlx_server.errors import InvalidRequestError, ModelLoadError

MAX_TOKENIZER_BYTES = 128 << 20

# Ends of an assistant's turn that templates write; not every model's config names its own.
_TURN_ENDS = ("<|im_end|>", "<|eot_id|>", "<end_of_turn>")
_NO_TEMPLATES = TemplateSource()

# An escaped special token is its number between two code points that Unicode reserves for use inside a program.
_OPEN, _CLOSE = "\ufdd0", "\ufdd1"
_ESCAPED = re.compile(f"{_OPEN}([0-9]{{1,6}}){_CLOSE}")
_BEFORE = "\n"  # merges with hardly anything


class Tokenizer:
    """A tokenizer. Never changed once it is loaded, so all threads of a process share one.

    Attributes:
        end_token_ids: what ends an answer, by the model's configs, its tokenizer and its chat template.
        templates: sources of the model's chat templates.
        bos_token, eos_token: as text, for the chat template.

    Args:
        num_embeddings: rows of the model's embedding. Tokens that were added to the vocabulary may lie beyond, such as
            Gemma 3's for images; a text with one of them is refused.
    """

    def __init__(
        self,
        tokenizer: tokenizers.Tokenizer,
        *,
        end_token_ids: Sequence[int] = (),
        templates: TemplateSource = _NO_TEMPLATES,
        bos_token: str | None = None,
        eos_token: str | None = None,
        num_embeddings: int | None = None,
    ) -> None:
        self._tokenizer = tokenizer
        self.templates = templates
        self.bos_token = bos_token
        self.eos_token = eos_token
        self._bos_id = None if bos_token is None else tokenizer.token_to_id(bos_token)
        self._num_embeddings = sys.maxsize if num_embeddings is None else num_embeddings
        ends = [token for token in _TURN_ENDS if token in (templates.default or "")]
        ids = {tokenizer.token_to_id(token) for token in [*ends, *([] if eos_token is None else [eos_token])]}
        reachable = {token_id for token_id in ids if token_id is not None and token_id < self._num_embeddings}
        self.end_token_ids = sorted({*end_token_ids, *reachable})
        added = tokenizer.get_added_tokens_decoder()
        special = {token.content for token in added.values() if token.special}
        self._special_ids = frozenset(token_id for token_id, token in added.items() if token.special)
        self._token_bytes = TokenBytes(tokenizer)
        self._escapable = [*sorted(special, key=len, reverse=True), _OPEN, _CLOSE]
        self._escape_index = {text: i for i, text in enumerate(self._escapable)}
        self._escape_pattern = re.compile("|".join(map(re.escape, self._escapable)))

    @staticmethod
    def load(path: Path) -> "Tokenizer":
        """The tokenizer of a model directory or a GGUF file. ModelLoadError says what is wrong with it."""
        return _load_gguf(path) if is_gguf(path) else _load_directory(path)

    def encode(self, text: str, *, add_special_tokens: bool = False) -> list[int]:
        """Token ids of `text`; with `add_special_tokens` those that the model wants around a prompt (BOS) too, once.

        Special tokens that `text` spells out become these tokens; `escape` prevents it. InvalidRequestError if the
        model has no embedding for a token.
        """
        ids = self._tokenizer.encode(text, add_special_tokens=add_special_tokens).ids
        if add_special_tokens and self._bos_id is not None and ids[:2] == [self._bos_id] * 2:
            del ids[0]  # the text begins with it, as a chat template's output does
        if (largest := max(ids, default=0)) >= self._num_embeddings:
            raise InvalidRequestError(f"the model can't read the token {self._tokenizer.id_to_token(largest)!r}")
        return ids

    def encode_chat(self, rendered: str) -> list[int]:
        """Token ids of a rendered chat template. A template writes BOS itself, so none is added.

        What `escape` made of users' texts becomes plain text again here.
        """
        first, *rest = _ESCAPED.split(rendered)  # template, number, template, number … template
        ids = self.encode(first)
        for i, piece in enumerate(rest):
            if i % 2 == 1:
                ids += self._encode_inside(piece)
            elif int(piece) < len(self._escapable):
                # No special token is one character long, so one by one they can't become one.
                ids += [token_id for char in self._escapable[int(piece)] for token_id in self._encode_inside(char)]
        return ids

    def escape(self, text: str) -> str:
        """`text` for use in a chat template: special tokens that a user spells out stay text in `encode_chat`."""
        return self._escape_pattern.sub(lambda match: f"{_OPEN}{self._escape_index[match[0]]}{_CLOSE}", text)

    def unescape(self, rendered: str) -> str:
        """A rendered chat template as people read it: what `escape` has replaced is there again."""
        return _ESCAPED.sub(lambda match: "".join(self._escapable[int(match[1]) :][:1]), rendered)

    def _encode_inside(self, text: str) -> list[int]:
        """Token ids of a text that is not the first: without the space that SentencePiece puts before a first one."""
        before = self._tokenizer.encode(_BEFORE, add_special_tokens=False).ids
        ids = self.encode(_BEFORE + text)
        return ids[len(before) :] if ids[: len(before)] == before else self.encode(text)

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=skip_special_tokens)

    def to_json(self) -> str:
        """As a tokenizer.json."""
        return self._tokenizer.to_str()

    def token_id(self, text: str) -> int | None:
        """The id of the token that is `text`, if there is one."""
        return self._tokenizer.token_to_id(text)

    def token_bytes(self, token_id: int) -> bytes:
        """The UTF-8 of one token, which may be part of a character; empty for an id without a token."""
        return self._token_bytes(token_id)

    def stream(self, *, after: Sequence[int] = (), keep: Collection[str] = ()) -> "TextStream":
        """Decodes one answer, token by token; special tokens have no text, but for those to `keep`.

        Args:
            after: the last tokens of the text that the answer continues, which tell whether a space begins it.
        """
        skipped_ids = self._special_ids - {self._tokenizer.token_to_id(token) for token in keep}
        return TextStream(self._tokenizer, skipped_ids, [token_id for token_id in after if token_id not in skipped_ids])


class TextStream:
    """Gives the text of tokens as they come, holding back a character until all its bytes are there."""

    # A character has at most 4 bytes; a much longer wait means that the bytes are no UTF-8.
    MAX_PENDING = 16

    def __init__(self, tokenizer: tokenizers.Tokenizer, skipped_ids: Collection[int], after: list[int]) -> None:
        self._tokenizer = tokenizer
        self._skipped_ids = skipped_ids
        self._stream = DecodeStream(after, skip_special_tokens=False)
        self._context = after  # tokens of the last text that was given: leading spaces depend on them
        self._pending: list[int] = []  # tokens whose text was not given yet

    def push(self, token_id: int) -> str:
        """The text that this token completes; often one word, sometimes nothing."""
        if token_id in self._skipped_ids:
            return ""
        self._pending.append(token_id)
        text = self._stream.step(self._tokenizer, token_id)
        if text is not None:
            self._context, self._pending = self._pending, []
            return text
        return self.finish() if len(self._pending) >= self.MAX_PENDING else ""

    def finish(self) -> str:
        """The text of what is left, with U+FFFD for bytes that are no whole character."""
        before = self._decode(self._context)
        text = self._decode(self._context + self._pending)[len(before) :]
        if self._pending:
            self._context, self._pending = self._pending, []
            self._stream = DecodeStream(self._context, skip_special_tokens=False)
        return text

    def _decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=False)


def _load_gguf(path: Path) -> Tokenizer:
    gguf = read_gguf(path)
    tokenizer = tokenizer_from_gguf(gguf)
    end_token_ids = gguf_end_token_ids(gguf)
    return Tokenizer(
        tokenizer,
        end_token_ids=end_token_ids,
        templates=templates_of_gguf(gguf),
        bos_token=token_of(gguf, "bos"),
        eos_token=token_of(gguf, "eos"),
        num_embeddings=_check_ids(path, tokenizer, end_token_ids, config_from_gguf(gguf)),
    )


def _load_directory(directory: Path) -> Tokenizer:
    path = directory / "tokenizer.json"
    config_path = directory / "tokenizer_config.json"
    config = read_optional_json(config_path)
    tokenizer = _read_tokenizer(path)
    end_token_ids = generation_defaults(directory).end_token_ids
    return Tokenizer(
        tokenizer,
        end_token_ids=end_token_ids,
        templates=templates_of_directory(directory, config),
        bos_token=_token_text(config_path, config, "bos_token"),
        eos_token=_token_text(config_path, config, "eos_token"),
        num_embeddings=_check_ids(path, tokenizer, end_token_ids, load_config(directory)),
    )


def _read_tokenizer(path: Path) -> tokenizers.Tokenizer:
    text = read_text(path, MAX_TOKENIZER_BYTES)
    if text is None:
        raise is_missing(path)
    try:
        tokenizer = tokenizers.Tokenizer.from_str(text)
    except Exception:  # noqa: BLE001 - the only type that the library raises
        raise ModelLoadError(f"{path} does not describe a tokenizer; download it again") from None
    ids = list(tokenizer.get_vocab(with_added_tokens=True).values())
    if len(set(ids)) != len(ids):
        raise ModelLoadError(f"{path} gives the same id to two tokens")
    # A tokenizer.json may hold what its training wanted; a prompt is neither cut nor filled up.
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def _check_ids(path: Path, tokenizer: tokenizers.Tokenizer, end_token_ids: Sequence[int], config: JsonObject) -> int:
    """The number of embeddings, after a check that there is one for each id of the vocabulary and each end token."""
    num_embeddings = config.get("vocab_size")
    if not isinstance(num_embeddings, int):
        raise ModelLoadError(f"{path.parent / 'config.json'}: vocab_size must be an integer")
    largest = max([*tokenizer.get_vocab(with_added_tokens=False).values(), *end_token_ids], default=0)
    if largest >= num_embeddings:
        raise ModelLoadError(f"{path}: token id {largest} is outside the model's vocabulary of {num_embeddings}")
    return num_embeddings


def _token_text(path: Path, config: JsonObject, key: str) -> str | None:
    """A special token of tokenizer_config.json: a string, an object with `content`, or null."""
    value = config.get(key)
    if isinstance(value, dict):
        value = value.get("content")
    if value is not None and not isinstance(value, str):
        raise ModelLoadError(f"{path}: {key} must be a string")
    return value
