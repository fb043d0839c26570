"""What drafts gain on the demo model: a text that is to be repeated with a small edit, and free chat, each with and
without speculation. All greedy but the sampled chat; the tokens are the same either way."""

import pytest

from mlx_server import wire
from mlx_server.chat.tokenizer import Tokenizer
from mlx_server.engine.assembly import make_engine_core
from mlx_server.engine.memory import plan_memory
from mlx_server.engine.speculation import Speculator
from mlx_server.models.loader import load_model
from mlx_server.sampling_params import SamplingParams

ANSWER_TOKENS = 200
TEXT = """The harbour town of Ellerby lies where the river Marn meets the sea. Its market is held each Thursday, \
and people come from as far as Stonebridge to buy fish, rope and lamp oil. In 1843 a storm took the old lighthouse, \
and the council asked an engineer from the north, Miss Adelaide Crane, to build a new one. She chose granite from the \
quarry at Hallow Hill, had it cut into blocks of one ton, and set them without mortar. The work took four winters. \
When the lamp was lit for the first time, the fishermen of Ellerby rowed out beyond the bar to see it, and sang."""
EDIT = f"Repeat this text word for word, but write Northby instead of Ellerby:\n\n{TEXT}"
CHAT = [
    "Why is the sky blue?",
    "Tell me a story about a fox who learns to read.",
    "What should I think about before I buy a bicycle?",
    "Explain how bread rises.",
    "Write a letter to a friend who has moved to another country.",
    "What are the differences between a lake and a pond?",
    "Give me advice for my first day at a new job.",
    "How does a sailing boat move against the wind?",
]
TASKS = {
    "edit": ([EDIT], SamplingParams(temperature=0.0)),
    "edit, 4 at once": ([EDIT] * 4, SamplingParams(temperature=0.0)),
    "chat": (CHAT[:2], SamplingParams(temperature=0.0)),
    "chat, sampled": (CHAT[:2], SamplingParams(temperature=0.7, top_p=0.9, seed=1)),
    "chat, 8 at once": (CHAT, SamplingParams(temperature=0.7, top_p=0.9, seed=1)),
}


@pytest.fixture(scope="module")
def model(demo_gguf):
    return load_model(str(demo_gguf))


@pytest.fixture(scope="module")
def tokenizer(demo_gguf):
    return Tokenizer.load(demo_gguf)


@pytest.mark.parametrize("speculation", ["off", "on"])
@pytest.mark.parametrize("task", TASKS)
def bench_speculation(benchmark, model, tokenizer, task, speculation):
    core = make_engine_core(model, plan_memory(model), speculator=Speculator() if speculation == "on" else None)
    texts, sampling = TASKS[task]
    benchmark.group = task
    prompts = [tokenizer.encode(f"<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n") for text in texts]

    def complete() -> None:
        for i, prompt in enumerate(prompts):
            assert core.submit(b"", wire.Submit(str(i), prompt, ANSWER_TOKENS, [], sampling)) is None
        while core.has_work:
            core.step()

    benchmark.pedantic(complete, rounds=5, warmup_rounds=1)
    benchmark.extra_info["tokens_per_s"] = round(len(prompts) * ANSWER_TOKENS / benchmark.stats.stats.min, 1)
