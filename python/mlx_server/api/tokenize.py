"""POST /tokenize, /detokenize and /apply-template, with vLLM's fields and llama.cpp's; vLLM's GET /tokenizer_info."""

from typing import Annotated, ClassVar, Literal

import falcon
import msgspec
from msgspec import Meta, Struct

from mlx_server.api.body import decode_body, name_ignored
from mlx_server.api.deps import Deps
from mlx_server.api.openai.chat_request import to_chat_request
from mlx_server.api.openai.types import ChatCompletionRequest, Message
from mlx_server.api.openapi import Operation
from mlx_server.chat.prompt import check_size, check_token_ids, render_chat
from mlx_server.errors import InvalidRequestError

_DEFAULT_NAME = "default"
_FIELDS_OF_CONTENT = ("add_special", "parse_special", "with_pieces")
_FIELDS_OF_PROMPT = ("add_special_tokens", "return_token_strs")


class TemplateRequest(ChatCompletionRequest, kw_only=True):
    """A chat completion's body: what changes its prompt has an effect, all else is only checked."""

    model: str | None = None  # type: ignore[assignment]  # required there


class TokenizeRequest(ChatCompletionRequest, kw_only=True):
    """One of `content` (llama.cpp's form), `prompt` and `messages` (vLLM's); with `messages` as in /apply-template.

    What belongs to another form is ignored, and named in a header.
    """

    model: str | None = None  # type: ignore[assignment]  # required there
    messages: Annotated[list[Message], Meta(max_length=4096)] | None = None  # type: ignore[assignment]
    prompt: str | None = None
    add_special_tokens: bool | None = None  # BOS and the like; null: to a prompt, while templates write them themselves
    return_token_strs: bool | None = None
    content: str | None = None
    add_special: bool | None = None  # as add_special_tokens; null: no
    parse_special: bool | None = None  # false: special tokens that the content spells out stay text
    with_pieces: bool | None = None


class Tokenized(Struct):
    """vLLM's form."""

    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None = None  # bytes that are no whole character are U+FFFD


class TokenPiece(Struct):
    id: int
    piece: str | list[int]  # bytes, where they are no whole characters


class TokenizedContent(Struct):
    """llama.cpp's form."""

    tokens: list[int | TokenPiece]


class DetokenizeRequest(Struct):
    tokens: list[int]
    model: str | None = None


class Detokenized(Struct):
    """The text, under both servers' names."""

    prompt: str
    content: str


class TemplateApplied(Struct):
    prompt: str


class TokenizerInfo(Struct, kw_only=True):
    """vLLM's form, which is that of tokenizer_config.json."""

    tokenizer_class: Literal["PreTrainedTokenizerFast"] = (
        "PreTrainedTokenizerFast"  # transformers' for any tokenizer.json
    )
    bos_token: str | None
    eos_token: str | None
    chat_template: str | None
    model_max_length: int


class Tokenize:
    """Texts and conversations as the model reads them."""

    operations: ClassVar = {
        "POST": Operation(
            summary="Tokens of a text or a conversation", request=TokenizeRequest, answer=(Tokenized, TokenizedContent)
        )
    }

    def __init__(self, deps: Deps) -> None:
        self._deps = deps
        self._decoder = msgspec.json.Decoder(TokenizeRequest)

    def on_post(self, req: falcon.Request, resp: falcon.Response) -> None:
        body = decode_body(req, resp, self._decoder, strict=self._deps.strict)
        self._deps.check_model(body.model or _DEFAULT_NAME)
        given = [name for name in ("content", "prompt", "messages") if getattr(body, name) not in (None, [])]
        if len(given) != 1:
            fault = "One of `content`, `prompt` and `messages` must be given."
            raise InvalidRequestError(fault, param=given[1] if given else "prompt")
        name_ignored(resp, _of_other_forms(body, given[0]), strict=self._deps.strict)
        resp.content_type = "application/json"
        if body.content is not None:
            resp.data = msgspec.json.encode(self._of_content(body, body.content))
        elif body.prompt is not None:
            add_special = body.add_special_tokens is not False
            resp.data = msgspec.json.encode(self._tokenized(body, self._encode(body.prompt, "prompt", add_special)))
        else:
            resp.data = msgspec.json.encode(self._of_messages(body))

    def _of_content(self, body: TokenizeRequest, content: str) -> TokenizedContent:
        tokenizer = self._deps.model.tokenizer
        if body.parse_special is False:
            check_size(content, self._deps.engine.info(), "content")
            bos = tokenizer.encode("", add_special_tokens=True) if body.add_special else []
            token_ids = bos + tokenizer.encode_chat(tokenizer.escape(content))
        else:
            token_ids = self._encode(content, "content", bool(body.add_special))
        if not body.with_pieces:
            return TokenizedContent([*token_ids])
        return TokenizedContent(
            [TokenPiece(token_id, _piece(tokenizer.token_bytes(token_id))) for token_id in token_ids]
        )

    def _of_messages(self, body: TokenizeRequest) -> Tokenized:
        text = _render(self._deps, body)
        check_size(text, self._deps.engine.info(), "messages")
        tokenizer = self._deps.model.tokenizer
        bos = tokenizer.encode("", add_special_tokens=True) if body.add_special_tokens else []
        return self._tokenized(body, bos + tokenizer.encode_chat(text))

    def _encode(self, text: str, param: str, add_special_tokens: bool) -> list[int]:
        check_size(text, self._deps.engine.info(), param)
        return self._deps.model.tokenizer.encode(text, add_special_tokens=add_special_tokens)

    def _tokenized(self, body: TokenizeRequest, token_ids: list[int]) -> Tokenized:
        strings = None
        if body.return_token_strs:
            tokenizer = self._deps.model.tokenizer
            strings = [tokenizer.token_bytes(token_id).decode("utf-8", "replace") for token_id in token_ids]
        return Tokenized(len(token_ids), self._deps.engine.info().context_length, token_ids, strings)


def _of_other_forms(body: TokenizeRequest, form: str) -> list[str]:
    """The fields that are given and have no meaning where the text is in `form`."""
    given = [name for name in body.__struct_fields__ if getattr(body, name) not in (None, [])]
    if form == "messages":
        return [name for name in given if name in ("content", "prompt", *_FIELDS_OF_CONTENT)]
    own = _FIELDS_OF_CONTENT if form == "content" else _FIELDS_OF_PROMPT
    return [name for name in given if name not in ("model", form, *own)]


class Detokenize:
    """The text of tokens, special ones included."""

    operations: ClassVar = {
        "POST": Operation(summary="The text of tokens", request=DetokenizeRequest, answer=Detokenized)
    }

    def __init__(self, deps: Deps) -> None:
        self._deps = deps
        self._decoder = msgspec.json.Decoder(DetokenizeRequest)

    def on_post(self, req: falcon.Request, resp: falcon.Response) -> None:
        body = decode_body(req, resp, self._decoder, strict=self._deps.strict)
        self._deps.check_model(body.model or _DEFAULT_NAME)
        check_token_ids(body.tokens, self._deps.engine.info(), "tokens")
        text = self._deps.model.tokenizer.decode(body.tokens, skip_special_tokens=False)
        resp.content_type = "application/json"
        resp.data = msgspec.json.encode(Detokenized(text, text))


class DescribeTokenizer:
    """Special tokens and the chat template: lm-eval then needs no tokenizer of its own."""

    operations: ClassVar = {"GET": Operation(summary="Special tokens and chat template", answer=TokenizerInfo)}

    def __init__(self, deps: Deps) -> None:
        self._deps = deps

    def on_get(self, _req: falcon.Request, resp: falcon.Response) -> None:
        tokenizer = self._deps.model.tokenizer
        resp.content_type = "application/json"
        resp.data = msgspec.json.encode(
            TokenizerInfo(
                bos_token=tokenizer.bos_token,
                eos_token=tokenizer.eos_token,
                chat_template=tokenizer.templates.default,
                model_max_length=self._deps.engine.info().context_length,
            )
        )


class ApplyTemplate:
    """A conversation as the model's chat template writes it."""

    operations: ClassVar = {
        "POST": Operation(summary="A conversation's prompt as text", request=TemplateRequest, answer=TemplateApplied)
    }

    def __init__(self, deps: Deps) -> None:
        self._deps = deps
        self._decoder = msgspec.json.Decoder(TemplateRequest)

    def on_post(self, req: falcon.Request, resp: falcon.Response) -> None:
        body = decode_body(req, resp, self._decoder, strict=self._deps.strict)
        self._deps.check_model(body.model or _DEFAULT_NAME)
        resp.content_type = "application/json"
        resp.data = msgspec.json.encode(TemplateApplied(self._shown(_render(self._deps, body))))

    def _shown(self, rendered: str) -> str:
        return self._deps.model.tokenizer.unescape(rendered)


def _render(deps: Deps, body: ChatCompletionRequest) -> str:
    return render_chat(deps.model, to_chat_request(body, deps.model, deps.engine.info(), deps.max_tokens)).text


def _piece(utf8: bytes) -> str | list[int]:
    try:
        return utf8.decode()
    except UnicodeDecodeError:
        return list(utf8)
