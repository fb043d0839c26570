import threading
import uuid
from pathlib import Path

import msgspec
import pytest
import zmq

from fake_engine import END, TIMINGS, Backend, FakeEngine, answer, endless, silent, until
from mlx_server.engine_client import EngineClient, EngineStream
from mlx_server.errors import OverloadedError
from mlx_server.sampling_params import SamplingParams
from mlx_server.wire import EngineInfo, Failed, Finished, RequestOutput, StepOutput, Submit, Tokens


def submit(client: EngineClient, max_tokens: int = 50) -> EngineStream:
    stream = client.open_stream()
    stream.submit(Submit(uuid.uuid4().hex, [1, 2, 3], max_tokens, [END], SamplingParams()))
    return stream


def read(stream: EngineStream) -> list[RequestOutput]:
    """All outputs up to the last one."""
    outputs: list[RequestOutput] = []
    while not (outputs and isinstance(outputs[-1], Finished | Failed)):
        batch = stream.get(10.0)
        assert batch is not None
        outputs += batch
    assert stream.get(0.0) is None
    return outputs


def test_info_is_what_the_engine_said(backend: Backend) -> None:
    assert backend.client.info() == EngineInfo(100, END + 1, max_requests=1000, limited_by_memory=False)


def test_more_requests_than_the_engine_takes_are_refused_at_once(tmp_path: Path) -> None:
    engine = FakeEngine(f"ipc://{tmp_path}/engine", max_requests=2)
    engine.script = silent
    client = EngineClient(engine.address)
    client.start()
    until(lambda: client._info)
    streams = [submit(client) for _ in range(2)]
    with pytest.raises(OverloadedError) as error:
        submit(client)
    assert error.value.code == "queue_full"
    streams[0].close()
    submit(client)
    client.close()
    engine.stop()


def test_metrics_are_asked_for_by_many_threads(backend: Backend) -> None:
    texts: list[str] = []
    threads = [threading.Thread(target=lambda: texts.append(backend.client.metrics(10.0))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert texts == ["vllm:num_requests_running 0\n"] * 8


def test_metrics_of_an_engine_that_does_not_answer(backend: Backend) -> None:
    backend.engine.stop()
    until(lambda: not backend._is_ready())
    with pytest.raises(OverloadedError):
        backend.client.metrics(0.01)


def test_outputs_reach_their_stream_in_order(backend: Backend) -> None:
    backend.engine.script = answer("Hi")
    outputs = read(submit(backend.client))
    request_id = backend.engine.submits[0].request_id
    assert outputs == [
        Tokens(request_id, [ord("H")]),
        Tokens(request_id, [ord("i")]),
        Finished(request_id, [], "stop", 0, 3, timings=TIMINGS),
    ]


def test_many_threads_share_a_client(backend: Backend) -> None:
    backend.engine.script = answer("0123456789" * 3)
    counts: list[int] = []

    def work() -> None:
        for _ in range(10):
            outputs = read(submit(backend.client))
            counts.append(sum(len(output.token_ids) for output in outputs if isinstance(output, Tokens | Finished)))

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert counts == [30] * 80
    assert len({message.request_id for message in backend.engine.submits}) == 80


def test_get_returns_after_its_timeout(backend: Backend) -> None:
    backend.engine.script = silent
    stream = submit(backend.client)
    assert stream.get(0.01) is None
    assert stream.get(-1.0) is None
    stream.close()


def test_close_cancels_once_and_nothing_comes_after_it(backend: Backend) -> None:
    backend.engine.script = endless
    stream = submit(backend.client)
    assert stream.get(10.0)
    stream.close()
    stream.close()
    until(lambda: backend.engine.cancelled)
    while stream.get(0.0):
        pass
    read_later = submit(backend.client)
    assert read_later.get(10.0)
    assert stream.get(0.0) is None
    assert backend.engine.cancelled == stream.request_ids
    read_later.close()


def test_without_an_engine_requests_are_refused(tmp_path: Path) -> None:
    client = EngineClient(f"ipc://{tmp_path}/engine")
    client.start()
    try:
        for call in (client.info, lambda: submit(client)):
            with pytest.raises(OverloadedError) as error:
                call()
            assert (error.value.code, error.value.retry_after_s) == ("engine_starting", 5)
    finally:
        client.close()


def test_an_engine_that_has_not_said_hello_is_starting(tmp_path: Path) -> None:
    engine = FakeEngine(f"ipc://{tmp_path}/engine")
    engine.silent = True
    client = EngineClient(engine.address)
    client.start()
    until(lambda: engine.num_hellos)
    with pytest.raises(OverloadedError):
        client.info()
    client.close()
    engine.stop()


def test_the_engines_death_ends_every_open_stream_once(backend: Backend) -> None:
    backend.engine.script = endless
    streams = [submit(backend.client) for _ in range(5)]
    until(lambda: len(backend.engine.running) == 5)
    backend.engine.stop()
    for stream in streams:
        last = read(stream)[-1]
        assert isinstance(last, Failed)
        assert (last.request_id, last.code) == (stream.request_ids[0], "engine_died")
    with pytest.raises(OverloadedError):
        submit(backend.client)
    backend.engine = FakeEngine(backend.address)
    backend.wait()
    assert isinstance(read(submit(backend.client))[-1], Finished)
    assert len(backend.engine.submits) == 1  # nothing of the dead engine's requests reached the new one
    assert not backend.engine.cancelled


def test_a_client_started_before_its_engine_finds_it(tmp_path: Path) -> None:
    address = f"ipc://{tmp_path}/engine"
    backend = Backend.__new__(Backend)
    backend.address, backend.client = address, EngineClient(address)
    backend.client.start()
    backend.engine = FakeEngine(address)
    backend.wait()
    assert isinstance(read(submit(backend.client))[-1], Finished)
    backend.close()


def test_every_restart_is_survived(backend: Backend) -> None:
    for _ in range(3):
        backend.restart_engine()
        assert isinstance(read(submit(backend.client))[-1], Finished)
        assert backend.engine.num_hellos == 1


def test_a_frame_that_is_no_message_ends_the_connection_not_the_client(tmp_path: Path) -> None:
    address = f"ipc://{tmp_path}/engine"
    context = zmq.Context()
    router = context.socket(zmq.ROUTER)
    router.bind(address)
    client = EngineClient(address)
    client.start()
    connection, _ = router.recv_multipart()
    router.send_multipart([connection, b"\xc1 this is no msgpack"])
    connection, _ = router.recv_multipart()  # the next connection's Hello
    router.send_multipart([connection, msgspec.msgpack.encode(EngineInfo(7, 8, 9, True))])
    until(lambda: client._info == EngineInfo(7, 8, 9, True))
    client.close()
    router.close(0)
    context.term()


def test_outputs_of_unknown_requests_are_dropped(backend: Backend) -> None:
    backend.engine.script = lambda submit: iter(
        [Tokens("someone else's", [1]), None, Finished(submit.request_id, [2], "length", 0, 1)]
    )
    connection_outputs = read(submit(backend.client))
    assert [output.request_id for output in connection_outputs] == [backend.engine.submits[0].request_id]


def test_a_clients_end_fails_its_streams(tmp_path: Path) -> None:
    backend = Backend(tmp_path)
    backend.engine.script = silent
    stream = submit(backend.client)
    backend.close()
    assert [type(output) for output in read(stream)] == [Failed]


def test_one_step_may_hold_outputs_of_several_requests(backend: Backend) -> None:
    backend.engine.script = silent
    streams = [submit(backend.client) for _ in range(2)]
    until(lambda: len(backend.engine.running) == 2)
    backend.engine.script = lambda _: iter([])
    connection = backend.engine._connections[streams[0].request_ids[0]]
    outputs: list[RequestOutput] = [Finished(stream.request_ids[0], [5], "length", 0, 1) for stream in streams]
    backend.engine.outbox.put((connection, StepOutput(outputs)))
    for stream, output in zip(streams, outputs, strict=True):
        assert read(stream) == [output]


def test_a_stream_may_hold_several_requests(backend: Backend) -> None:
    backend.engine.script = answer("Hi")
    stream = submit(backend.client)
    stream.submit(Submit("another", [4], 1, [END], SamplingParams()))
    outputs: list[RequestOutput] = []
    while sum(isinstance(output, Finished) for output in outputs) < 2:
        outputs += stream.get(10.0) or []
    assert {output.request_id for output in outputs} == {*stream.request_ids}
    backend.engine.script = endless
    stream.submit(Submit("a third", [5], 9, [END], SamplingParams()))
    stream.submit(Submit("a fourth", [6], 9, [END], SamplingParams()))
    stream.cancel("a third")
    until(lambda: backend.engine.cancelled == ["a third"])
    stream.close()
    until(lambda: backend.engine.cancelled == ["a third", "a fourth"])
