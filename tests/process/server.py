"""`mlx-server` with stand-ins for the supervisor's children."""

import functools
import sys
from pathlib import Path

import mlx_server.supervisor
from mlx_server.cli import main
from mlx_server.supervisor import Commands, serve

_standin = (sys.executable, str(Path(__file__).with_name("standin.py")))
_commands = Commands((*_standin, "fetch"), (*_standin, "engine"), (*_standin, "api"))

mlx_server.supervisor.serve = functools.partial(serve, commands=_commands)
main()
