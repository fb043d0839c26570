"""Writes data/real_models.json: token ids and rendered conversations of real models, by other implementations.

    python tests/chat/make_goldens.py   # with tests and python on PYTHONPATH, transformers 5.23 and regex installed

Token ids come from the few lines of BPE below, which share no code with the tokenizers library; rendered conversations
from transformers.
"""

import json
import unicodedata
from itertools import pairwise
from pathlib import Path
from typing import Any

import regex
from transformers.utils.chat_template_utils import render_jinja_template

from conversations import CONVERSATIONS
from mlx_server.checkpoint.demo import fetch_demo
from mlx_server.checkpoint.gguf import read_gguf
from mlx_server.checkpoint.progress import NoProgress
from real_tokenizers import REAL_TOKENIZERS, model_directory

DATA = Path(__file__).parent / "data"
TEXTS = [
    *json.loads((DATA / "token_ids.json").read_text())["texts"],
    "👩‍👩‍👧‍👦 🏳️‍🌈 🇨🇭🇯🇵 👍🏽 1️⃣",
    "ḱ̲ Å Å e\u0301 नमस्ते ไทยกำลัง תּוֹרָה",
    "مرحبا بالعالم، كيف الحال؟ \u200fالعربية",  # noqa: RUF001
    "漢字かな交じり文𠮷野家。한국어 텍스트",
    "x = {'a': [1, 22, 333, 4444]}\n\n\n\tif x:  \r\n    pass",
]


def byte_alphabet() -> list[str]:
    """GPT-2's printable character for each byte."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    rest = [byte for byte in range(256) if byte not in printable]
    return [chr(byte if byte in printable else 256 + rest.index(byte)) for byte in range(256)]


class Reference:
    """Byte-pair encoding as its paper has it: join the pair that was learnt first, until there is none."""

    def __init__(self, directory: Path) -> None:
        spec = json.loads((directory / "tokenizer.json").read_text())
        self.vocab: dict[str, int] = spec["model"]["vocab"]
        merges = [tuple(merge.split(" ") if isinstance(merge, str) else merge) for merge in spec["model"]["merges"]]
        self.ranks = {pair: rank for rank, pair in enumerate(merges)}
        self.takes_whole_words = spec["model"].get("ignore_merges", False)
        self.added = {token["content"]: token["id"] for token in spec["added_tokens"]}
        self.added_pattern = regex.compile("|".join(map(regex.escape, sorted(self.added, key=len, reverse=True))))
        self.is_sentencepiece = spec["model"].get("byte_fallback", False)
        if not self.is_sentencepiece:
            self.words = regex.compile(spec["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"])
        self.composes = (spec["normalizer"] or {}).get("type") == "NFC"
        self.alphabet = byte_alphabet()

    def encode(self, text: str) -> list[int]:
        ids, start = [], 0
        for match in self.added_pattern.finditer(text):
            ids += [*self.plain(text[start : match.start()]), self.added[match[0]]]
            start = match.end()
        return ids + self.plain(text[start:])

    def plain(self, text: str) -> list[int]:
        if self.composes:
            text = unicodedata.normalize("NFC", text)
        if self.is_sentencepiece:
            return [token_id for piece in self.join(list(text.replace(" ", "▁"))) for token_id in self.ids_of(piece)]
        ids = []
        for match in self.words.finditer(text):
            word = "".join(self.alphabet[byte] for byte in match[0].encode())
            whole = self.takes_whole_words and word in self.vocab
            ids += [self.vocab[piece] for piece in ([word] if whole else self.join(list(word)))]
        return ids

    def ids_of(self, piece: str) -> list[int]:
        return [self.vocab[piece]] if piece in self.vocab else [self.vocab[f"<0x{b:02X}>"] for b in piece.encode()]

    def join(self, pieces: list[str]) -> list[str]:
        while pairs := [pair for pair in pairwise(pieces) if pair in self.ranks]:
            best = min(pairs, key=self.ranks.__getitem__)
            i = next(i for i, pair in enumerate(pairwise(pieces)) if pair == best)
            pieces[i : i + 2] = ["".join(best)]
        return pieces


def rendered(template: str, tokens: dict[str, str]) -> dict[str, str | None]:
    """Conversations as transformers renders them; None where the template refuses."""
    texts: dict[str, str | None] = {}
    for name, conversation in CONVERSATIONS.items():
        try:
            results, _ = render_jinja_template(
                [conversation.messages],
                tools=conversation.tools,
                chat_template=template,
                add_generation_prompt=conversation.add_generation_prompt,
                **conversation.template_kwargs,
                **tokens,
            )
            texts[name] = results[0]
        except Exception:  # noqa: BLE001 - whatever a template raises
            texts[name] = None
    return texts


def golden(name: str) -> dict[str, Any]:
    directory = model_directory(name)
    config = json.loads((directory / "tokenizer_config.json").read_text())
    reference = Reference(directory)
    prompts = rendered(config["chat_template"], {key: config[key] or "" for key in ("bos_token", "eos_token")})
    return {
        "token_ids": [reference.encode(text) for text in TEXTS],
        "rendered": prompts,
        "prompt_token_ids": reference.encode(prompts["turns"] or ""),
    }


def main() -> None:
    goldens: dict[str, Any] = {"texts": TEXTS} | {name: golden(name) for name in REAL_TOKENIZERS}
    demo = read_gguf(fetch_demo(NoProgress())).require("tokenizer.chat_template", str)
    goldens["smollm2"] = {"rendered": rendered(demo, {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>"})}
    lines = (f"{json.dumps(key)}: {json.dumps(value, ensure_ascii=False)}" for key, value in goldens.items())
    (DATA / "real_models.json").write_text("{\n" + ",\n".join(lines) + "\n}\n", "utf-8")


if __name__ == "__main__":
    main()
