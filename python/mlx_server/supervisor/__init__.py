"""The process that the user starts: it binds the port, runs engine and API processes and keeps them alive.

Imports neither mlx nor gunicorn, and does nothing that could block: a Ctrl-C works at any time.
"""

from mlx_server.supervisor.supervisor import Commands, serve

__all__ = ["Commands", "serve"]
