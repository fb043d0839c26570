"""What drafts gain on the demo model: a text that repeats itself, one that is to be repeated with a small edit, and
free chat, each with and without speculation. All greedy but the sampled chat; the tokens are the same either way."""

import pytest

from mlx_server import wire
from mlx_server.chat.tokenizer import Tokenizer
from mlx_server.engine.assembly import make_engine_core
from mlx_server.engine.memory import plan_memory
from mlx_server.engine.speculation import Speculator
from mlx_server.models.loader import load_model
from mlx_server.sampling_params import SamplingParams

TEXT = """The harbour town of Ellerby lies where the river Marn meets the sea. Its market is held each Thursday, \
and people come from as far as Stonebridge to buy fish, rope and lamp oil. In 1843 a storm took the old lighthouse, \
and the council asked an engineer from the north, Miss Adelaide Crane, to build a new one. She chose granite from the \
quarry at Hallow Hill, had it cut into blocks of one ton, and set them without mortar. The work took four winters. \
When the lamp was lit for the first time, the fishermen of Ellerby rowed out beyond the bar to see it, and sang."""
EDIT = f"Repeat this text word for word, but write Northby instead of Ellerby:\n\n{TEXT}"
# The answer's begin is given: so small a model does not do as it is told otherwise. It leaves out a sentence or two.
BEGUN = "The harbour town of Northby lies where the river Marn"
WEEK = "Monday, Tuesday, Wednesday, Thursday, Friday, Saturday, Sunday, "
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
GREEDY = SamplingParams(temperature=0.0)
SAMPLED = SamplingParams(temperature=0.7, top_p=0.9, seed=1)
# Questions, begin of the answers, their tokens.
TASKS = {
    "repetition": (["Say the days of the week, again and again."], WEEK * 3, 120, GREEDY),
    "repetition, 4 at once": (["Say the days of the week, again and again."] * 4, WEEK * 3, 120, GREEDY),
    "edit": ([EDIT], BEGUN, 75, GREEDY),
    "edit, 4 at once": ([EDIT] * 4, BEGUN, 75, GREEDY),
    "chat": (CHAT[:1], "", 150, GREEDY),
    "chat, sampled": (CHAT[:1], "", 150, SAMPLED),
    "chat, 8 at once": (CHAT, "", 150, SAMPLED),
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
    questions, begun, num_tokens, sampling = TASKS[task]
    benchmark.group = task
    prompts = [
        tokenizer.encode(f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n{begun}")
        for question in questions
    ]

    def complete() -> None:
        for i, prompt in enumerate(prompts):
            assert core.submit(b"", wire.Submit(str(i), prompt, num_tokens, [], sampling)) is None
        while core.has_work:
            core.step()

    benchmark.pedantic(complete, rounds=5, warmup_rounds=1)
    benchmark.extra_info["tokens_per_s"] = round(len(prompts) * num_tokens / benchmark.stats.stats.min, 1)
