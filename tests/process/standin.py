"""Stand-ins for the supervisor's children: `standin.py fetch|engine|api` and the arguments that the real ones get.

The model's name says what they do: `no-such-model`, `endless-download`, `endless-load`, `broken-model`, `crash`,
`crash-api`, `hang`, `hungry` (it dies until it has the least memory); anything else works.
"""

import argparse
import faulthandler
import os
import signal
import socket
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from mlx_server.config import STACKS_SIGNAL, Launch, ResolvedModel
from mlx_server.pulse import Pulse
from mlx_server.status import (
    EXIT_OUT_OF_MEMORY,
    Failed,
    Loading,
    Ready,
    Resolved,
    StatusPipe,
    end_with_supervisor,
)


def fetch(model: str, status: StatusPipe) -> None:
    if model == "endless-download":
        print("downloading", flush=True)
        signal.pause()
    status.send(Failed("there is no such model") if model == "no-such-model" else Resolved(ResolvedModel(model, "/x")))


def engine(model: str, status: StatusPipe, run_dir: Path, memory_share: float) -> None:
    status.send(Loading("weights"))
    if model == "endless-load":
        signal.pause()
    if model == "broken-model":
        status.send(Failed("the model is broken"))
    elif model == "crash":
        os._exit(7)
    else:
        status.send(Ready({"Context": "7 tokens", "Memory": f"{memory_share} of it"}))
    if model == "hungry" and memory_share == 1:
        os.abort()
    if model == "hungry" and memory_share == 1 / 2:
        os.kill(os.getpid(), signal.SIGSEGV)
    if model == "hungry" and memory_share == 1 / 4:
        os._exit(EXIT_OUT_OF_MEMORY)
    if model == "hang":
        faulthandler.register(STACKS_SIGNAL)
        Pulse(run_dir).beat(slowest_step_s=0.0)
        while True:
            signal.pause()
    signal.pause()


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        """/health: 200. Another path: a part at once, the rest when the file of that name is there."""
        self.send_response(200)
        self.send_header("Connection", "close")
        self.end_headers()
        self.wfile.write(b"first ")
        while self.path != "/health" and not Path(self.path).exists():
            time.sleep(0.01)
        self.wfile.write(b"last")

    def log_message(self, *args: object) -> None:
        pass


def api(model: str, fd: int) -> None:
    if model == "crash-api":
        os._exit(9)
    server = ThreadingHTTPServer(("", 0), Handler, bind_and_activate=False)
    server.socket.close()
    server.socket = socket.socket(fileno=fd)
    server.daemon_threads = False  # server_close waits for running requests
    signal.signal(signal.SIGTERM, lambda *_: threading.Thread(target=server.shutdown).start())
    server.serve_forever(poll_interval=0.02)
    server.server_close()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("role")
    parser.add_argument("words", nargs="+")
    parser.add_argument("--status-fd", type=int, default=-1)
    parser.add_argument("--fd", type=int, default=-1)
    parser.add_argument("--memory-share", type=float, default=0.0)
    args = parser.parse_args()
    if args.role == "fetch":
        end_with_supervisor()
        fetch(args.words[0], StatusPipe(args.status_fd))
        return
    run_dir = Path(args.words[0])
    end_with_supervisor(run_dir)
    model = Launch.read(run_dir).model.name
    if args.role == "engine":
        engine(model, StatusPipe(args.status_fd), run_dir, args.memory_share)
    else:
        api(model, args.fd)


if __name__ == "__main__":
    main()
