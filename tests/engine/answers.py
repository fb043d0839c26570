"""What requests get from an engine on a real (tiny) model."""

from dataclasses import dataclass
from typing import Any

from engine.test_runner import make_core
from engine.test_scheduler import API, Collector
from grammars import TinyGrammars
from mlx_server import wire
from mlx_server.engine.core import EngineCore
from mlx_server.models.base import Model
from mlx_server.sampling_params import SamplingParams


@dataclass
class Answer:
    token_ids: list[int]
    end: wire.Finished
    logprobs: list[wire.TokenLogprobs]
    prompt_logprobs: list[wire.TokenLogprobs] | None

    @property
    def all_token_ids(self) -> list[int]:
        stop_token_id = self.end.stop_token_id
        return self.token_ids if stop_token_id is None else [*self.token_ids, stop_token_id]


def answers(model: Model, *messages: wire.Submit, **core: Any) -> list[Answer]:
    """What the requests get, all in one engine of their own."""
    return run(make_core(model, grammars=TinyGrammars(model.vocab_size), **core), *messages)


def run(engine: EngineCore, *messages: wire.Submit) -> list[Answer]:
    """What the requests get together."""
    collector = Collector()
    logprobs: dict[str, list[wire.TokenLogprobs]] = {message.request_id: [] for message in messages}
    prompt_logprobs: dict[str, list[wire.TokenLogprobs]] = {}
    for message in messages:
        assert engine.submit(API, message) is None
    while engine.has_work:
        outputs = engine.step()
        collector.take(outputs)
        for _, output in outputs:
            assert isinstance(output, wire.Tokens | wire.Finished), output
            if output.logprobs is not None:
                assert len(output.logprobs) == len(output.token_ids)
                logprobs[output.request_id] += output.logprobs
            if output.prompt_logprobs is not None:
                assert output.request_id not in prompt_logprobs
                prompt_logprobs[output.request_id] = output.prompt_logprobs
    result = []
    for message in messages:
        name = message.request_id
        end = collector.ends[name]
        assert isinstance(end, wire.Finished)
        result.append(Answer(collector.tokens[name], end, logprobs[name], prompt_logprobs.get(name)))
    return result


def submit(name: str, prompt: list[int], max_tokens: int = 12, **params: Any) -> wire.Submit:
    return wire.Submit(name, prompt, max_tokens, [], SamplingParams(**{"temperature": 0.0} | params))
