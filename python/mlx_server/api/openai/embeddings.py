"""POST /v1/embeddings."""

import base64
from typing import Annotated, ClassVar, Literal

import falcon
import msgspec
import numpy as np
import numpy.typing as npt
from msgspec import Meta, Struct

from mlx_server.api.body import decode_body
from mlx_server.api.deps import Deps
from mlx_server.api.openapi import Operation
from mlx_server.api.sse import CLIENT_CHECK_S, Client
from mlx_server.chat.embedding import EmbeddingRun
from mlx_server.chat.prompt import check_length, check_size, check_token_ids
from mlx_server.errors import InvalidRequestError

_MAX_INPUTS = 2048

Vector = npt.NDArray[np.float32]


class EmbeddingRequest(Struct):
    """Of a text, of token ids, or of up to 2048 of either. `user` is accepted without effect."""

    model: str
    input: str | Annotated[list[str | int | list[int]], Meta(min_length=1)]
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: Annotated[int, Meta(ge=1)] | None = None
    user: str | None = None


class Embedding(Struct, kw_only=True):
    object: Literal["embedding"] = "embedding"
    index: int
    embedding: list[float] | str


class EmbeddingUsage(Struct):
    prompt_tokens: int
    total_tokens: int


class EmbeddingList(Struct, kw_only=True):
    object: Literal["list"] = "list"
    data: list[Embedding]
    model: str
    usage: EmbeddingUsage


class Embeddings:
    """The resource."""

    operations: ClassVar = {
        "POST": Operation(summary="Vectors of texts", request=EmbeddingRequest, answer=EmbeddingList)
    }

    def __init__(self, deps: Deps) -> None:
        self._deps = deps
        self._decoder = msgspec.json.Decoder(EmbeddingRequest)

    def on_post(self, req: falcon.Request, resp: falcon.Response) -> None:
        deps = self._deps
        body = decode_body(req, resp, self._decoder, strict=deps.strict)
        deps.check_model(body.model)
        if (pooling := deps.model.pooling) is None:
            fault = "This model's embeddings need more than a pooling of hidden states, which is not supported."
            raise InvalidRequestError(fault, param="model", code="unsupported")
        texts = [self._to_token_ids(text, path) for path, text in _inputs(body.input)]
        client = Client(req)
        run = EmbeddingRun(deps.engine, texts, pooling=pooling, client=req.remote_addr, timeout_s=deps.timeout_s)
        try:
            while not run.finished:
                client.check()
                run.poll(CLIENT_CHECK_S)
        finally:
            run.close()
        resp.content_type = "application/json"
        resp.data = msgspec.json.encode(to_answer(body, run.vectors, sum(map(len, texts))))

    def _to_token_ids(self, text: str | list[int], path: str) -> list[int]:
        info = self._deps.engine.info()
        if isinstance(text, str):
            check_size(text, info, path)
            token_ids = self._deps.model.tokenizer.encode(text, add_special_tokens=True)
        else:
            check_token_ids(text, info, path)
            token_ids = text
        check_length(token_ids, info, path, room=0)
        return token_ids


def _inputs(value: str | list[str | int | list[int]]) -> list[tuple[str, str | list[int]]]:
    """Each text, or its token ids, with its path."""
    if isinstance(value, str):
        return [("input", _not_empty(value, "input"))]
    numbers = [item for item in value if isinstance(item, int)]
    if len(numbers) == len(value):
        return [("input", numbers)]
    if numbers or len({type(item) for item in value}) > 1:
        fault = "`input` must be a text, token ids, a list of texts or a list of lists of token ids."
        raise InvalidRequestError(fault, param="input")
    if len(value) > _MAX_INPUTS:
        raise InvalidRequestError(f"`input` has {len(value)} texts, more than {_MAX_INPUTS}.", param="input")
    paths = (f"input[{i}]" for i in range(len(value)))
    return [
        (path, _not_empty(text, path)) for path, text in zip(paths, value, strict=True) if not isinstance(text, int)
    ]


def _not_empty(text: str | list[int], path: str) -> str | list[int]:
    if not text:
        raise InvalidRequestError(f"`{path}` is empty.", param=path)
    return text


def to_answer(body: EmbeddingRequest, vectors: list[Vector], num_tokens: int) -> EmbeddingList:
    """InvalidRequestError if there are fewer dimensions than asked for."""
    if body.dimensions is not None:
        vectors = [_shorten(vector, body.dimensions) for vector in vectors]
    as_text = body.encoding_format == "base64"
    data = [
        Embedding(index=i, embedding=_to_base64(vector) if as_text else vector.tolist())
        for i, vector in enumerate(vectors)
    ]
    return EmbeddingList(data=data, model=body.model, usage=EmbeddingUsage(num_tokens, num_tokens))


def _to_base64(vector: Vector) -> str:
    return base64.b64encode(vector.astype("<f4").tobytes()).decode()


def _shorten(vector: Vector, dimensions: int) -> Vector:
    """Its first dimensions, of length 1 again."""
    if dimensions > len(vector):
        fault = f"`dimensions` is {dimensions}, but the model's embeddings have {len(vector)}."
        raise InvalidRequestError(fault, param="dimensions")
    cut = vector[:dimensions]
    length = float(np.linalg.norm(cut))
    return cut / np.float32(length) if length else cut
