"""gunicorn's settings and its worker: the only place that knows gunicorn."""

import errno
import logging
import resource
import selectors
import socket
import struct
import sys
import threading
import time
from collections.abc import Callable
from concurrent import futures
from functools import partial
from pathlib import Path
from typing import Any

from gunicorn.app.base import BaseApplication
from gunicorn.glogging import Logger
from gunicorn.http.body import LengthReader
from gunicorn.http.errors import (
    ExpectationFailed,
    LimitRequestHeaders,
    LimitRequestLine,
    NoMoreData,
    ParseException,
)
from gunicorn.http.message import Request
from gunicorn.http.unreader import IterUnreader
from gunicorn.workers.gthread import ThreadWorker

from mlx_server import __version__
from mlx_server.api.app import create_app
from mlx_server.api.body import incomplete
from mlx_server.api.deps import Deps
from mlx_server.api.errors import HttpError
from mlx_server.api.incoming import (
    MAX_FIELDS,
    Body,
    ChunkedBody,
    ClientLimits,
    Connection,
    Head,
    LengthBody,
    headers_too_large,
)
from mlx_server.api.lifeline import end_with_supervisor
from mlx_server.api.middleware import HEALTH_PATHS, AccessLog, Cors
from mlx_server.api.openai.responses_store import ResponseStore
from mlx_server.api.rate_limit import RateLimiter
from mlx_server.chat.served_model import ServedModel, load_served_model
from mlx_server.config import Launch, ResolvedModel
from mlx_server.engine_client import EngineClient
from mlx_server.pulse import Pulse

log = logging.getLogger(__name__)

_NUM_WORKERS = 2
_DRAIN_MARGIN_S = 3  # for the error events of what was ended
_LIMITS = ClientLimits()
_SWEEP_INTERVAL_S = 0.5
_MAX_CONNECTIONS = 4096  # a worker; idle ones make room for new ones
_MIN_CONNECTIONS = 16
_OWN_FILES = 64  # of a worker, beside its connections
_RECEIVE_BYTES = 64 << 10
_ACCEPT_PAUSE_S = 0.5
_FILES = resource.RLIMIT_NOFILE
_OUT_OF_RESOURCES = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)


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
        load_model: Callable[[ResolvedModel, str | None], ServedModel] = load_served_model,
        limits: ClientLimits = _LIMITS,
    ) -> None:
        self._launch = launch
        self._run_dir = run_dir
        self._listener_fd = listener_fd
        self._load_model = load_model
        self.limits = limits
        self.cors = Cors(launch.settings.allowed_origins)
        self._start_time = int(time.time())
        self.engine: EngineClient | None = None
        super().__init__()

    def load_config(self) -> None:
        settings: dict[str, Any] = {
            "bind": f"fd://{self._listener_fd}",
            "worker_class": Worker,
            "workers": _NUM_WORKERS,
            "threads": 256,
            "keepalive": self.limits.idle_s,
            "worker_connections": _max_connections(),
            "limit_request_fields": MAX_FIELDS,
            "http_parser": "python",  # whatever else is installed
            "graceful_timeout": self.limits.drain_s + _DRAIN_MARGIN_S,
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
        responses_dir = self._run_dir / "responses"
        end_with_supervisor(responses_dir)
        self.engine = EngineClient(self._launch.engine_address)
        self.engine.start()
        limiter = RateLimiter(self._run_dir / "rate_limit", settings.rate_limit) if settings.rate_limit else None
        return create_app(
            Deps(
                model=self._load_model(self._launch.model, settings.tool_parser),
                engine=self.engine,
                max_tokens=settings.max_tokens,
                completion_tokens=settings.completion_tokens,
                timeout_s=settings.timeout_s,
                created=self._start_time,
                fingerprint=f"mlx-server-{__version__}",
                api_key=settings.api_key,
                host_names=(settings.host, *settings.allowed_hosts),
                allowed_origins=settings.allowed_origins,
                strict=settings.strict,
                rate_limiter=limiter,
                responses=ResponseStore(responses_dir),
                pulse=Pulse(self._run_dir),
            )
        )


class Worker(ThreadWorker):  # type: ignore[misc]
    """gunicorn's threaded worker, in which a client takes a thread only while its request is answered.

    gunicorn's main loop, the only thread that touches connections while they wait, reads requests to their end, within
    limits of size and time. It refuses what is malformed or too much, answers for health, which must not wait for a
    free thread, and drops what comes on connections that it is about to close. A stop is seen by new clients at once,
    and by running streams in the end.
    """

    app: Server

    def init_process(self) -> None:
        self._waiting: dict[Connection[Request], None] = {}  # in the poller, in the order in which they came to wait
        self._num_bytes = 0  # of unfinished requests
        self._num_running = 0  # requests that have a thread
        self._swept_at = 0.0
        self._accept_after = 0.0
        super().init_process()

    # --- connections come and go ---

    def accept(self, listener: socket.socket) -> None:
        if self.nr_conns >= self.worker_connections - 1:
            self._close_an_idle_one()
        try:
            sock, client = listener.accept()
        except OSError as error:
            if error.errno in _OUT_OF_RESOURCES:
                if not self._close_an_idle_one():
                    self._accept_after = time.monotonic() + _ACCEPT_PAUSE_S
                    self.set_accept_enabled(False)
            elif error.errno not in (errno.EAGAIN, errno.ECONNABORTED):
                raise
            return
        timeout = struct.pack("@ll", self.app.limits.send_s, 0)  # a timeval
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, timeout)
        self.nr_conns += 1
        parse = partial(_parse, cfg=self.cfg, client=client)
        connection = Connection(sock, client, listener.getsockname(), parse, self.app.limits)
        self._wait(connection)

    def set_accept_enabled(self, enabled: bool) -> None:
        super().set_accept_enabled(enabled and time.monotonic() >= self._accept_after)

    def _wait(self, connection: Connection[Request]) -> None:
        connection.sock.setblocking(False)
        self._waiting[connection] = None
        self.poller.register(connection.sock, selectors.EVENT_READ, partial(self._receive, connection))

    def _stop_waiting(self, connection: Connection[Request]) -> None:
        if connection in self._waiting:
            del self._waiting[connection]
            self.poller.unregister(connection.sock)

    def _close(self, connection: Connection[Request]) -> None:
        self._stop_waiting(connection)
        self._num_bytes -= connection.num_counted
        self.nr_conns -= 1
        connection.sock.close()

    def _close_an_idle_one(self) -> bool:
        """Whether there was one."""
        idle = next((connection for connection in self._waiting if connection.is_idle), None)
        if idle is not None:
            self._close(idle)
        return idle is not None

    def _linger(self, connection: Connection[Request]) -> None:
        """Close, but not before the client has read its answer: unread bytes would make the kernel destroy that."""
        if not connection.start_to_linger():
            self._close(connection)
            return
        self._count(connection)
        if connection not in self._waiting:
            self._wait(connection)

    # --- requests come in ---

    def _receive(self, connection: Connection[Request], sock: socket.socket) -> None:
        try:
            data = sock.recv(_RECEIVE_BYTES)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if connection.lingering:
            if not data:
                self._close(connection)
        elif data:
            connection.feed(data)
            self._advance(connection)
        elif connection.request is not None:
            self._refuse(connection, incomplete())
        else:
            self._close(connection)

    def _advance(self, connection: Connection[Request]) -> None:
        """Serve the request that the connection has received, if it is complete."""
        if connection not in self._waiting:
            return
        try:
            request = connection.read_request()
            self._count(connection)
            if self._num_bytes > self.app.limits.max_pending_bytes:
                raise _busy()
            if request is not None:
                self._serve(connection, request)
        except HttpError as error:
            self._refuse(connection, error)

    def _count(self, connection: Connection[Request]) -> None:
        self._num_bytes += connection.num_bytes - connection.num_counted
        connection.num_counted = connection.num_bytes

    def _serve(self, connection: Connection[Request], request: Request) -> None:
        if request.path not in HEALTH_PATHS and self._num_running >= self.cfg.threads:
            raise _busy()
        self._stop_waiting(connection)
        if request.path in HEALTH_PATHS:
            try:
                self._finish(connection, keep=self.handle_request(request, connection))
            except (OSError, StopIteration):  # the client does not read its answers
                self._close(connection)
        else:
            self._num_running += 1
            self.enqueue_req(connection)

    def handle(self, connection: Connection[Request]) -> bool:
        """Answer the request, in a thread of its own. Whether the connection stays open."""
        connection.sock.setblocking(True)
        return bool(self.handle_request(connection.request, connection))

    def finish_request(self, connection: Connection[Request], future: "futures.Future[bool]") -> None:
        """gunicorn calls it in the main loop when `handle` has ended."""
        self._num_running -= 1
        if (error := future.exception()) is None:
            self._finish(connection, keep=future.result())
            return
        if not isinstance(error, OSError | StopIteration):  # the client's end, or gunicorn has logged it
            log.error("a request failed", exc_info=error)
        self._close(connection)

    def _finish(self, connection: Connection[Request], *, keep: bool) -> None:
        """The request is answered. `keep`: the connection stays open."""
        if not keep:
            self._linger(connection)
            return
        connection.expect_request()
        if not self.alive:
            connection.end_by(time.monotonic() + self.app.limits.linger_s)
        self._count(connection)
        self._wait(connection)
        if connection.received:  # the client sent it behind the one before; others have their turn first
            self.method_queue.defer(self._advance, connection)

    def _refuse(self, connection: Connection[Request], error: HttpError) -> None:
        connection.refuse(error, self.app.cors)
        self._linger(connection)

    # --- time passes: gunicorn calls these in each turn of its loop ---

    def murder_pending(self) -> None:
        now = time.monotonic()
        if now < self._swept_at + _SWEEP_INTERVAL_S:
            return
        self._swept_at = now
        for connection in [connection for connection in self._waiting if connection.is_late(now)]:
            if connection.lingering or connection.is_idle:
                self._close(connection)
            else:
                self._refuse(connection, _too_slow())

    def murder_keepalived(self, force: bool = False) -> None:
        if force:
            for connection in list(self._waiting):
                self._close(connection)

    def _cap_keepalive(self, deadline: float) -> None:
        """A stop begins: gunicorn has accepted its last connection and will wait for what still runs."""
        for connection in self._waiting:
            connection.end_by(deadline)
        for listener in self.sockets:  # otherwise open until the end of the wait: new connections would hang
            listener.close()
        if self.app.engine is not None:
            stopping = ("server_stopping", "The server is shutting down.")
            timer = threading.Timer(self.app.limits.drain_s, self.app.engine.fail_streams, stopping)
            timer.daemon = True
            timer.start()


def _max_connections() -> int:
    """As many as the limit on open files leaves room for; that is raised as far as it may be."""
    wanted = _MAX_CONNECTIONS + _OWN_FILES
    soft, hard = (wanted if limit == resource.RLIM_INFINITY else limit for limit in resource.getrlimit(_FILES))
    if soft < min(wanted, hard):
        soft = min(wanted, hard)
        resource.setrlimit(_FILES, (soft, resource.getrlimit(_FILES)[1]))
    return max(min(wanted, soft) - _OWN_FILES, _MIN_CONNECTIONS)


def _parse(head: bytes, cfg: Any, client: Any) -> "Head[Request]":
    """A request without its body, which is still to come."""
    try:
        request = Request(cfg, IterUnreader([head]), client)
    except LimitRequestLine:
        raise HttpError(414, "uri_too_long", "The request's first line is too long.") from None
    except LimitRequestHeaders:
        raise headers_too_large() from None
    except ExpectationFailed:
        raise HttpError(417, "expectation_failed", "The only Expect that is served is 100-continue.") from None
    except (ParseException, NoMoreData):
        raise HttpError(400, "malformed_request", "The request is not valid HTTP/1.1.") from None
    reader = request.body.reader
    body: Body = LengthBody(reader.length) if isinstance(reader, LengthReader) else ChunkedBody()
    expects_continue, request._expected_100_continue = request._expected_100_continue, False  # noqa: SLF001
    return Head(request, body, expects_continue)


def _busy() -> HttpError:
    return HttpError(
        503, "server_busy", "The server has too many requests; try again soon.", kind="server_error", retry_after="1"
    )


def _too_slow() -> HttpError:
    return HttpError(408, "request_timeout", "The request did not come in time.", kind="timeout_error")


class _Log(Logger):  # type: ignore[misc]
    """gunicorn's messages in our log."""

    def setup(self, cfg: Any) -> None:
        super().setup(cfg)
        self.error_log.handlers.clear()
        self.error_log.propagate = True
