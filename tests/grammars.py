"""A vocabulary of 320 tokens, as many as the tiny models have, and grammars for it."""

import time

from llguidance import LLTokenizer, TokenizerWrapper

from mlx_server.engine.grammar import Grammars, OutputGrammar

END = 2
_WORDS = [
    "{",
    '{"',
    '":',
    '": ',
    '",',
    '", "',
    "true",
    "false",
    "null",
    "[]",
    "name",
    "ab",
    "abc",
    "red",
    "green",
    "12",
]
_FIRST = [b"<pad>", b"<bos>", b"<end>", *(word.encode() for word in _WORDS)]
TOKENS = (*_FIRST, *(b"<%d>" % i for i in range(len(_FIRST), 64)), *(bytes([i]) for i in range(256)))


class Vocabulary:
    """Three special tokens, some words, then all bytes."""

    eos_token_id = END
    bos_token_id = 1
    special_token_ids = (0, 1, END)
    tokens = TOKENS

    def __call__(self, text: bytes | str) -> list[int]:
        """The longest token each time."""
        rest = text if isinstance(text, bytes) else text.encode()
        ids = []
        while rest:
            best = max((t for t in TOKENS[3:] if rest.startswith(t)), key=len)
            ids.append(TOKENS.index(best))
            rest = rest[len(best) :]
        return ids


def text_of(token_ids: list[int]) -> str:
    return b"".join(TOKENS[token_id] for token_id in token_ids).decode()


class TinyGrammars(Grammars):
    """Compiles at once, so that a test does not depend on a thread's speed."""

    def __init__(self, vocab_size: int) -> None:
        super().__init__(lambda: LLTokenizer(TokenizerWrapper(Vocabulary())), vocab_size)

    def compile(self, grammar: str, end_token_ids: frozenset[int]) -> OutputGrammar:
        compiled = super().compile(grammar, end_token_ids)
        while not compiled.is_ready:
            time.sleep(0.0001)
        return compiled
