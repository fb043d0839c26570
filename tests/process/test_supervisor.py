"""The supervisor with stand-ins for its children: what starts when, what ends whom, and with which exit code."""

import re
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Sequence
from pathlib import Path

import psutil
import pytest

from mlx_server.supervisor.supervisor import Backoff
from server_process import ServerProcess, until

COMMAND = [sys.executable, str(Path(__file__).with_name("server.py"))]


def start(model: str, *args: str, command: Sequence[str] = COMMAND) -> ServerProcess:
    return ServerProcess(command, ["--model", model, "--host", "127.0.0.1", "--port", "0", *args])


def get(url: str) -> bytes:
    with urllib.request.urlopen(url, timeout=20) as response:
        body: bytes = response.read()
        return body


def test_ready_means_that_a_request_succeeds():
    with start("m") as server:
        url = server.url()
        assert get(url + "/health") == b"first last"
        assert re.search(r"Model +m\n.*Context +7 tokens\n.*Ready", server.out, re.DOTALL)
        assert f"OPENAI_BASE_URL={url}/v1" in server.out
        assert f"ANTHROPIC_BASE_URL={url} " in server.out
        assert f"curl {url}/v1/chat/completions" in server.out
        assert "Warning" not in server.out
        [run_dir] = server.run_dirs
        assert run_dir.stat().st_mode & 0o777 == 0o700
        assert (run_dir / "launch.json").stat().st_mode & 0o777 == 0o600


def test_an_open_server_is_warned_of_and_a_key_is_never_shown():
    with start("m", "--host", "0.0.0.0") as server:
        server.url()
        for shown in (server.out, server.err):
            assert "--api-key" in shown and "--host 127.0.0.1" in shown
    with start("m", "--host", "0.0.0.0", "--api-key", "secret-7", "--log-level", "debug") as server:
        server.url()
        assert "Warning" not in server.out
        assert 'authorization: Bearer $MLX_SERVER_API_KEY"' in server.out
        assert "secret-7" not in server.out + server.err


def test_an_open_server_can_be_forbidden():
    with start("endless-load", "--host", "0.0.0.0", "--require-key") as server:
        assert server.wait() == 2
        assert re.fullmatch(r"mlx-server: --require-key: .*MLX_SERVER_API_KEY.*\n", server.err)
        assert server.out == ""
    for allowed in (["--host", "0.0.0.0", "--api-key", "secret-7"], ["--host", "127.0.0.1"]):
        with start("m", "--require-key", *allowed) as server:
            server.url()


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_lets_running_requests_finish(signum, tmp_path):
    with start("m") as server:
        url = server.url()
        server.processes()
        gate = tmp_path / "gate"
        response = urllib.request.urlopen(f"{url}{gate}", timeout=20)
        assert response.read(6) == b"first "
        server.signal(signum)
        port = int(url.rpartition(":")[2])
        until(lambda: is_refused(port), "new connections are refused")
        assert server.process.poll() is None
        gate.touch()
        assert response.read() == b"last"
        assert server.wait() == 0
        server.assert_nothing_left()


def is_refused(port: int) -> bool:
    with socket.socket() as client:
        return client.connect_ex(("127.0.0.1", port)) != 0


# Runs a command on a terminal of its own; what comes on standard input is typed there.
ON_A_TERMINAL = [
    sys.executable,
    "-c",
    "import os, pty, sys; sys.exit(os.waitstatus_to_exitcode(pty.spawn(sys.argv[1:])))",
]


def test_ctrl_c_on_a_terminal_reaches_only_the_supervisor(tmp_path):
    with start("m", command=[*ON_A_TERMINAL, *COMMAND]) as server:
        url = server.url()
        server.processes()
        gate = tmp_path / "gate"
        response = urllib.request.urlopen(f"{url}{gate}", timeout=20)
        assert response.read(6) == b"first "
        server.type(b"\x03")
        until(lambda: "a second signal" in server.out, "the drain")
        gate.touch()
        assert response.read() == b"last"
        assert server.wait() == 0
        server.assert_nothing_left()


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_second_signal_ends_at_once(signum, code, tmp_path):
    with start("m") as server:
        url = server.url()
        server.processes()
        response = urllib.request.urlopen(f"{url}{tmp_path / 'never'}", timeout=20)
        server.signal(signum)
        until(lambda: "a second signal" in server.err, "the drain")
        server.signal(signum)
        assert server.wait(5) == code
        server.assert_nothing_left()
        response.close()


@pytest.mark.parametrize(("model", "state"), [("endless-download", "downloading"), ("endless-load", "weights")])
def test_a_signal_during_download_or_load_works_at_once(model, state):
    with start(model) as server:
        until(lambda: state in server.out, state)
        server.processes()
        begin_s = time.monotonic()
        server.signal(signal.SIGINT)
        assert server.wait(5) == 0
        assert time.monotonic() - begin_s < 4
        server.assert_nothing_left()


@pytest.mark.parametrize(
    ("model", "code", "message"),
    [
        ("no-such-model", 2, "mlx-server: there is no such model"),
        ("broken-model", 2, "mlx-server: the model is broken"),
        ("crash", 1, "mlx-server: the engine process ended with exit code 7 while it loaded the model"),
        ("crash-api", 1, "mlx-server: the API process ended with exit code 9 before it could serve"),
    ],
)
def test_what_keeps_it_from_starting_is_one_sentence(model, code, message):
    with start(model) as server:
        assert server.wait() == code
        assert server.err == message + "\n"
        assert server.run_dirs == []


def test_a_port_in_use_is_seen_before_the_model_is_touched():
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        with start("endless-load", "--port", str(port)) as server:
            assert server.wait() == 1
            assert server.err.startswith(f"mlx-server: port {port} is in use on 127.0.0.1")
            assert server.err.count("\n") == 1
            assert server.out == ""


def test_a_server_that_still_loads_holds_its_port():
    with start("endless-load") as first:
        until(lambda: "weights" in first.out, "the load")
        [connection] = [c for c in server_connections(first) if c.status == "LISTEN"]
        with start("m", "--port", str(connection.laddr.port)) as second:
            assert second.wait() == 1


def server_connections(server: ServerProcess):
    return psutil.Process(server.process.pid).net_connections("tcp")


def test_two_servers_do_not_disturb_each_other():
    with start("m") as first, start("m") as second:
        url = first.url()
        second.url()
        second.signal(signal.SIGTERM)
        assert second.wait() == 0
        assert get(url + "/health") == b"first last"


@pytest.mark.parametrize("name", ["engine", "api"])
def test_a_child_that_dies_is_started_again(name):
    with start("m") as server:
        url = server.url()
        child = server.child(name)
        child.kill()
        server.child(name, other_than=child)
        assert "process ended with signal SIGKILL" in server.err
        assert get(url + "/health") == b"first last"
        if name == "engine":
            until(lambda: "the engine is ready again: Context 7 tokens, Memory 0.5 of it" in server.err, "the engine")
        assert server.out.count("Loading") == 1


def test_an_engine_that_runs_out_of_memory_gets_less():
    """However it dies; after a while there is no less."""
    with start("hungry") as server:
        until(lambda: "ready again: Context 7 tokens, Memory 0.125 of it" in server.err, "the least memory")
        assert shares(server) == ["0.5", "0.25", "0.125"]
        server.child("engine").kill()
        until(lambda: len(shares(server)) == 4, "what it may use then")
        assert shares(server)[3] == "0.125"
        ends = re.findall(r"the engine process ended with (.*) \(perhaps memory ran out\)", server.err)
        assert ends == ["signal SIGABRT", "signal SIGSEGV", "exit code 3", "signal SIGKILL"]


def shares(server: ServerProcess) -> list[str]:
    return re.findall(r"from now on it uses (\S+) of the memory", server.err)


def test_no_process_outlives_a_killed_supervisor():
    with start("m") as server:
        server.url()
        assert len(server.processes()) == 2
        server.process.kill()
        server.assert_nothing_left()


def test_a_closed_output_does_not_end_it():
    settings = ["--model", "m", "--host", "127.0.0.1", "--port", str(free_port())]
    process = subprocess.Popen([*COMMAND, *settings], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    assert process.stdout is not None
    process.stdout.close()
    try:
        until(lambda: not is_refused(int(settings[-1])), "the listener")
        assert get(f"http://127.0.0.1:{settings[-1]}/health")
        process.send_signal(signal.SIGTERM)
        assert process.wait(10) == 0
    finally:
        process.kill()
        process.wait()


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port: int = listener.getsockname()[1]
        return port


def test_pauses_before_restarts_grow_and_start_again_after_a_minute():
    backoff = Backoff()
    assert [backoff.pause_s(0) for _ in range(8)] == [0.5, 1, 2, 4, 8, 16, 30, 30]
    assert backoff.pause_s(61) == 0.5
    assert backoff.pause_s(3) == 1


def test_an_engine_that_hangs_shows_its_stacks_and_is_replaced():
    with start("hang") as server:
        server.url()
        engine = server.child("engine")
        server.child("engine", other_than=engine)
        assert "the engine has made no step" in server.err
        assert re.search(r"File .*standin.py.*in engine", server.err)
        assert re.search("signal SIGKILL;", server.err)  # ours: memory did not run out
        until(lambda: "ready again: Context 7 tokens, Memory 1.0 of it" in server.err, "the engine")
