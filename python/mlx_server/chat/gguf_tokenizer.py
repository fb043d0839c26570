"""Builds a tokenizer from the vocabulary in a GGUF file's metadata."""

from collections import defaultdict

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from mlx_server.checkpoint.gguf import GGUF
from mlx_server.errors import ModelLoadError

# Values of tokenizer.ggml.token_type
_UNKNOWN, _CONTROL, _USER_DEFINED = 2, 3, 4

_CONTRACTIONS = r"'s|'t|'re|'ve|'m|'ll|'d"
_GPT2 = rf"{_CONTRACTIONS}| ?\p{{L}}+| ?\p{{N}}+| ?[^\s\p{{L}}\p{{N}}]+|\s+(?!\S)|\s+"
_CL100K = (  # with the longest run of digits left to fill in
    rf"(?i:{_CONTRACTIONS})|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|%s| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_LLAMA3 = _CL100K % r"\p{N}{1,3}"
_QWEN2 = _CL100K % r"\p{N}"
_BIG, _SMALL = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_TEKKEN = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_BIG}*{_SMALL}+|[^\r\n\p{{L}}\p{{N}}]?{_BIG}+{_SMALL}*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

# tokenizer.ggml.pre -> the patterns that split text before byte-level BPE, each applied to the pieces of the one before
_PRE_TOKENIZERS = {
    "default": (r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", r"[0-9][0-9][0-9]"),
    "gpt-2": (_GPT2,),
    "smollm": (r"\p{N}", _GPT2),
    "starcoder": (r"\p{N}", _GPT2),
    "refact": (r"\p{N}", _GPT2),
    "llama-bpe": (_LLAMA3,),
    "qwen2": (_QWEN2,),
    "deepseek-r1-qwen": (_QWEN2,),
    "tekken": (_TEKKEN,),
}
# These take a word that is a token as it is, even if no merges lead to it, and begin prompts with BOS.
_WHOLE_WORDS = ("llama-bpe", "tekken")


def tokenizer_from_gguf(gguf: GGUF) -> Tokenizer:
    """The tokenizer that the metadata describes. ModelLoadError if it is inconsistent or of an unknown kind."""
    kind = gguf.require("tokenizer.ggml.model", str)
    tokens = gguf.require_list("tokenizer.ggml.tokens", str)
    vocab = {token: token_id for token_id, token in enumerate(tokens)}
    if len(vocab) != len(tokens):
        raise ModelLoadError(f"{gguf.path}: tokenizer.ggml.tokens has the same token twice")
    if kind == "gpt2":
        tokenizer, adds_bos = _byte_level_bpe(gguf, vocab)
    elif kind == "llama":
        tokenizer, adds_bos = _sentencepiece_bpe(gguf, vocab), True
    else:
        raise ModelLoadError(f"{gguf.path}: tokenizer {kind!r} is not supported (supported: gpt2, llama)")
    _add_special_tokens(gguf, tokenizer, tokens)
    _add_post_processor(gguf, tokenizer, tokens, adds_bos)
    return tokenizer


def token_of(gguf: GGUF, name: str) -> str | None:
    """The token whose id is `tokenizer.ggml.<name>_token_id`, such as `bos`; None if the file names none."""
    token_id = gguf.get(f"tokenizer.ggml.{name}_token_id", int)
    if token_id is None:
        return None
    tokens = gguf.require_list("tokenizer.ggml.tokens", str)
    if not 0 <= token_id < len(tokens):
        raise ModelLoadError(f"{gguf.path}: tokenizer.ggml.{name}_token_id is {token_id}, outside the vocabulary")
    return tokens[token_id]


def _byte_level_bpe(gguf: GGUF, vocab: dict[str, int]) -> tuple[Tokenizer, bool]:
    """A tokenizer in GPT-2's manner, and whether it begins prompts with BOS unless the file says otherwise."""
    pre = gguf.get("tokenizer.ggml.pre", str) or "default"
    if pre not in _PRE_TOKENIZERS:
        known = ", ".join(sorted(_PRE_TOKENIZERS))
        raise ModelLoadError(f"{gguf.path}: pre-tokenizer {pre!r} is not supported (supported: {known})")
    merges = [_split_merge(gguf, vocab, merge) for merge in gguf.require_list("tokenizer.ggml.merges", str)]
    whole_words = pre in _WHOLE_WORDS
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges, ignore_merges=whole_words))
    splits = [pre_tokenizers.Split(Regex(pattern), behavior="isolated") for pattern in _PRE_TOKENIZERS[pre]]
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*splits, byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    if _PRE_TOKENIZERS[pre] == (_QWEN2,):
        tokenizer.normalizer = normalizers.NFC()
    return tokenizer, whole_words


def _split_merge(gguf: GGUF, vocab: dict[str, int], merge: str) -> tuple[str, str]:
    left, _, right = merge.partition(" ")
    if left not in vocab or right not in vocab or left + right not in vocab:
        raise ModelLoadError(f"{gguf.path}: tokenizer.ggml.merges joins {merge!r}, which is not in the vocabulary")
    return left, right


def _sentencepiece_bpe(gguf: GGUF, vocab: dict[str, int]) -> Tokenizer:
    """A tokenizer in SentencePiece's manner: the pair whose union has the best score is joined first."""
    scores = gguf.require_list("tokenizer.ggml.scores", float)
    types = gguf.require_list("tokenizer.ggml.token_type", int)
    if not len(scores) == len(types) == len(vocab):
        raise ModelLoadError(f"{gguf.path}: tokenizer.ggml.scores and token_type must have an entry for each token")
    unknown = [token for token, token_id in vocab.items() if types[token_id] == _UNKNOWN]
    tokenizer = Tokenizer(
        models.BPE(
            vocab=vocab,
            merges=_merges_by_score(vocab, scores),
            unk_token=unknown[0] if unknown else None,
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    spaces = normalizers.Replace(" ", "▁")
    decoder = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    if gguf.get("tokenizer.ggml.add_space_prefix", bool) is False:
        tokenizer.normalizer = spaces
    else:
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), spaces])
        decoder.append(decoders.Strip(" ", 1, 0))
    tokenizer.decoder = decoders.Sequence(decoder)
    return tokenizer


def _merges_by_score(vocab: dict[str, int], scores: list[float]) -> list[tuple[str, str]]:
    """Every way to join two tokens into a third, best score of the third first."""
    merges: dict[str, list[tuple[str, str]]] = defaultdict(list)
    for token in vocab:
        for i in range(1, len(token)):
            if token[:i] in vocab and token[i:] in vocab:
                merges[token].append((token[:i], token[i:]))
    best_first = sorted(merges, key=lambda token: (-scores[vocab[token]], vocab[token]))
    return [pair for token in best_first for pair in sorted(merges[token], key=lambda pair: [vocab[p] for p in pair])]


def _add_special_tokens(gguf: GGUF, tokenizer: Tokenizer, tokens: list[str]) -> None:
    """Control and user-defined tokens are found in text before anything else."""
    types = gguf.get_list("tokenizer.ggml.token_type", int) or []
    added = [
        AddedToken(token, normalized=False, special=kind == _CONTROL)
        for token, kind in zip(tokens, types, strict=False)
        if kind in (_CONTROL, _USER_DEFINED) and token
    ]
    tokenizer.add_tokens(added)


def _add_post_processor(gguf: GGUF, tokenizer: Tokenizer, tokens: list[str], adds_bos: bool) -> None:
    """BOS before a prompt and EOS after it, where the file asks for that."""
    stated = gguf.get("tokenizer.ggml.add_bos_token", bool)
    bos = token_of(gguf, "bos") if (adds_bos if stated is None else stated) else None
    eos = token_of(gguf, "eos") if gguf.get("tokenizer.ggml.add_eos_token", bool) else None
    pieces = [("BOS", bos), ("$A", None), ("EOS", eos)]
    special_tokens = [
        {"id": name, "ids": [tokens.index(token)], "tokens": [token]} for name, token in pieces if token is not None
    ]
    if special_tokens:
        template = [name for name, token in pieces if name == "$A" or token is not None]
        tokenizer.post_processor = processors.TemplateProcessing(single=template, special_tokens=special_tokens)
