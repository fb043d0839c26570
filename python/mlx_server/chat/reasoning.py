"""Where a model's thoughts begin and end."""

from collections.abc import Callable
from typing import NamedTuple

from mlx_server.chat.incremental import IncrementalParser, Thought, Wait, held_back


class Tags(NamedTuple):
    open: str
    close: str


_KNOWN = (
    Tags("<think>", "</think>"),  # DeepSeek, Qwen, GLM, SmolLM3 …
    Tags("[THINK]", "[/THINK]"),  # Magistral
    Tags("<seed:think>", "</seed:think>"),
    Tags("<|START_THINKING|>", "<|END_THINKING|>"),  # Command A
    Tags("<thinking>", "</thinking>"),
    Tags("<thought>", "</thought>"),
    Tags("<reasoning>", "</reasoning>"),
    Tags("◁think▷", "◁/think▷"),  # Kimi
)


def reasoning_tags(template_source: str, has_token: Callable[[str], bool]) -> Tags | None:
    """The tags that the template writes or looks for, or else those that are tokens of the model."""
    for tags in _KNOWN:
        if tags.open in template_source or tags.close in template_source:
            return tags
    return next((tags for tags in _KNOWN if has_token(tags.open) and has_token(tags.close)), None)


def opens_reasoning(prompt: str, prefill: str, tags: Tags) -> bool:
    """Whether the answer begins inside the thoughts: the template, or the beginning of the answer, has opened them.

    Args:
        prompt: as the template wrote it.
        prefill: the beginning of the answer, if the client wrote one; `prompt` ends with it.
    """
    if prefill:
        return prefill.rfind(tags.open) > prefill.rfind(tags.close)
    return prompt.rstrip().endswith(tags.open)


class ReasoningParser(IncrementalParser):
    """Splits an answer into thoughts and text. Tags later than at the beginning are text: answers may speak of them.

    White space inside and after the tags belongs to them.

    Attributes:
        is_open: the text so far ends inside the thoughts.
        is_done: thoughts are over, or there were none.
    """

    def __init__(self, tags: Tags, *, is_open: bool) -> None:
        self._tags = tags
        self.is_open = is_open
        self.is_done = False
        super().__init__()

    def parse(self) -> Wait[None]:
        if not self.is_open:
            yield from self.space()
            self.is_open = yield from self.literal(self._tags.open)
        if self.is_open:
            yield from self.space()
            yield from self._thoughts()
            yield from self.space()
            self.drop_read()
        self.is_done = True

    def _thoughts(self) -> Wait[None]:
        """Read up to the closing tag, or to the end."""
        close = self._tags.close
        while True:
            self.drop_read()
            end = self._text.find(close)
            size = end if end >= 0 else len(self._text) - held_back(self._text, [close])
            self._give_thought(size)
            if end >= 0:
                self._at = self._text.index(close) + len(close)
                self.is_open = False
                return
            if not (yield from self.more()):
                self._give_thought(len(self._text))
                self._at = len(self._text)
                return

    def _give_thought(self, end: int) -> None:
        """Give what comes before `end`, but for white space at its end, which waits for what comes after it."""
        if thought := self._text[:end].rstrip():
            self.give(Thought(thought))
            self._drop(len(thought))
