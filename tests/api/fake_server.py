"""The API process as the supervisor starts it, but with a fake model: `fake_server.py RUN_DIR FD DRAIN_S`."""

import sys
from pathlib import Path

from fake_engine import fake_model
from mlx_server import log
from mlx_server.api.server import Server
from mlx_server.config import Launch

if __name__ == "__main__":
    run_dir, fd, drain_s = sys.argv[1:]
    launch = Launch.read(Path(run_dir))
    log.configure(launch.settings.log_level, "api")
    Server(launch, Path(run_dir), int(fd), load_model=lambda model: fake_model(model.name), drain_s=int(drain_s)).run()
