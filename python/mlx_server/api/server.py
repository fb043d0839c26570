"""gunicorn's settings and its worker: the only place that knows gunicorn."""

import logging
import os
import signal
import socket
import stat
import struct
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from gunicorn.app.base import BaseApplication
from gunicorn.glogging import Logger
from gunicorn.workers.gthread import ThreadWorker

from mlx_server import __version__
from mlx_server.api.app import create_app
from mlx_server.api.deps import Deps
from mlx_server.api.middleware import AccessLog
from mlx_server.api.rate_limit import RateLimiter
from mlx_server.chat.served_model import ServedModel, load_served_model
from mlx_server.config import Launch, ResolvedModel
from mlx_server.engine_client import EngineClient

log = logging.getLogger(__name__)

_NUM_WORKERS = 2
DRAIN_S = 30  # from the stop signal to the end of what still runs
SEND_TIMEOUT_S = 20  # how long a client may take nothing of its answer
_DRAIN_MARGIN_S = 3  # for the error events of what was ended


class Server(BaseApplication):  # type: ignore[misc]
    """The API process: gunicorn's arbiter, which forks the workers that serve.

    Everything that has threads, sockets or a tokenizer is made in the workers, in `load`: the arbiter must stay free of
    them, as they do not survive a fork.
    """

    def __init__(
        self,
        launch: Launch,
        run_dir: Path,
        listener_fd: int,
        *,
        load_model: Callable[[ResolvedModel], ServedModel] = load_served_model,
        drain_s: int = DRAIN_S,
        send_timeout_s: int = SEND_TIMEOUT_S,
    ) -> None:
        self._launch = launch
        self._run_dir = run_dir
        self._listener_fd = listener_fd
        self._load_model = load_model
        self.drain_s = drain_s
        self.send_timeout_s = send_timeout_s
        self._start_time = int(time.time())
        self.engine: EngineClient | None = None
        super().__init__()

    def load_config(self) -> None:
        settings: dict[str, Any] = {
            "bind": f"fd://{self._listener_fd}",
            "worker_class": Worker,
            "workers": _NUM_WORKERS,
            "threads": 256,
            "keepalive": 75,
            "graceful_timeout": self.drain_s + _DRAIN_MARGIN_S,
            "preload_app": False,
            "control_socket_disable": True,  # its path is one for all servers of a machine
            "logger_class": _Log,
            "loglevel": "warning",
        }
        if sys.platform == "linux":
            settings["worker_tmp_dir"] = "/dev/shm"  # noqa: S108 - the workers' heartbeats must not wait for a disk
        for name, value in settings.items():
            self.cfg.set(name, value)

    def load(self) -> AccessLog:
        """Make the application; called in each worker."""
        settings = self._launch.settings
        _end_with_supervisor()
        self.engine = EngineClient(self._launch.engine_address)
        self.engine.start()
        limiter = RateLimiter(self._run_dir / "rate_limit", settings.rate_limit) if settings.rate_limit else None
        return create_app(
            Deps(
                model=self._load_model(self._launch.model),
                engine=self.engine,
                max_tokens=settings.max_tokens,
                timeout_s=settings.timeout_s,
                created=self._start_time,
                fingerprint=f"mlx-server-{__version__}",
                api_key=settings.api_key,
                host_names=(settings.host, *settings.allowed_hosts),
                allowed_origins=settings.allowed_origins,
                strict=settings.strict,
                rate_limiter=limiter,
            )
        )


class Worker(ThreadWorker):  # type: ignore[misc]
    """gunicorn's threaded worker, with a limit on clients that do not read their answer, and with another stop.

    That stop is seen by new clients at once, and by running streams in the end.
    """

    app: Server

    def init_process(self) -> None:
        timeout = struct.pack("@ll", self.app.send_timeout_s, 0)  # a timeval; connections inherit it
        for listener in self.sockets:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, timeout)
        super().init_process()

    def _cap_keepalive(self, deadline: float) -> None:
        """gunicorn calls this when a stop begins, between its last accept and the wait for what still runs."""
        super()._cap_keepalive(deadline)
        for listener in self.sockets:  # otherwise open until the end of the wait: new connections would hang
            listener.close()
        if self.app.engine is not None:
            stopping = ("server_stopping", "The server is shutting down.")
            timer = threading.Timer(self.app.drain_s, self.app.engine.fail_streams, stopping)
            timer.daemon = True
            timer.start()


class _Log(Logger):  # type: ignore[misc]
    """gunicorn's messages in our log."""

    def setup(self, cfg: Any) -> None:
        super().setup(cfg)
        self.error_log.handlers.clear()
        self.error_log.propagate = True


def _end_with_supervisor() -> None:
    """End the whole API process at once when the supervisor is gone: only it holds the other end of standard input.

    Each worker watches for itself and for the arbiter, which must have no threads.
    """
    if not stat.S_ISFIFO(os.fstat(0).st_mode):
        return  # started by hand
    arbiter = os.getppid()

    def watch() -> None:
        while os.read(0, 1):
            pass
        os.kill(arbiter, signal.SIGKILL)
        os._exit(1)

    threading.Thread(target=watch, name="lifeline", daemon=True).start()
