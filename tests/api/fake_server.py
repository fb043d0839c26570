"""The API process as the supervisor starts it, but with a fake model: arguments as in `api_process`."""

import sys
from pathlib import Path

from fake_engine import fake_model
from mlx_server import log
from mlx_server.api.server import Server
from mlx_server.config import Launch

if __name__ == "__main__":
    run_dir = Path(sys.argv[1])
    fd, drain_s, send_timeout_s = map(int, sys.argv[2:])
    launch = Launch.read(run_dir)
    log.configure(launch.settings.log_level, "api")
    server = Server(
        launch,
        run_dir,
        fd,
        load_model=lambda model: fake_model(model.name),
        drain_s=drain_s,
        send_timeout_s=send_timeout_s,
    )
    server.run()
