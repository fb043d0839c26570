"""What a request asks of the engine: its choices, each with its prompt, its grammar and the reader of its output."""

import uuid
from dataclasses import dataclass, replace

import msgspec

from mlx_server.chat.choice import ChoiceStream, ThinkingBudget
from mlx_server.chat.grammar import Thoughts, chat_grammar, text_grammar
from mlx_server.chat.logprobs import LogprobTape
from mlx_server.chat.output_router import OutputRouter
from mlx_server.chat.prompt import (
    REASONING_SWITCHES,
    ChatPrompt,
    chat_tokens,
    check_length,
    completion_tokens,
    is_enabled,
    render_chat,
)
from mlx_server.chat.reasoning import ReasoningParser, opens_reasoning
from mlx_server.chat.served_model import ServedModel
from mlx_server.chat.tool_parsers.base import quoted
from mlx_server.chat.types import ChatRequest, CompletionRequest, GenerationRequest, Tool
from mlx_server.errors import InvalidRequestError
from mlx_server.wire import EngineInfo, Submit

_NUM_CONTEXT_TOKENS = 8  # of the text that an answer continues: whether a space begins it
# How much of max_tokens a model may think, where its template does not know the effort.
_EFFORT_SHARES = {"minimal": 0.1, "low": 0.2, "medium": 0.5, "high": 0.8, "xhigh": 0.9, "max": 0.95}


def plan(
    model: ServedModel, request: ChatRequest | CompletionRequest, info: EngineInfo, deadline_s: float
) -> list[ChoiceStream]:
    """The request's choices, in the order of their index. InvalidRequestError if it can't be served."""
    for token_id in request.stop_token_ids:
        if not 0 <= token_id < info.vocab_size:
            fault = f"`stop_token_ids`: token ids of this model are 0 to {info.vocab_size - 1}."
            raise InvalidRequestError(fault, param="stop_token_ids")
    if isinstance(request, ChatRequest):
        return _plan_chat(model, request, info, deadline_s)
    return _plan_completion(model, request, info, deadline_s)


def _plan_completion(
    model: ServedModel, request: CompletionRequest, info: EngineInfo, deadline_s: float
) -> list[ChoiceStream]:
    grammar = None if request.grammar is None else text_grammar(request.grammar)
    choices: list[ChoiceStream] = []
    for prompt, token_ids in zip(request.prompts, completion_tokens(model, request, info), strict=True):
        submit = msgspec.structs.replace(
            _submit(model, request, token_ids, info, deadline_s),
            grammar=grammar,
            prompt_logprobs=request.prompt_logprobs,
        )
        echo = "" if not request.echo else prompt if isinstance(prompt, str) else model.tokenizer.decode(prompt)
        for k in range(request.n):
            tape = _tape(model, request)
            router = OutputRouter(len(choices), stop=request.stop, tape=tape)
            stream = model.tokenizer.stream(after=token_ids[-_NUM_CONTEXT_TOKENS:])
            choice = ChoiceStream(router, _nth(submit, k), model.tokenizer, stream, tape=tape, echo=echo)
            choice.shows_progress = request.progress
            choices.append(choice)
    return choices


def _plan_chat(model: ServedModel, request: ChatRequest, info: EngineInfo, deadline_s: float) -> list[ChoiceStream]:
    token_ids, thinking = _chat_prompt(model, request, info)
    check_length(token_ids, info, "messages", room=1)
    tools = _callable_tools(model, request)
    submit = msgspec.structs.replace(
        _submit(model, request, token_ids, info, deadline_s), grammar=_grammar(model, request, tools, thinking.state)
    )
    budget = None
    if thinking.budget is not None and thinking.state != "none":
        close_ids = model.tokenizer.encode(thinking.close)
        budget = ThinkingBudget(thinking.budget, thinking.close, close_ids, _grammar(model, request, tools, "none"))
    choices = []
    for k in range(request.n):
        tape = _tape(model, request)
        router = _router(k, model, request, tools, thinking.state, tape)
        stream = model.tokenizer.stream(after=token_ids[-_NUM_CONTEXT_TOKENS:], keep=_markup(model, tools))
        choice = ChoiceStream(router, _nth(submit, k), model.tokenizer, stream, tape=tape, budget=budget)
        choice.shows_progress = request.progress
        choices.append(choice)
    return choices


def count_prompt_tokens(model: ServedModel, request: ChatRequest, info: EngineInfo) -> int:
    """Those that the request's usage will tell, whatever its max_tokens; also more than the context takes."""
    return len(_chat_prompt(model, request, info)[0])


def _submit(
    model: ServedModel, request: GenerationRequest, token_ids: list[int], info: EngineInfo, deadline_s: float
) -> Submit:
    """What all choices have in common."""
    end_token_ids = {*request.stop_token_ids, *([] if request.ignore_eos else model.end_token_ids)}
    return Submit(
        request_id="",
        prompt_token_ids=token_ids,
        max_tokens=min(request.max_tokens, info.context_length - len(token_ids)),
        end_token_ids=sorted(end_token_ids),
        sampling=request.sampling,
        priority=request.priority,
        client=request.client,
        cache_salt=request.cache_salt,
        deadline_s=deadline_s,
        progress=True,  # it tells what was cached, also of a request that is ended early
    )


def _nth(submit: Submit, k: int) -> Submit:
    """The submit of a prompt's choice k."""
    sampling = msgspec.structs.replace(submit.sampling, seed=(submit.sampling.seed + k) % 2**64)
    return msgspec.structs.replace(submit, request_id=uuid.uuid4().hex, sampling=sampling)


def _tape(model: ServedModel, request: GenerationRequest) -> LogprobTape | None:
    return None if request.sampling.logprobs is None else LogprobTape(model.tokenizer.token_bytes)


# --- Tools ---


def _callable_tools(model: ServedModel, request: ChatRequest) -> list[Tool]:
    """Those that the answer may call. InvalidRequestError if there are none, but there must be a call."""
    choice = request.tool_choice
    names = {tool.name for tool in request.tools}
    for name in names:
        if not model.tool_parser.tool_names.fullmatch(name):
            fault = f"`tools`: the model's format of calls has no way to write the name {name[:64]!r}."
            raise InvalidRequestError(fault, param="tools")
    for name in choice.allowed:
        if name not in names:
            raise InvalidRequestError(f"`tool_choice`: there is no tool {name[:64]!r}.", param="tool_choice")
    if choice.mode == "none":
        return []
    if choice.mode == "required" and not names:
        raise InvalidRequestError("`tool_choice` asks for a call, but there are no `tools`.", param="tool_choice")
    return [tool for tool in request.tools if not choice.allowed or tool.name in choice.allowed]


def _markup(model: ServedModel, tools: list[Tool]) -> list[str]:
    """Special tokens that the router must see."""
    return [*(model.tool_parser.special_tokens if tools else ()), *(model.reasoning_tags or ())]


def _router(
    index: int, model: ServedModel, request: ChatRequest, tools: list[Tool], state: Thoughts, tape: LogprobTape | None
) -> OutputRouter:
    reasoning = parser = None
    if model.reasoning_tags is not None and (state == "open" or not request.continue_final_message):
        reasoning = ReasoningParser(model.reasoning_tags, is_open=state == "open")
    if tools:
        refused = {tool.name for tool in request.tools} - {tool.name for tool in tools}
        parser = model.tool_parser(tools, refused)
    return OutputRouter(
        index,
        reasoning=reasoning,
        tools=parser,
        stop=request.stop,
        max_calls=None if request.parallel_tool_calls else 1,
        tape=tape,
    )


# --- Thoughts and grammar ---


@dataclass(frozen=True)
class _Thinking:
    """What is known of an answer's thoughts before it begins."""

    state: Thoughts = "none"
    close: str = ""  # the text that ends them
    budget: int | None = None  # tokens


def _chat_prompt(model: ServedModel, request: ChatRequest, info: EngineInfo) -> tuple[list[int], _Thinking]:
    """The prompt's tokens, with the tag that ends the thoughts, if the template begins some that are not wanted."""
    prompt = render_chat(model, request)
    token_ids = chat_tokens(model, prompt, info)
    thinking = _thinking(model, request, prompt, room=info.context_length - len(token_ids))
    if thinking.state == "open" and thinking.budget == 0:
        token_ids = [*token_ids, *model.tokenizer.encode(thinking.close.lstrip())]
        thinking = replace(thinking, state="none")
    return token_ids, thinking


def _thinking(model: ServedModel, request: ChatRequest, prompt: ChatPrompt, room: int) -> _Thinking:
    tags = model.reasoning_tags
    if tags is None:
        return _Thinking()
    state: Thoughts = "none"
    if opens_reasoning(prompt.text, prompt.prefill, tags):
        state = "open"
    elif not request.continue_final_message and is_enabled(request.reasoning) is not False:
        state = "possible"
    return _Thinking(state, f"\n{tags.close}\n\n", _thinking_budget(request, model.template.variables, room))


def _thinking_budget(request: ChatRequest, variables: frozenset[str], room: int) -> int | None:
    """In tokens; None if only max_tokens ends the thoughts."""
    reasoning = request.reasoning
    if is_enabled(reasoning) is False and not REASONING_SWITCHES & variables:
        return 0
    if reasoning.budget_tokens is not None:
        return reasoning.budget_tokens
    if reasoning.effort in _EFFORT_SHARES and "reasoning_effort" not in variables:
        # Only 0 that the client asked for closes the thoughts in the prompt, which must not depend on max_tokens.
        return max(int(_EFFORT_SHARES[reasoning.effort] * min(request.max_tokens, room)), 1)
    return None


def _grammar(model: ServedModel, request: ChatRequest, tools: list[Tool], thoughts: Thoughts) -> str | None:
    def marker(text: str) -> str:
        token_id = model.tokenizer.token_id(text)
        return quoted(text) if token_id is None else f"<[{token_id}]>"

    return chat_grammar(request, tools, model.tool_parser, marker, tags=model.reasoning_tags, thoughts=thoughts)
