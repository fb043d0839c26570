"""The engine's socket, spoken to as an API process does."""

import re
import threading
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import msgspec
import psutil
import pytest
import zmq

from api_process import running
from engine.test_scheduler import alone, make_core, make_submit
from fake_engine import until
from mlx_server import wire
from mlx_server.engine.core import EngineCore
from mlx_server.engine.transport import EngineServer


class Client:
    """A DEALER with a timeout."""

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]], address: str) -> None:
        self.socket = context.socket(zmq.DEALER)
        self.socket.setsockopt(zmq.LINGER, 0)
        self.socket.connect(address)

    def send(self, message: wire.ClientMessage) -> None:
        self.socket.send(msgspec.msgpack.encode(message))

    def receive(self) -> wire.EngineMessage:
        assert self.socket.poll(5000), "no answer in 5 s"
        message: wire.EngineMessage = msgspec.msgpack.decode(self.socket.recv(), type=wire.EngineMessage)
        return message

    def outputs_until_end(self) -> list[wire.RequestOutput]:
        outputs: list[wire.RequestOutput] = []
        while not outputs or isinstance(outputs[-1], wire.Tokens):
            message = self.receive()
            assert isinstance(message, wire.StepOutput)
            outputs += message.outputs
        return outputs


class Harness:
    """A server on a fake model, in a thread."""

    def __init__(self, address: str, **core: Any) -> None:
        self.core, self.runner = make_core(**core)
        self.address = address
        self.server = EngineServer(self.core, self.address)
        self.context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self.clients: list[Client] = []
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._serve)

    def connect(self) -> Client:
        self.clients.append(Client(self.context, self.address))
        return self.clients[-1]

    def _serve(self) -> None:
        while not self._done.is_set():
            self.server.serve_once(timeout_ms=20)

    def __enter__(self) -> "Harness":  # noqa: PYI034 - Self is Python 3.11's
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._done.set()
        self._thread.join()
        self.close()

    def close(self) -> None:
        self.server.close()
        for client in self.clients:
            client.socket.close()
        self.context.term()


@pytest.fixture
def harness(tmp_path: Path) -> Iterator[Harness]:
    with Harness(f"ipc://{tmp_path}/engine.sock", num_blocks=1024, context=4096) as harness:
        yield harness


def test_hello_is_answered_with_the_model_facts(harness: Harness) -> None:
    client = harness.connect()
    client.send(wire.Hello())
    assert client.receive() == harness.core.info


def test_a_request_comes_back_token_by_token(harness: Harness) -> None:
    client = harness.connect()
    message = make_submit("a", [1, 2, 3], 4)
    client.send(message)
    outputs = client.outputs_until_end()
    tokens = [token_id for output in outputs if not isinstance(output, wire.Failed) for token_id in output.token_ids]
    assert tokens == alone(message)[0]
    assert len(outputs) == 4


def test_two_processes_may_use_the_same_request_id(harness: Harness) -> None:
    clients = [harness.connect() for _ in range(2)]
    for i, client in enumerate(clients):
        client.send(make_submit("same", [i + 1], 3))
    for i, client in enumerate(clients):
        end = client.outputs_until_end()[-1]
        assert isinstance(end, wire.Finished)
        assert end.token_ids == alone(make_submit("same", [i + 1], 3))[0][-1:]


def test_rubbish_and_bad_requests_leave_the_engine_up(harness: Harness) -> None:
    client = harness.connect()
    client.socket.send(b"\xc1 not msgpack")
    client.socket.send(msgspec.msgpack.encode({"type": "Reboot"}))
    client.socket.send_multipart([b"two", b"frames"])
    client.send(make_submit("bad", [10**6], 3))
    (failed,) = client.outputs_until_end()
    assert isinstance(failed, wire.Failed) and failed.code == "invalid_request"
    client.send(make_submit("good", [1], 3))
    assert isinstance(client.outputs_until_end()[-1], wire.Finished)


def test_a_frame_that_is_too_large_is_not_taken(harness: Harness) -> None:
    sender, bystander = harness.connect(), harness.connect()
    sender.socket.send(bytes(wire.MAX_FRAME_BYTES + 1))
    bystander.send(make_submit("good", [1], 3))
    assert isinstance(bystander.outputs_until_end()[-1], wire.Finished)
    sender.send(wire.Hello())  # on a new connection: ZeroMQ has closed the one that sent too much
    assert sender.receive() == harness.core.info


def test_failed_step_is_told_to_its_request_and_the_next_one_works(harness: Harness) -> None:
    client = harness.connect()
    harness.runner.poison = {"a"}
    client.send(make_submit("a", [1], 30))
    failed = client.outputs_until_end()[-1]
    assert isinstance(failed, wire.Failed) and failed.code == "engine_error"
    client.send(make_submit("b", [1], 3))
    assert isinstance(client.outputs_until_end()[-1], wire.Finished)


def gauge(core: EngineCore, name: str) -> float:
    found = re.search(rf"^vllm:{name}{{.*}} (\S+)$", core.metrics(), re.MULTILINE)
    assert found is not None
    return float(found[1])


def test_a_process_that_is_gone_is_noticed_while_there_is_nothing_to_send(tmp_path: Path, monkeypatch) -> None:
    """A real API process, whose workers are killed while their requests wait for a place. Then another client, whose
    prompt, of a token a step, has the only place."""
    sent: list[wire.EngineMessage] = []
    send = EngineServer._send

    def record(server: EngineServer, connection: bytes, message: wire.EngineMessage) -> None:
        sent.append(message)
        send(server, connection, message)

    monkeypatch.setattr(EngineServer, "_send", record)
    with running(tmp_path) as process:

        def workers_know_the_engine() -> bool:
            log = process.log.read_text()
            num_lost = log.count("lost the connection")
            return num_lost >= 2 and log.count("connected to the engine") == num_lost + 2

        process.engine.stop()
        sizes = {"num_blocks": 30_000, "max_batch_tokens": 1, "max_running": 1, "context": 100_000}
        with Harness(process.engine.address, **sizes) as harness:
            core, bystander = harness.core, harness.connect()
            bystander.send(make_submit("slow", [1] * 90_000, 1))
            until(lambda: workers_know_the_engine() and gauge(core, "num_requests_running") == 1)
            for _ in range(4):
                process.send(max_tokens=5)
            until(lambda: gauge(core, "num_requests_waiting") == 4)
            for worker in psutil.Process(process.process.pid).children():
                worker.kill()
            until(lambda: gauge(core, "num_requests_waiting") == 0)
            assert gauge(core, "num_requests_running") == 1 and gauge(core, "kv_cache_usage_perc") > 0
            bystander.socket.close()
            until(lambda: not core.has_work)
            assert gauge(core, "kv_cache_usage_perc") == 0
            assert all(isinstance(message, wire.EngineInfo) for message in sent)  # to workers that were just started


def test_messages_of_a_process_that_has_died_since_are_not_heard(tmp_path: Path) -> None:
    with closing(Harness(f"ipc://{tmp_path}/engine.sock")) as harness:
        server, client = harness.server, harness.connect()
        client.send(make_submit("a", [1], 5))
        assert server._socket.poll(5000)
        assert server._connections.ended() == []  # it was accepted
        client.socket.close()
        assert server._connections.monitor.poll(5000)
        server.serve_once(timeout_ms=0)
        assert not harness.core.has_work


def test_a_descriptor_that_is_used_again_is_another_connection(harness: Harness) -> None:
    """Each client is gone before the next one comes, which gets its file descriptor."""
    for i in range(5):
        client = harness.connect()
        client.send(make_submit("a", [i], 4000))
        client.receive()
        client.socket.close()
        until(lambda: not harness.core.has_work)
    client = harness.connect()
    client.send(make_submit("a", [1], 5))
    assert isinstance(client.outputs_until_end()[-1], wire.Finished)
