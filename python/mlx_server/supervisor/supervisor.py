"""The life of a server: fetch the model, start the engine, start the API, keep both alive, stop."""

import asyncio
import contextlib
import logging
import os
import shutil
import signal
import socket
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import msgspec

from mlx_server import log
from mlx_server.config import STACKS_SIGNAL, Launch, ResolvedModel, Settings
from mlx_server.errors import ModelLoadError, ServerError, SettingError
from mlx_server.pulse import Pulse
from mlx_server.status import Failed, Loading, Ready, Resolved
from mlx_server.supervisor.child import Child, Children
from mlx_server.supervisor.listener import StartError, answers, bind, client_url, is_loopback
from mlx_server.supervisor.screen import Screen

_log = logging.getLogger(__name__)

DRAIN_S = 30.0  # the API process ends by itself after this time; it gets some seconds more before it is killed
DRAIN_MARGIN_S = 5.0
ENGINE_GRACE_S = 5.0
# An engine whose loop stands still for so long, and for that many of its slowest steps, hangs.
HANG_S = 30.0
HANG_STEPS = 10
WATCH_INTERVAL_S = 1.0
NUM_LATE = 3  # times in a row that it must look so: after a pause of the whole machine all look late, but once
LEAST_MEMORY_SHARE = 1 / 8
HEALTH_INTERVAL_S = 0.1
MAX_SOCKET_PATH_BYTES = 100  # macOS has 104

_OPEN_SERVER_WARNING = (
    "anyone who can reach this machine can use the server: set a key with --api-key, or bind to --host 127.0.0.1"
)


class Commands(msgspec.Struct, frozen=True):
    """How the children are started, up to the arguments that the supervisor adds."""

    fetch: tuple[str, ...] = (sys.executable, "-m", "mlx_server.fetch")  # MODEL WORKING_DIR --status-fd N
    engine: tuple[str, ...] = (sys.executable, "-m", "mlx_server.engine")  # RUN_DIR --memory-share S --status-fd N
    api: tuple[str, ...] = (sys.executable, "-m", "mlx_server.api")  # RUN_DIR --fd N


class Backoff:
    """Pauses before restarts: 0.5 s, doubled up to 30 s, from 0.5 s again when a process lived for a minute."""

    FIRST_S = 0.5
    MAX_S = 30.0
    RESET_S = 60.0

    def __init__(self) -> None:
        self._next_s = self.FIRST_S

    def pause_s(self, uptime_s: float) -> float:
        pause_s = self.FIRST_S if uptime_s >= self.RESET_S else self._next_s
        self._next_s = min(2 * pause_s, self.MAX_S)
        return pause_s


def serve(settings: Settings, commands: Commands | None = None) -> int:
    """Run a server until it is stopped by a signal; the exit code.

    Raises:
        SettingError: host or port can't be bound, or a key is required.
        ModelLoadError: the model can't be found, downloaded or loaded.
        StartError: something else keeps the server from starting.
    """
    log.configure(settings.log_level, "server")
    with bind(settings.host, settings.port) as listener, _run_directory() as run_dir:
        if settings.require_key and settings.api_key is None and not is_loopback(listener):
            raise SettingError("--require-key: set a key with MLX_SERVER_API_KEY, or bind to --host 127.0.0.1")
        return asyncio.run(Supervisor(settings, commands or Commands(), listener, run_dir).run())


@contextlib.contextmanager
def _run_directory() -> Iterator[Path]:
    """A directory that only this user can enter, for what the children read and the engine's socket."""
    run_dir = Path(tempfile.mkdtemp(prefix="mlx-server-"))
    if len(os.fsencode(_engine_socket(run_dir))) > MAX_SOCKET_PATH_BYTES:
        run_dir.rmdir()
        run_dir = Path(tempfile.mkdtemp(prefix="mlx-server-", dir="/tmp"))
    try:
        yield run_dir
    finally:
        shutil.rmtree(run_dir, ignore_errors=True)


def _engine_socket(run_dir: Path) -> Path:
    return run_dir / "engine.sock"


class Supervisor:
    """Runs in one thread. The first signal cancels what runs and stops the children in order, a second kills them."""

    def __init__(self, settings: Settings, commands: Commands, listener: socket.socket, run_dir: Path) -> None:
        self._settings = settings
        self._commands = commands
        self._listener = listener
        self._run_dir = run_dir
        self._children = Children(run_dir)
        self._pulse = Pulse(run_dir)
        self._engine: Child | None = None
        self._api: Child | None = None
        self._screen = Screen()
        self._is_announced = False
        self._memory_share = 1.0  # of what the engine may use beside the weights; halved when memory ran out
        self._stop = asyncio.Event()
        self._exit_code = 0

    async def run(self) -> int:
        for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            if signal.getsignal(signum) is not signal.SIG_IGN:  # nohup
                asyncio.get_running_loop().add_signal_handler(signum, self._on_signal, signum)
        serving = asyncio.create_task(self._serve())
        stopping = asyncio.create_task(self._stop.wait())
        try:
            await asyncio.wait({serving, stopping}, return_when=asyncio.FIRST_COMPLETED)
            if serving.done():
                serving.result()  # raises: there is no other end
            serving.cancel()
            await asyncio.gather(serving, return_exceptions=True)
            await self._drain()
        finally:
            stopping.cancel()
            await self._children.kill()
        return self._exit_code

    def _on_signal(self, signum: int) -> None:
        if self._stop.is_set():
            self._exit_code = 128 + signum
            self._children.send_kill()
        self._stop.set()

    async def _drain(self) -> None:
        """Take no more connections, let running requests finish, then stop the engine."""
        self._listener.close()
        if self._api is None or self._engine is None:
            return  # nothing was served yet
        _log.info("stopping when the running requests are finished; a second signal ends them now")
        await self._api.stop(grace_s=DRAIN_S + DRAIN_MARGIN_S)
        await self._engine.stop(grace_s=ENGINE_GRACE_S)

    # --- start ---

    async def _serve(self) -> None:
        """Raises when the server can't start; else it goes on until it is cancelled."""
        model = await self._fetch_model()
        self._screen.line("Model", model.name)
        Launch(self._settings, model, f"ipc://{_engine_socket(self._run_dir)}").write(self._run_dir)
        lines = await self._start_engine()
        for heading, text in lines.items():
            self._screen.line(heading, text)
        keepers = [asyncio.create_task(keep) for keep in (self._keep_engine(), self._keep_api(), self._announce())]
        try:
            await asyncio.gather(*keepers)
        finally:
            for keeper in keepers:
                keeper.cancel()

    async def _fetch_model(self) -> ResolvedModel:
        command = [*self._commands.fetch, self._settings.model, str(Path.cwd())]
        child = await self._children.start_reporting("fetch", command, stdout_fd=1)  # it draws on the start screen
        try:
            async for event in child.events():
                match event:
                    case Resolved(model):
                        return model
                    case Failed(message):
                        raise ModelLoadError(message)
            raise StartError(f"the process that looks for the model ended with {await child.wait()}")
        finally:
            child.send_kill()
            self._screen.restore()

    async def _start_engine(self) -> dict[str, str]:
        """Load the model; what the start screen shows of it.

        Raises:
            ModelLoadError: as the engine says.
            StartError: it ended without saying why.
        """
        command = [*self._commands.engine, str(self._run_dir), "--memory-share", str(self._memory_share)]
        self._engine = engine = await self._children.start_reporting("engine", command)
        async for event in engine.events():
            match event:
                case Loading(message) if not self._is_announced:
                    self._screen.line("Loading", message)
                case Ready(lines):
                    return lines
                case Failed(message):
                    await engine.kill()
                    raise ModelLoadError(message)
        raise StartError(f"the engine process ended with {await engine.wait()} while it loaded the model")

    async def _announce(self) -> None:
        while not await answers(self._listener):  # noqa: ASYNC110 - the event is in another process
            await asyncio.sleep(HEALTH_INTERVAL_S)
        self._is_announced = True
        if self._settings.api_key is None and not is_loopback(self._listener):
            self._screen.warn(_OPEN_SERVER_WARNING)
            if not sys.stderr.isatty():
                _log.warning(_OPEN_SERVER_WARNING)
        self._screen.ready(client_url(self._listener), has_key=self._settings.api_key is not None)

    # --- keep alive ---

    async def _keep_engine(self) -> None:
        assert self._engine is not None
        clock = asyncio.get_running_loop().time
        backoff = Backoff()
        ready_s = clock()
        while True:
            watch = asyncio.create_task(self._watch(self._engine))
            end = await self._engine.wait()
            watch.cancel()
            pause_s = backoff.pause_s(uptime_s=clock() - ready_s)
            _log.error("the engine process ended with %s; it starts again in %.1f s", end, pause_s)
            if self._engine.may_have_run_out_of_memory:
                self._memory_share = max(self._memory_share / 2, LEAST_MEMORY_SHARE)
                _log.warning("from now on it uses %.4g of the memory beside the weights", self._memory_share)
            await asyncio.sleep(pause_s)
            try:
                lines = await self._start_engine()
                _log.info("the engine is ready again: %s", ", ".join(map(" ".join, lines.items())))
            except (ServerError, OSError) as error:
                _log.error("the engine could not be started again: %s", error)
            ready_s = clock()

    async def _watch(self, engine: Child) -> None:
        """End the engine if it hangs."""
        num_late = 0
        while num_late < NUM_LATE:
            await asyncio.sleep(WATCH_INTERVAL_S)
            num_late = num_late + 1 if self._pulse.is_late(HANG_S, HANG_STEPS) else 0
        _log.error("the engine has made no step for %.0f s; it is killed, these are its stacks", HANG_S)
        engine.send_signal(STACKS_SIGNAL)
        await asyncio.sleep(WATCH_INTERVAL_S)
        engine.send_kill()

    async def _keep_api(self) -> None:
        clock = asyncio.get_running_loop().time
        backoff = Backoff()
        listener_fd = self._listener.fileno()
        command = [*self._commands.api, str(self._run_dir), "--fd", str(listener_fd)]
        while True:
            start_s = clock()
            self._api = await self._children.start("API", command, pass_fds=[listener_fd])
            end = await self._api.wait()
            if not self._is_announced:
                raise StartError(f"the API process ended with {end} before it could serve")
            pause_s = backoff.pause_s(uptime_s=clock() - start_s)
            _log.error("the API process ended with %s; it starts again in %.1f s", end, pause_s)
            await asyncio.sleep(pause_s)
