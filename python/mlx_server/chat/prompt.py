"""From a request to the tokens that the engine gets."""

from dataclasses import dataclass
from typing import Any

from mlx_server.chat.messages import in_plain_turns, template_messages, template_tools
from mlx_server.chat.served_model import ServedModel, Tokenizer
from mlx_server.chat.types import ChatRequest, CompletionRequest, Reasoning, Scalar
from mlx_server.errors import ContextLengthError, InvalidRequestError
from mlx_server.wire import EngineInfo

# More bytes a token of context than any real prompt has; longer ones are refused without the work of tokenizing them.
_MAX_BYTES_PER_TOKEN = 8
_CUT = "\ufdd2"  # a code point that Unicode reserves for use inside a program: the end of an unfinished message
REASONING_SWITCHES = frozenset({"enable_thinking", "thinking"})  # variables of templates that turn reasoning on and off
# What models that fill in the middle read before the text, before what comes after the gap, and at the end.
_FIM_TOKENS = (
    ("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>"),  # Qwen
    ("<fim_prefix>", "<fim_suffix>", "<fim_middle>"),  # StarCoder
    ("<fim-prefix>", "<fim-suffix>", "<fim-middle>"),  # SantaCoder
    ("<｜fim▁begin｜>", "<｜fim▁hole｜>", "<｜fim▁end｜>"),  # DeepSeek  # noqa: RUF001
)


@dataclass(frozen=True)
class ChatPrompt:
    """A rendered conversation.

    Attributes:
        text: what the template wrote.
        prefill: the beginning of the answer, with which `text` ends; empty if the client wrote none.
    """

    text: str
    prefill: str


def render_chat(model: ServedModel, request: ChatRequest) -> ChatPrompt:
    """The conversation as the model reads it.

    InvalidRequestError if the template refuses it, or there is no message to continue.
    """
    messages, prefill = list(request.messages), ""
    if request.continue_final_message:
        if messages[-1].role != "assistant" or messages[-1].tool_calls:
            fault = "only a last message of the assistant without tool calls can be continued"
            raise InvalidRequestError(fault, param="messages")
        prefill = messages[-1].content
    shown = template_messages(messages, request.tools, model.template)
    if request.continue_final_message:
        shown[-1]["content"] += _CUT
    try:
        text = _render(model, request, shown)
    except InvalidRequestError as error:
        if error.code != "chat_template_error" or (changed := in_plain_turns(shown)) is None:
            raise
        text = _render(model, request, changed)
    if request.continue_final_message:
        text, found, _ = text.rpartition(_CUT)
        if not found:
            raise InvalidRequestError("the model's chat template leaves out the last message", param="messages")
    return ChatPrompt(text, prefill)


def _render(model: ServedModel, request: ChatRequest, messages: list[dict[str, Any]]) -> str:
    return model.template.render(
        messages,
        tools=template_tools(request.tools) if "tools" in model.template.variables else None,
        add_generation_prompt=request.add_generation_prompt and not request.continue_final_message,
        template_kwargs=request.template_kwargs | _reasoning_kwargs(request, model.template.variables),
    )


def _reasoning_kwargs(request: ChatRequest, variables: frozenset[str]) -> dict[str, Scalar]:
    """The template's variables for what the request says of reasoning, unless it sets them itself."""
    kwargs: dict[str, Scalar] = {}
    if (enabled := is_enabled(request.reasoning)) is not None:
        kwargs |= dict.fromkeys(REASONING_SWITCHES, enabled)
    if (effort := request.reasoning.effort) is not None:
        kwargs["reasoning_effort"] = effort
    return {name: kwargs[name] for name in kwargs.keys() & variables - request.template_kwargs.keys()}


def is_enabled(reasoning: Reasoning) -> bool | None:
    """Whether the model thinks; None: as it does by itself."""
    if reasoning.effort == "none":
        return False
    return reasoning.enabled


def chat_tokens(model: ServedModel, prompt: ChatPrompt, info: EngineInfo) -> list[int]:
    """The prompt's token ids, however many; but ContextLengthError if the text is too long to be worth the work."""
    check_size(prompt.text, info, "messages")
    return model.tokenizer.encode_chat(prompt.text)


def completion_tokens(model: ServedModel, request: CompletionRequest, info: EngineInfo) -> list[list[int]]:
    """Each prompt's token ids. InvalidRequestError if one leaves no room, or the model can't fill in the middle."""
    room = min(request.max_tokens, 1)
    return [_completion_tokens(model, prompt, request.suffix, info, room) for prompt in request.prompts]


def _completion_tokens(
    model: ServedModel, prompt: str | list[int], suffix: str | None, info: EngineInfo, room: int
) -> list[int]:
    if isinstance(prompt, list):
        if suffix is not None:
            raise InvalidRequestError("`suffix` needs a prompt that is text.", param="suffix")
        check_token_ids(prompt, info, "prompt")
        token_ids = prompt
    else:
        check_size(prompt, info, "prompt")
        if suffix is None:
            token_ids = model.tokenizer.encode(prompt, add_special_tokens=True)
        else:
            check_size(suffix, info, "suffix")
            token_ids = _fill_in_the_middle(model.tokenizer, prompt, suffix)
    check_length(token_ids, info, "prompt", room)
    return token_ids


def _fill_in_the_middle(tokenizer: Tokenizer, prefix: str, suffix: str) -> list[int]:
    for tokens in _FIM_TOKENS:
        before, gap, end = map(tokenizer.token_id, tokens)
        if before is not None and gap is not None and end is not None:
            bos = tokenizer.encode("", add_special_tokens=True)
            return [*bos, before, *tokenizer.encode(prefix), gap, *tokenizer.encode(suffix), end]
    fault = "`suffix`: this model has no tokens for filling in the middle."
    raise InvalidRequestError(fault, param="suffix", code="unsupported")


def check_token_ids(token_ids: list[int], info: EngineInfo, param: str) -> None:
    """InvalidRequestError unless the model has all these tokens."""
    if any(not 0 <= token_id < info.vocab_size for token_id in token_ids):
        fault = f"`{param}`: token ids of this model are 0 to {info.vocab_size - 1}."
        raise InvalidRequestError(fault, param=param)


def check_size(text: str, info: EngineInfo, param: str) -> None:
    """InvalidRequestError if a text is surely too long, before the work of tokenizing it."""
    size_bytes = len(text.encode())
    if size_bytes > _MAX_BYTES_PER_TOKEN * info.context_length:
        length = f"{size_bytes} bytes"
        raise _too_long(info, param, length, f", more than {_MAX_BYTES_PER_TOKEN} for each of them")


def check_length(token_ids: list[int], info: EngineInfo, param: str, room: int) -> None:
    """InvalidRequestError unless there are tokens, and as much room for the answer."""
    if len(token_ids) + room > info.context_length:
        consequence = ", which leaves no room for an answer" if room else ""
        raise _too_long(info, param, f"{len(token_ids)} tokens", consequence)
    if not token_ids:
        raise InvalidRequestError("The prompt is empty.", param=param)


def _too_long(info: EngineInfo, param: str, length: str, remark: str) -> ContextLengthError:
    why = " here, as the KV cache holds no more (see --memory-limit)" if info.limited_by_memory else ""
    subject = "the messages are" if param == "messages" else f"the {param} is"
    return ContextLengthError(
        f"This model's maximum context length is {info.context_length} tokens{why}, but {subject} {length}{remark}.",
        f"prompt is too long: {length} > {info.context_length} tokens maximum{why}",
        param=param,
    )
