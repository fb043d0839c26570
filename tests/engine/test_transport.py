"""The engine's socket, spoken to as an API process does."""

import threading
import time
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest
import zmq

from engine.test_scheduler import alone, make_core, make_submit
from mlx_server import wire
from mlx_server.engine.transport import EngineServer, _is_out_of_memory


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
    """A server on a fake model, stepped by the test."""

    def __init__(self, directory: Path) -> None:
        self.core, self.runner = make_core(num_blocks=1024, context=4096)
        self.address = f"ipc://{directory}/engine.sock"
        self.server = EngineServer(self.core, self.address)
        self.context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self.clients: list[Client] = []

    def connect(self) -> Client:
        self.clients.append(Client(self.context, self.address))
        return self.clients[-1]

    def serve_until(self, done: threading.Event) -> None:
        while not done.is_set():
            self.server.serve_once(timeout_ms=20)


@pytest.fixture
def harness(tmp_path: Path) -> Iterator[Harness]:
    harness = Harness(tmp_path)
    done = threading.Event()
    thread = threading.Thread(target=harness.serve_until, args=(done,))
    thread.start()
    yield harness
    done.set()
    thread.join()
    harness.server.close()
    for client in harness.clients:
        client.socket.close()
    harness.context.term()


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


def test_failed_step_is_told_to_its_request_and_the_next_one_works(harness: Harness) -> None:
    client = harness.connect()
    harness.runner.poison = {"a"}
    client.send(make_submit("a", [1], 30))
    failed = client.outputs_until_end()[-1]
    assert isinstance(failed, wire.Failed) and failed.code == "engine_error"
    client.send(make_submit("b", [1], 3))
    assert isinstance(client.outputs_until_end()[-1], wire.Finished)


def test_requests_of_a_process_that_is_gone_are_cancelled(harness: Harness, caplog: pytest.LogCaptureFixture) -> None:
    client, bystander = harness.connect(), harness.connect()
    client.send(make_submit("a", [1], 4000))
    client.receive()
    client.socket.close()
    bystander.send(make_submit("b", [2], 3))
    assert isinstance(bystander.outputs_until_end()[-1], wire.Finished)
    deadline = time.monotonic() + 10
    while harness.core.has_work and time.monotonic() < deadline:
        time.sleep(0.01)
    assert "1 of its requests cancelled" in caplog.text


@pytest.mark.parametrize(
    ("error", "is_it"),
    [
        (MemoryError(), True),
        (RuntimeError("[metal::malloc] Attempting to allocate 9 bytes"), True),
        (RuntimeError("cudaMallocAsync: out of memory"), True),
        (RuntimeError("the device is on fire"), False),
    ],
)
def test_errors_that_mean_too_little_memory(error: Exception, is_it: bool) -> None:
    assert _is_out_of_memory(error) is is_it
