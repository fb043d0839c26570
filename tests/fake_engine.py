"""Stand-ins that let the API side run without a model: an engine that follows a script, and a tokenizer of bytes."""

import codecs
import contextlib
import dataclasses
import queue
import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import falcon.testing
import msgspec
import numpy as np
import numpy.typing as npt
import zmq

from mlx_server.api.app import create_app
from mlx_server.api.deps import Deps
from mlx_server.api.middleware import AccessLog
from mlx_server.api.openai.responses_store import ResponseStore
from mlx_server.chat.served_model import ServedModel
from mlx_server.chat.template_source import TemplateSource
from mlx_server.engine_client import EngineClient
from mlx_server.errors import OverloadedError
from mlx_server.sampling_params import SamplingParams
from mlx_server.wire import (
    Cancel,
    ClientMessage,
    Embed,
    Embedded,
    EngineInfo,
    Failed,
    Finished,
    GetMetrics,
    Hello,
    Metrics,
    Progress,
    RequestOutput,
    StepOutput,
    Submit,
    Timings,
    TokenLogprobs,
    Tokens,
)

Post = Callable[..., falcon.testing.Result]  # a fixture: posts a chat completion request with the fields given

END = 256  # the end token; 0…255 are the bytes
TIMINGS = Timings(0.25, 0.5, 1.0)
Script = Callable[[Submit], Iterator[RequestOutput | None]]  # an output a step; None: nothing in this step


def until(condition: Callable[[], object], timeout_s: float = 10.0) -> None:
    """Wait until something is so; fail if it takes too long."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.002)


def answer(text: str | bytes = "Hello!", *, num_cached: int = 0, timings: Timings = TIMINGS) -> Script:
    """Each byte of the text as a token of its own, then the end; cut at the request's max_tokens."""
    data = text.encode() if isinstance(text, str) else text

    def script(submit: Submit) -> Iterator[RequestOutput]:
        num_prompt = len(submit.prompt_token_ids)
        if submit.progress:
            yield Progress(submit.request_id, num_prompt, num_cached, num_prompt)
        token_ids = [*data, END][: submit.max_tokens]
        ended = token_ids[-1:] == [END]
        prompt = scores(submit.prompt_token_ids[1:], submit.prompt_logprobs)
        for token_id in token_ids[:-1]:
            yield Tokens(submit.request_id, [token_id], scores([token_id], submit.sampling.logprobs), prompt)
            prompt = None
        last = [] if ended else token_ids[-1:]
        yield Finished(
            submit.request_id,
            last,
            "stop" if ended else "length",
            num_cached,
            len(token_ids),
            logprobs=scores(last, submit.sampling.logprobs),
            prompt_logprobs=prompt,
            timings=timings,
        )

    return script


def scores(token_ids: Sequence[int], num_top: int | None) -> list[TokenLogprobs] | None:
    """Of each token: log-probability -id / 100; the likeliest are it and the ids after it."""
    if num_top is None:
        return None
    return [
        TokenLogprobs(-i / 100, [*range(i, i + num_top)], [-i / 100 - k for k in range(num_top)]) for i in token_ids
    ]


def endless(submit: Submit) -> Iterator[RequestOutput]:
    """`x` at each step, for ever."""
    while True:
        yield Tokens(submit.request_id, [ord("x")])


def silent(submit: Submit) -> Iterator[None]:
    """No token at all."""
    while True:
        yield None


def failing(code: str, after: str = "") -> Script:
    """Some text, then a failure."""

    def script(submit: Submit) -> Iterator[RequestOutput]:
        for token_id in after.encode():
            yield Tokens(submit.request_id, [token_id])
        yield Failed(submit.request_id, code, "The engine failed.")

    return script


def fake_vector(token_ids: Sequence[int]) -> npt.NDArray[np.float32]:
    """[4] of length 1: another one for other tokens."""
    vector = np.array([len(token_ids), sum(token_ids), token_ids[0], -token_ids[-1]], np.float32)
    unit: npt.NDArray[np.float32] = vector / np.float32(np.linalg.norm(vector))
    return unit


def embedding(message: Embed) -> Iterator[RequestOutput]:
    yield Embedded(message.request_id, fake_vector(message.token_ids).tobytes())


class FakeEngine:
    """The engine's end of the socket, in a thread. Answers every request with `script`."""

    def __init__(self, address: str, *, context_length: int = 100, max_requests: int = 1000) -> None:
        self.address = address
        self.script: Script = answer()
        self.submits: list[Submit] = []
        self.embeds: list[Embed] = []
        self.embed_script: Callable[[Embed], Iterator[RequestOutput | None]] = embedding
        self.cancelled: list[str] = []
        self.running: dict[str, Iterator[RequestOutput | None]] = {}
        self.num_hellos = 0
        self.silent = False  # take connections, but say nothing
        self.outbox: queue.SimpleQueue[tuple[bytes, StepOutput]] = queue.SimpleQueue()  # sent as it is
        self._info = EngineInfo(context_length, vocab_size=END + 1, max_requests=max_requests, limited_by_memory=False)
        self._connections: dict[str, bytes] = {}
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.ROUTER)
        self._socket.setsockopt(zmq.LINGER, 0)
        self._socket.bind(address)
        self._thread.start()

    def stop(self) -> None:
        """Die: all connections end, without a word."""
        self._stopping.set()
        self._thread.join()
        self._socket.close()
        self._context.term()

    def send(self, connection: bytes, message: EngineInfo | StepOutput | Metrics) -> None:
        self._socket.send_multipart([connection, msgspec.msgpack.encode(message)])

    def _run(self) -> None:
        decoder = msgspec.msgpack.Decoder(ClientMessage)
        while not self._stopping.is_set():
            while self._socket.poll(1 if self.running else 5):
                connection, frame = self._socket.recv_multipart()
                self._handle(connection, decoder.decode(frame))
            while not self.outbox.empty():
                self.send(*self.outbox.get())
            for request_id, script in list(self.running.items()):
                output = next(script)
                if isinstance(output, Finished | Embedded | Failed):
                    del self.running[request_id]
                if output is not None:
                    self.send(self._connections[request_id], StepOutput([output]))

    def _handle(self, connection: bytes, message: ClientMessage) -> None:
        match message:
            case Hello():
                self.num_hellos += 1
                if not self.silent:
                    self.send(connection, self._info)
            case Submit(request_id=request_id):
                self.submits.append(message)
                self._connections[request_id] = connection
                self.running[request_id] = self.script(message)
            case GetMetrics():
                self.send(connection, Metrics("vllm:num_requests_running 0\n"))
            case Embed(request_id=request_id):
                self.embeds.append(message)
                self._connections[request_id] = connection
                self.running[request_id] = self.embed_script(message)
            case Cancel(request_id=request_id):
                self.cancelled.append(request_id)
                self.running.pop(request_id, None)


class ByteStream:
    """Bytes as text; ids beyond END are as many x."""

    def __init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token_id: int) -> str:
        return "x" * (token_id - END) if token_id > END else self._decoder.decode(bytes([token_id]))

    def finish(self) -> str:
        return self._decoder.decode(b"", final=True)


class ByteTokenizer:
    """One token a byte."""

    bos_token: str | None = None
    eos_token: str | None = "<e>"
    templates = TemplateSource()

    def encode(self, text: str, *, add_special_tokens: bool = False) -> list[int]:
        return list(text.encode())

    def encode_chat(self, rendered: str) -> list[int]:
        return list(rendered.encode())

    def escape(self, text: str) -> str:
        return text

    def unescape(self, rendered: str) -> str:
        return rendered

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        return bytes(token_id for token_id in ids if token_id < END).decode(errors="replace")

    def token_id(self, text: str) -> int | None:
        return None

    def token_bytes(self, token_id: int) -> bytes:
        return bytes([token_id]) if token_id < END else b""

    def stream(self, *, after: Sequence[int] = (), keep: Collection[str] = ()) -> ByteStream:
        return ByteStream()


class PlainTemplate:
    """`role: content` lines, after one with the names of the tools."""

    source = ""
    variables = frozenset({"tools"})

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
        template_kwargs: Mapping[str, Any] | None = None,
    ) -> str:
        names = [tool["function"]["name"] for tool in tools or ()]
        head = f"tools: {', '.join(names)}\n" if names else ""
        return head + "".join(f"{message['role']}: {message['content']}\n" for message in messages)


def fake_model(name: str = "org/tiny", **changes: Any) -> ServedModel:
    """Tool calls in Hermes' form, no thoughts."""
    model = ServedModel(name, ByteTokenizer(), PlainTemplate(), [END], SamplingParams(temperature=0.5, top_k=7))
    return dataclasses.replace(model, **changes)


def fake_deps(engine: EngineClient, **changes: Any) -> Deps:
    settings: dict[str, Any] = {
        "model": fake_model(),
        "engine": engine,
        "max_tokens": 64,
        "completion_tokens": 16,
        "timeout_s": 30.0,
        "created": 1_700_000_000,
        "fingerprint": "mlx-server-test",
    }
    return Deps(**(settings | changes))


class Backend:
    """A fake engine, a client of it, and apps on top."""

    def __init__(self, folder: Path, context_length: int = 100) -> None:
        self.address = f"ipc://{folder}/engine"
        self.responses = ResponseStore(folder / "responses")
        self.engine = FakeEngine(self.address, context_length=context_length)
        self.client = EngineClient(self.address)
        self.client.start()
        self.wait()

    def wait(self) -> None:
        """Until the engine is known."""
        until(self._is_ready)

    def app(self, **changes: Any) -> AccessLog:
        return create_app(fake_deps(self.client, **({"responses": self.responses} | changes)))

    def restart_engine(self) -> None:
        self.engine.stop()
        until(lambda: not self._is_ready())
        self.engine = FakeEngine(self.address)
        self.wait()

    def close(self) -> None:
        self.client.close()
        with contextlib.suppress(zmq.ZMQError):  # a test may have stopped it
            self.engine.stop()

    def _is_ready(self) -> bool:
        try:
            self.client.info()
        except OverloadedError:
            return False
        return True
