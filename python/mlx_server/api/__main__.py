"""The API process: `python -m mlx_server.api RUN_DIR --fd N`, started by the supervisor."""

import argparse
from pathlib import Path

from mlx_server import log
from mlx_server.api.server import Server
from mlx_server.config import Launch


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("run_dir", type=Path)
    parser.add_argument("--fd", type=int, required=True, help="a listening socket")
    args = parser.parse_args()
    launch = Launch.read(args.run_dir)
    log.configure(launch.settings.log_level, "api")
    Server(launch, args.run_dir, args.fd).run()


if __name__ == "__main__":
    main()
