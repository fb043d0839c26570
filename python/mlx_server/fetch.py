"""The process that finds the model on disk or downloads it: `python -m mlx_server.fetch MODEL DIRECTORY --status-fd N`.

A process of its own, because nothing else ends a download at once: it waits in threads for a network.
"""

import argparse
import os

from rich.console import Console

from mlx_server import log
from mlx_server.checkpoint.progress import RichProgress
from mlx_server.checkpoint.resolve import resolve
from mlx_server.errors import ModelLoadError
from mlx_server.status import Failed, Resolved, StatusPipe, end_with_supervisor


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("directory", help="relative paths start here")
    parser.add_argument("--status-fd", type=int, required=True)
    args = parser.parse_args()

    log.configure("info", "server")
    end_with_supervisor()
    status = StatusPipe(args.status_fd)
    os.chdir(args.directory)
    try:
        status.send(Resolved(resolve(args.model, progress=RichProgress(Console()))))
    except ModelLoadError as error:
        status.send(Failed(error.message))


if __name__ == "__main__":
    main()
