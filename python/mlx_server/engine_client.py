"""The API process's end of the socket to the engine: submits requests and hands each its outputs.

One background thread owns the ZeroMQ sockets. Request threads put their messages into a queue and wake that thread
through a pipe; it puts outputs into the queue of the stream that they belong to. Each connection gets a fresh socket,
so nothing of a dead engine can reach requests made later, and the other way round.
"""

import contextlib
import logging
import os
import queue
import select
import threading
from collections.abc import Callable
from typing import Any

import msgspec
import zmq
from zmq.utils.monitor import recv_monitor_message

from mlx_server.errors import OverloadedError
from mlx_server.wire import (
    MAX_FRAME_BYTES,
    Cancel,
    Embed,
    Embedded,
    EngineInfo,
    EngineMessage,
    Failed,
    Finished,
    GetMetrics,
    Hello,
    Metrics,
    RequestOutput,
    StepOutput,
    Submit,
)

log = logging.getLogger(__name__)
_encode = msgspec.msgpack.encode

_RECONNECT_MS = 50
# A stopped engine process keeps its socket open; only missing heartbeats tell. libzmq's own thread answers them, so a
# long step does not look like that.
_HEARTBEAT_MS = 1000
_HEARTBEAT_TIMEOUT_MS = 10_000  # no less: a machine that swaps or is paused for some seconds is not a dead engine
_RETRY_AFTER_S = 5
_END_OF_CONNECTION = (
    zmq.EVENT_DISCONNECTED,
    zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL,
    zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL,
    zmq.EVENT_HANDSHAKE_FAILED_AUTH,
)


class EngineStream:
    """The outputs of requests that are read together: of each any number of `Progress` and `Tokens`, then one
    `Finished`, `Embedded` or `Failed`."""

    def __init__(self, submit: Callable[["EngineStream", Submit | Embed], None], cancel: Callable[[str], None]) -> None:
        self._submit = submit
        self._cancel = cancel
        self.request_ids: list[str] = []
        self._outputs: queue.SimpleQueue[RequestOutput] = queue.SimpleQueue()

    def submit(self, submit: Submit | Embed) -> None:
        """Start a request. OverloadedError while the engine is starting."""
        self._submit(self, submit)
        self.request_ids.append(submit.request_id)

    def get(self, timeout_s: float) -> list[RequestOutput] | None:
        """All outputs that are there; waits up to `timeout_s` for the first. None: nothing came in that time."""
        try:
            outputs = [self._outputs.get(timeout=max(timeout_s, 0.0))]
        except queue.Empty:
            return None
        while not self._outputs.empty():
            outputs.append(self._outputs.get_nowait())  # this thread is the only reader
        return outputs

    def cancel(self, request_id: str) -> None:
        """End a request, if it still runs, and let the engine drop its work. May be called more than once."""
        self._cancel(request_id)

    def close(self) -> None:
        """End all requests."""
        for request_id in self.request_ids:
            self._cancel(request_id)

    def put(self, output: RequestOutput) -> None:
        """For the client's background thread."""
        self._outputs.put(output)


class EngineClient:
    """A connection to the engine at `address` that mends itself. Made and started after a fork, never before."""

    def __init__(self, address: str) -> None:
        self._address = address
        self._decoder = msgspec.msgpack.Decoder(EngineMessage)
        self._lock = threading.Lock()  # guards _info and _streams
        self._info: EngineInfo | None = None
        self._streams: dict[str, EngineStream] = {}  # by request
        self._awaits_metrics: list[queue.SimpleQueue[str]] = []  # guarded by _lock too
        self._outbox: queue.SimpleQueue[bytes] = queue.SimpleQueue()
        self._wake_read, self._wake_write = os.pipe()
        os.set_blocking(self._wake_read, False)
        os.set_blocking(self._wake_write, False)
        self._closing = False
        self._thread = threading.Thread(target=self._run, name="engine-client", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def close(self) -> None:
        """Fail the open streams and end the background thread."""
        self.fail_streams("server_stopping", "The server is shutting down.")
        self._closing = True
        self._wake()
        self._thread.join()
        os.close(self._wake_read)
        os.close(self._wake_write)

    def info(self) -> EngineInfo:
        """What the engine said of its model. OverloadedError while it is starting."""
        with self._lock:
            return self._ready_info()

    def metrics(self, timeout_s: float) -> str:
        """The engine's counters as text. OverloadedError if it is starting, or does not answer in time."""
        reply: queue.SimpleQueue[str] = queue.SimpleQueue()
        with self._lock:
            self._ready_info()
            self._awaits_metrics.append(reply)
            self._outbox.put(_encode(GetMetrics()))
        self._wake()
        try:
            return reply.get(timeout=timeout_s)
        except queue.Empty:
            raise OverloadedError(
                "The engine does not answer.", code="engine_busy", retry_after_s=_RETRY_AFTER_S
            ) from None
        finally:
            with self._lock:
                if reply in self._awaits_metrics:
                    self._awaits_metrics.remove(reply)

    def open_stream(self) -> EngineStream:
        return EngineStream(self._submit, self._cancel)

    def fail_streams(self, code: str, message: str) -> None:
        """End every open stream with a `Failed` of our own and forget the engine until it says `EngineInfo` again."""
        with self._lock:
            self._info = None
            streams, self._streams = self._streams, {}
        for request_id, stream in streams.items():
            stream.put(Failed(request_id, code, message))

    def _ready_info(self) -> EngineInfo:
        if self._info is None:
            raise OverloadedError(
                "The engine is starting; try again soon.", code="engine_starting", retry_after_s=_RETRY_AFTER_S
            )
        return self._info

    def _submit(self, stream: EngineStream, submit: Submit | Embed) -> None:
        frame = _encode(submit)
        with self._lock:
            if len(self._streams) >= self._ready_info().max_requests:  # the engine would say so too, only later
                raise OverloadedError(
                    "The server has more requests than it can queue; try again soon.",
                    code="queue_full",
                    retry_after_s=2,
                )
            self._streams[submit.request_id] = stream
            self._outbox.put(frame)
        self._wake()

    def _cancel(self, request_id: str) -> None:
        with self._lock:
            stream = self._streams.pop(request_id, None)
        if stream is not None:
            self._outbox.put(_encode(Cancel(request_id)))
            self._wake()

    def _wake(self) -> None:
        with contextlib.suppress(BlockingIOError):  # the pipe is full of wake-ups already
            os.write(self._wake_write, b"\0")

    # --- the background thread ---

    def _run(self) -> None:
        context = zmq.Context()
        while not self._closing:
            with context.socket(zmq.DEALER) as dealer:
                self._configure(dealer)
                monitor = dealer.get_monitor_socket()
                dealer.connect(self._address)
                try:
                    self._serve(dealer, monitor)
                except Exception:  # this thread is the process's only way to the engine: it must not end by a fault
                    log.exception("the engine client failed; it connects again")
                dealer.disable_monitor()
                monitor.close(linger=0)
            self.fail_streams("engine_died", "The engine ended while it worked on this request.")
            # Until there is EngineInfo again nothing is submitted, so this is all for the engine that is gone.
            while not self._outbox.empty():
                self._outbox.get_nowait()
        context.term()

    def _configure(self, dealer: zmq.Socket[bytes]) -> None:
        dealer.setsockopt(zmq.LINGER, 0)
        dealer.setsockopt(zmq.RECONNECT_IVL, _RECONNECT_MS)
        dealer.setsockopt(zmq.HEARTBEAT_IVL, _HEARTBEAT_MS)
        dealer.setsockopt(zmq.HEARTBEAT_TIMEOUT, _HEARTBEAT_TIMEOUT_MS)
        dealer.setsockopt(zmq.MAXMSGSIZE, MAX_FRAME_BYTES)
        # The API's threads bound the requests in flight, so that the queues need no bound of their own.
        dealer.setsockopt(zmq.SNDHWM, 0)
        dealer.setsockopt(zmq.RCVHWM, 0)

    def _serve(self, dealer: zmq.Socket[bytes], monitor: zmq.Socket[bytes]) -> None:
        """Wait for the engine, then pass messages on until the connection ends."""
        poller = zmq.Poller()
        poller.register(self._wake_read, select.POLLIN)
        poller.register(monitor, zmq.POLLIN)
        poller.register(dealer, zmq.POLLIN)
        connected = False
        while not self._closing:
            ready: dict[Any, int] = dict(poller.poll())
            if self._wake_read in ready:
                _drain(self._wake_read)
            if dealer in ready and not self._receive(dealer):
                return
            if monitor in ready:
                event = recv_monitor_message(monitor)["event"]
                if event == zmq.EVENT_HANDSHAKE_SUCCEEDED:
                    dealer.send(_encode(Hello()))
                    connected = True
                elif event in _END_OF_CONNECTION and connected:
                    log.warning("lost the connection to the engine")
                    return
            while connected and not self._outbox.empty():
                dealer.send(self._outbox.get_nowait())

    def _receive(self, dealer: zmq.Socket[bytes]) -> bool:
        """Hand out all messages that are there; false if one can't be read, since no stream can be trusted then."""
        try:
            while True:
                self._handle(self._decoder.decode(dealer.recv(zmq.NOBLOCK)))
        except zmq.Again:
            return True
        except msgspec.DecodeError as error:
            log.error("the engine sent what is no message: %s", error)
            return False

    def _handle(self, message: EngineMessage) -> None:
        match message:
            case EngineInfo():
                log.info("connected to the engine")
                with self._lock:
                    self._info = message
            case Metrics(text):
                with self._lock:  # any answer is new enough for all who wait
                    replies, self._awaits_metrics = self._awaits_metrics, []
                for reply in replies:
                    reply.put(text)
            case StepOutput(outputs):
                for output in outputs:
                    self._deliver(output)

    def _deliver(self, output: RequestOutput) -> None:
        with self._lock:
            if isinstance(output, Finished | Embedded | Failed):
                stream = self._streams.pop(output.request_id, None)
            else:
                stream = self._streams.get(output.request_id)
        if stream is not None:  # None: cancelled while the output was on its way
            stream.put(output)


def _drain(fd: int) -> None:
    with contextlib.suppress(BlockingIOError):
        while os.read(fd, 4096):
            pass
