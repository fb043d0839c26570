"""The engine's end of the socket, and the loop that runs it: receive, step, send."""

import contextlib
import logging
import time
from collections import defaultdict
from typing import get_args

import msgspec
import zmq

from mlx_server import wire
from mlx_server.engine.connections import Connections
from mlx_server.engine.core import EngineCore
from mlx_server.engine.memory import is_out_of_memory
from mlx_server.engine.queue import Refusal
from mlx_server.engine.scheduler import Outputs
from mlx_server.pulse import Pulse

log = logging.getLogger(__name__)

_COMPILE_POLL_MS = 1  # how often to look whether a grammar is compiled, if there is nothing else to do


class EngineServer:
    """Serves the API processes that connect to `address` (wire.py says how).

    One thread does all: MLX's streams belong to the thread that made them, and what arrives while the device computes a
    step could not be started earlier anyway.
    """

    def __init__(self, core: EngineCore, address: str) -> None:
        self._core = core
        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.ROUTER)
        self._socket.setsockopt(zmq.ROUTER_MANDATORY, 1)  # sending to a process that is gone is an error, not silence
        self._socket.setsockopt(zmq.MAXMSGSIZE, wire.MAX_FRAME_BYTES)
        self._socket.setsockopt(zmq.LINGER, 0)
        self._connections = Connections(self._socket)
        self._socket.bind(address)
        self._poller = zmq.Poller()
        self._poller.register(self._socket, zmq.POLLIN)
        self._poller.register(self._connections.monitor, zmq.POLLIN)
        self._decoder = msgspec.msgpack.Decoder(wire.ClientMessage)
        self._encoder = msgspec.msgpack.Encoder()

    def run(self, pulse: Pulse) -> None:
        """Serve until a signal ends the process."""
        while True:
            pulse.beat(self._core.slowest_step_s)
            self.serve_once(timeout_ms=int(1000 * pulse.IDLE_S))

    def serve_once(self, timeout_ms: int) -> None:
        """Take in what has arrived, waiting for it if there is nothing else to do; then one step."""
        if self._core.has_work:
            timeout_ms = _COMPILE_POLL_MS if self._core.awaits_grammars else 0
        if self._poller.poll(timeout_ms):
            self._receive_all()
        if self._core.has_work:
            self._send_outputs(self._step())
            if not self._core.has_work:
                self._core.check_integrity(thorough=False)

    def close(self) -> None:
        self._connections.monitor.close(linger=0)
        self._socket.close()
        self._context.term()

    def _receive_all(self) -> None:
        messages: list[list[zmq.Frame]] = []
        with contextlib.suppress(zmq.Again):
            while True:
                messages.append(self._socket.recv_multipart(zmq.NOBLOCK, copy=False))
        for connection in self._connections.ended():
            self._cancel_all(connection, "gone")
        for sender, *frames in messages:
            if self._connections.is_open(sender.bytes, sender.get(zmq.SRCFD)):
                self._handle(sender.bytes, b"".join(frame.bytes for frame in frames))

    def _step(self) -> Outputs:
        start = time.monotonic()
        try:
            outputs = self._core.step()
        except Exception as error:  # process loop: a fault in a step ends that step's requests, never the engine
            log.exception("step failed")
            outputs = self._core.fail_step(out_of_memory=is_out_of_memory(error))
        log.debug("step: %.1f ms, %d outputs", 1e3 * (time.monotonic() - start), len(outputs))
        return outputs

    def _handle(self, connection: bytes, frame: bytes) -> None:
        try:
            message = self._decoder.decode(frame)
        except msgspec.DecodeError as error:
            log.error("dropped a frame of %d bytes that is not a message: %s", len(frame), error)
            return
        match message:
            case wire.Hello():
                self._send(connection, self._core.info)
            case wire.Submit() | wire.Embed():
                failed = self._submit(connection, message)
                if failed is not None:
                    level = logging.INFO if failed.code in get_args(Refusal) else logging.ERROR
                    log.log(level, "refused request %s: %s", message.request_id, failed.message)
                    self._send(connection, wire.StepOutput([failed]))
            case wire.Cancel():
                if self._core.cancel(connection, message.request_id):
                    log.info("request %s cancelled", message.request_id)
            case wire.GetMetrics():
                self._send(connection, wire.Metrics(self._core.metrics()))

    def _submit(self, connection: bytes, message: wire.Submit | wire.Embed) -> wire.Failed | None:
        try:
            return self._core.submit(connection, message)
        except Exception:  # process loop: a fault in one request's way in does not end the engine
            log.exception("request %s failed before it was queued", message.request_id)
            self._core.cancel(connection, message.request_id)
            return wire.Failed(message.request_id, "engine_error", "The engine failed to take this request.")

    def _send_outputs(self, outputs: Outputs) -> None:
        by_connection: dict[bytes, list[wire.RequestOutput]] = defaultdict(list)
        for connection, output in outputs:
            by_connection[connection].append(output)
        for connection, its_outputs in by_connection.items():
            self._send(connection, wire.StepOutput(its_outputs))

    def _send(self, connection: bytes, message: wire.EngineMessage) -> None:
        try:
            self._socket.send_multipart([connection, self._encoder.encode(message)], zmq.NOBLOCK)
        except zmq.ZMQError as error:
            if error.errno not in (zmq.EHOSTUNREACH, zmq.EAGAIN):  # gone, or not reading for a thousand messages
                raise
            self._cancel_all(connection, "gone" if error.errno == zmq.EHOSTUNREACH else "stuck")

    def _cancel_all(self, connection: bytes, state: str) -> None:
        if count := self._core.cancel_connection(connection):
            log.warning("an API process is %s; %d of its requests cancelled", state, count)
