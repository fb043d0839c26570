"""mlx-server: quantized language models on MLX behind OpenAI-compatible HTTP.

Importing the package checks the installation but does not import mlx: only the engine process does.
"""

from importlib import import_module, metadata

from mlx_server._installation import check_packages

check_packages()

__version__ = metadata.version("mlx-server")


def selfcheck() -> None:
    """Loads the extension and passes an array through it. ImportError, one sentence, if the installation is broken."""
    check_packages()
    import_module("mlx_server.ops")  # by name: this package stays free of mlx
