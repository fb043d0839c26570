"""The bytes of single tokens, which may be parts of characters."""

import re

import tokenizers

_BYTE = re.compile(r"<0x([0-9A-F]{2})>")
_SPACE = "\N{LOWER ONE EIGHTH BLOCK}"  # how SentencePiece writes a space


def _byte_level_alphabet() -> dict[str, int]:
    """The characters by which GPT-2's byte-level BPE writes bytes: themselves if visible, else those from U+0100 on."""
    visible = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in visible]
    return {chr(byte): byte for byte in visible} | {chr(0x100 + i): byte for i, byte in enumerate(others)}


_BYTE_LEVEL = _byte_level_alphabet()


class TokenBytes:
    """Looks up the bytes of a token of `tokenizer`."""

    def __init__(self, tokenizer: tokenizers.Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._added = {token_id: token.content for token_id, token in tokenizer.get_added_tokens_decoder().items()}
        decoder = tokenizer.decoder
        self._is_byte_level = decoder is not None and b'"ByteLevel"' in decoder.__getstate__()

    def __call__(self, token_id: int) -> bytes:
        """Empty for an id without a token."""
        if (content := self._added.get(token_id)) is not None:
            return content.encode()
        token = self._tokenizer.id_to_token(token_id)
        if token is None:
            return b""
        if self._is_byte_level:
            return bytes(_BYTE_LEVEL[char] for char in token if char in _BYTE_LEVEL)
        if match := _BYTE.fullmatch(token):
            return bytes.fromhex(match[1])
        return token.replace(_SPACE, " ").encode()
