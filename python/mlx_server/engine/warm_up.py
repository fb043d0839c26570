"""A first request of our own, so that the first user does not wait for compiled kernels and mapped memory."""

from mlx_server import wire
from mlx_server.engine.core import EngineCore
from mlx_server.errors import ModelLoadError
from mlx_server.sampling_params import SamplingParams

PROMPT_TOKENS = 8
OUTPUT_TOKENS = 2


def warm_up(core: EngineCore) -> None:
    """Prefill and decode once, greedy and sampled. A model that can't is refused here, not at its first request."""
    for name, sampling in {"greedy": SamplingParams(temperature=0.0), "sampled": SamplingParams(top_p=0.9)}.items():
        submit = wire.Submit(name, [0] * PROMPT_TOKENS, OUTPUT_TOKENS, [], sampling)
        if (failed := core.submit(b"", submit)) is not None:
            raise ModelLoadError(f"The model can't run: {failed.message}.")
        while core.has_work:
            for _, output in core.step():
                if isinstance(output, wire.Failed):
                    raise ModelLoadError(f"The model can't run: {output.message}")
