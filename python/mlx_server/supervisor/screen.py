"""What the server shows on standard output while it starts; everything later is the log, on standard error."""

import os
import shlex
import sys

from rich.console import Console
from rich.text import Text

_EXAMPLE_BODY = '{"model": "default", "messages": [{"role": "user", "content": "What is the capital of France?"}]}'


class _Console(Console):
    def on_broken_pipe(self) -> None:
        """The reader of standard output is gone; the server goes on without it."""
        self.quiet = True
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


class Screen:
    """Lines of a heading and a text."""

    def __init__(self) -> None:
        self._console = _Console(highlight=False)

    def line(self, heading: str, text: str, style: str = "bold") -> None:
        # Soft wrapping: a command that is pasted must not hold line breaks.
        self._console.print(Text.assemble("  ", (f"{heading:<9}", style), " ", text), soft_wrap=True)

    def warn(self, text: str) -> None:
        self.line("Warning", text, "bold yellow")

    def restore(self) -> None:
        """Undo what a process that was killed while it drew a progress bar has left."""
        if self._console.is_terminal:
            self._console.show_cursor()

    def ready(self, url: str, *, has_key: bool) -> None:
        """Where the server is, and a request to paste. The key itself is never shown."""
        key_header = ' -H "authorization: Bearer $MLX_SERVER_API_KEY"' if has_key else ""
        client_key = '"$MLX_SERVER_API_KEY"' if has_key else "none"
        self.line("Ready", url, "bold green")
        self.line("OpenAI", f"OPENAI_BASE_URL={url}/v1 OPENAI_API_KEY={client_key}")
        self.line("Anthropic", f"ANTHROPIC_BASE_URL={url} ANTHROPIC_API_KEY={client_key}")
        headers = f"-H 'content-type: application/json'{key_header}"
        self.line("Try", f"curl {shlex.quote(url + '/v1/chat/completions')} {headers} -d {shlex.quote(_EXAMPLE_BODY)}")
