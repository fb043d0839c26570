"""The API process as the supervisor starts it, but with a fake model: arguments as in `api_process`."""

import resource
import sys
from pathlib import Path

import msgspec

from fake_engine import fake_model
from mlx_server import log
from mlx_server.api.incoming import ClientLimits
from mlx_server.api.server import Server
from mlx_server.config import Launch

if __name__ == "__main__":
    run_dir = Path(sys.argv[1])
    fd = int(sys.argv[2])
    if max_files := int(sys.argv[4]):
        resource.setrlimit(resource.RLIMIT_NOFILE, (max_files, max_files))
    limits = msgspec.json.decode(sys.argv[3], type=ClientLimits)
    launch = Launch.read(run_dir)
    log.configure(launch.settings.log_level, "api")
    Server(launch, run_dir, fd, load_model=lambda model, _: fake_model(model.name), limits=limits).run()
