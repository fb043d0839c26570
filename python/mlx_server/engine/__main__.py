"""The engine process: `python -m mlx_server.engine RUN_DIR --memory-share S --status-fd N`."""

import argparse
import faulthandler
import logging
import signal
import sys
import time
from pathlib import Path
from typing import Any

from mlx_server import log as logs
from mlx_server import status
from mlx_server.config import STACKS_SIGNAL, Launch
from mlx_server.engine.assembly import make_engine_core
from mlx_server.engine.core import EngineCore
from mlx_server.engine.grammar import Grammars
from mlx_server.engine.memory import apply_limit, is_out_of_memory, memory_use, plan_memory
from mlx_server.engine.speculation import Speculator
from mlx_server.engine.transport import EngineServer
from mlx_server.engine.warm_up import check_model_kernels, measure_step, warm_up
from mlx_server.errors import ModelLoadError
from mlx_server.models.loader import load_model
from mlx_server.ops.kernels import set_batch_invariant
from mlx_server.pulse import Pulse

log = logging.getLogger("mlx_server.engine")  # __name__ is "__main__" here

EXIT_MODEL_ERROR = 2


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("run_dir", type=Path)
    parser.add_argument("--status-fd", type=int, required=True)
    parser.add_argument("--memory-share", type=float, required=True)
    args = parser.parse_args()
    launch = Launch.read(args.run_dir)
    logs.configure(launch.settings.log_level, "engine")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    status.end_with_supervisor(args.run_dir)
    faulthandler.enable()
    faulthandler.register(STACKS_SIGNAL)
    pipe = status.StatusPipe(args.status_fd)
    try:
        core, lines = start(launch, args.memory_share, pipe)
        server = EngineServer(core, launch.engine_address)
        pipe.send(status.Ready(lines))
        server.run(Pulse(args.run_dir))
    except ModelLoadError as error:
        pipe.send(status.Failed(error.message))
        return EXIT_MODEL_ERROR
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        log.exception("memory ran out")
        return status.EXIT_OUT_OF_MEMORY
    return 0


def start(launch: Launch, memory_share: float, pipe: status.StatusPipe) -> tuple[EngineCore, dict[str, str]]:
    """Load the model, check its kernels, size the KV pool, run a first request.

    The core, and what the start screen says of it.
    """
    pipe.send(status.Loading("weights"))
    begin = time.monotonic()
    set_batch_invariant(launch.settings.batch_invariant)
    model = load_model(launch.model.path)
    grammars = Grammars.of_model(Path(launch.model.path), model.vocab_size)  # made while the model warms up
    log.info("weights loaded in %.1f s", time.monotonic() - begin)
    pipe.send(status.Loading("warm-up"))
    check_model_kernels(model, launch.settings.kv_bits)  # before anything else uses them
    limit, step_bytes = launch.settings.memory_limit, measure_step(model)
    budget: dict[str, Any] = {"limit": limit, "share": memory_share, "step_bytes_per_token": step_bytes}
    plan = plan_memory(model, kv_bits=launch.settings.kv_bits, **budget)
    use = memory_use(model, plan, **budget)
    apply_limit(use)
    core = make_engine_core(
        model,
        plan,
        grammars=grammars,
        model_name=launch.model.name,
        max_queue=launch.settings.max_queue,
        speculator=Speculator() if launch.settings.speculation == "on" else None,
    )
    warm_up(core)
    core.reset_stats()
    return core, {"Context": f"{core.info.context_length:,} tokens", "Memory": str(use)}


if __name__ == "__main__":
    sys.exit(main())
