"""`mlx-server` with stand-ins for the supervisor's children."""

import functools
import sys
from pathlib import Path

import mlx_server.supervisor
from mlx_server.cli import main
from mlx_server.supervisor import Commands, serve, supervisor

_standin = (sys.executable, str(Path(__file__).with_name("standin.py")))
_commands = Commands((*_standin, "fetch"), (*_standin, "engine"), (*_standin, "api"))

# A hang is noticed soon, but a machine that is busy for a second is none.
supervisor.HANG_S, supervisor.WATCH_INTERVAL_S = 2.0, 0.2
mlx_server.supervisor.serve = functools.partial(serve, commands=_commands)
main()
