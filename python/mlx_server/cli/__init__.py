"""The command `mlx-server`."""

import os
import re
import socket
import sys
from collections.abc import Callable
from typing import Any, TypeVar

import click
import msgspec
from click.core import ParameterSource

from mlx_server.chat.tool_parsers import TOOL_PARSERS
from mlx_server.config import Settings, memory_bytes
from mlx_server.errors import ModelLoadError, ServerError, SettingError


def main() -> None:
    """Read the settings, run the server, exit. The exit codes are explained in the README."""
    sys.exit(run(sys.argv[1:]))


def run(args: list[str]) -> int:
    """`main` with its arguments and exit code made explicit."""
    try:
        settings = read_settings(args)
        if settings is None:
            return 0
        from mlx_server.supervisor import serve  # noqa: PLC0415 - `--help` and wrong settings answer at once

        return serve(settings)
    except ServerError as error:
        click.echo(f"mlx-server: {error.message}", err=True)
        return 2 if isinstance(error, SettingError | ModelLoadError) else 1
    except KeyboardInterrupt:
        return 130


def read_settings(args: list[str]) -> Settings | None:
    """Settings from defaults, environment and flags; later wins. None: only `--help` or `--version` was asked for.

    Raises:
        SettingError: a setting is wrong or missing, or a flag is not known.
    """
    try:
        result: Settings | int = _command.main(args, prog_name="mlx-server", standalone_mode=False)
    except click.Abort:
        raise KeyboardInterrupt from None
    except click.ClickException as error:
        raise SettingError(error.format_message()) from None
    return result if isinstance(result, Settings) else None


# --- the settings ---

# A parser takes what the user wrote and raises ValueError with what is allowed.
Parser = Callable[[str], object]

_MODEL_HELP = "a local MLX model directory, a Hugging Face model ID (downloaded on first use), a .gguf file, or demo"
_HOST_NAME = re.compile(r"[A-Za-z0-9._-]+")
_ORIGIN = re.compile(r"[a-z][a-z0-9+.-]*://[a-z0-9._\[\]:-]+")  # as browsers send it: lower case, no path
_MAX_INT = 2**31 - 1
_MAX_TIMEOUT_S = 1_000_000.0


def _integer(low: int, high: int) -> Parser:
    def parse(text: str) -> int:
        digits = text.removeprefix("-")
        if not (digits.isascii() and digits.isdigit() and len(digits) < 20 and low <= int(text) <= high):
            raise ValueError(f"an integer from {low} to {high}")
        return int(text)

    return parse


def _kv_bits(text: str) -> int:
    if text != "8":
        raise ValueError("8, or not given")
    return 8


def _seconds(text: str) -> float:
    allowed = ValueError(f"a number of seconds, more than 0 and at most {_MAX_TIMEOUT_S:.0f}")
    try:
        seconds = float(text)
    except ValueError:
        raise allowed from None
    if not 0 < seconds <= _MAX_TIMEOUT_S:
        raise allowed
    return seconds


def _host(text: str) -> str:
    allowed = ValueError("a host name or an IP address of this machine, such as 127.0.0.1, 0.0.0.0 or ::")
    if not text:
        raise allowed
    try:
        socket.getaddrinfo(text, None)
    except (OSError, ValueError):  # ValueError: NUL, or no valid IDNA
        raise allowed from None
    return text


def _model(text: str) -> str:
    if not text.strip() or "\0" in text:
        raise ValueError(_MODEL_HELP)
    return text


def _api_key(text: str) -> str:
    if not text or not text.isascii() or not text.isprintable() or " " in text:
        raise ValueError("one or more printable ASCII characters without spaces")
    return text


def _flag(text: str) -> bool:
    values = {"1": True, "true": True, "yes": True, "on": True, "0": False, "false": False, "no": False, "off": False}
    if text.lower() not in values:
        raise ValueError("true or false")
    return values[text.lower()]


def _host_names(text: str) -> tuple[str, ...]:
    names = _comma_separated(text)
    if not all(_HOST_NAME.fullmatch(name) for name in names):
        raise ValueError("host names without ports, separated by commas, such as llm.example.com")
    return names


def _origins(text: str) -> tuple[str, ...]:
    origins = _comma_separated(text)
    if not all(origin == "*" or _ORIGIN.fullmatch(origin) for origin in origins):
        raise ValueError("origins of web pages, separated by commas, such as http://localhost:3000, or *")
    return origins


def _comma_separated(text: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.split(",")) if text.strip() else ()


def _memory(text: str) -> str:
    memory_bytes(text, 2**40)
    return text


def _tool_parser(text: str) -> str:
    if text not in TOOL_PARSERS:
        raise ValueError(f"one of {', '.join(TOOL_PARSERS)}")
    return text


def _speculation(text: str) -> str:
    if text.lower() not in ("on", "off"):
        raise ValueError("on or off")
    return text.lower()


def _log_level(text: str) -> str:
    level = text.lower()
    if level not in ("debug", "info", "warning", "error"):
        raise ValueError("debug, info, warning or error")
    return level


class _Option(click.Option):
    """An option whose error is one sentence, and whose empty variable is a value like any other: an empty
    MLX_SERVER_API_KEY must not open the server to everyone."""

    def __init__(self, *args: Any, parser: Parser, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._parse = parser

    def resolve_envvar_value(self, ctx: click.Context) -> str | None:
        return os.environ.get(str(self.envvar))

    def value_from_envvar(self, ctx: click.Context) -> str | None:
        return self.resolve_envvar_value(ctx)  # click takes any word for a flag's "false"

    def type_cast_value(self, ctx: click.Context, value: Any) -> Any:
        if not isinstance(value, str):
            return value
        from_variable = ctx.get_parameter_source(str(self.name)) is ParameterSource.ENVIRONMENT
        setting = str(self.envvar) if from_variable else self.opts[0]
        try:
            return self._parse(value)
        except ValueError as error:
            shown = "(not shown)" if value and self.name == "api_key" else repr(value)
            raise click.UsageError(f"{setting} is {shown}, but must be {error}") from None


_DEFAULTS = {field.name: field.default for field in msgspec.structs.fields(Settings)}

_Function = TypeVar("_Function", bound=Callable[..., Any])


def _option(name: str, flag: str, variable: str, parser: Parser, text: str) -> Callable[[_Function], _Function]:
    default = _DEFAULTS[name]
    if default is msgspec.NODEFAULT or default is None:
        default, shown = None, "required" if default is msgspec.NODEFAULT else "none"
    elif default == ():
        default, shown = "", "none"
    else:
        default, shown = (f"{default:g}" if isinstance(default, float) else str(default).lower()), ""
    switch: dict[str, Any] = {"is_flag": True, "flag_value": "true", "type": str} if parser is _flag else {}
    return click.option(
        name,
        flag,
        envvar=variable,
        show_envvar=True,
        cls=_Option,
        parser=parser,
        help=text,
        default=default,
        show_default=shown or True,
        metavar=None if switch else "VALUE",
        **switch,
    )


@click.command(context_settings={"max_content_width": 110})
@_option("model", "--model", "MLX_SERVER_MODEL", _model, f"The model: {_MODEL_HELP}.")
@_option(
    "host",
    "--host",
    "MLX_SERVER_HOST",
    _host,
    "Address to bind; 127.0.0.1 takes connections of this machine only.",
)
@_option("port", "--port", "MLX_SERVER_PORT", _integer(0, 65535), "Port to bind; 0 takes any free one.")
@_option(
    "max_tokens",
    "--max-tokens",
    "MLX_SERVER_MAX_TOKENS",
    _integer(1, _MAX_INT),
    "Most tokens to generate when a request does not say; of raw prompts 16, unless this is set.",
)
@_option(
    "api_key",
    "--api-key",
    "MLX_SERVER_API_KEY",
    _api_key,
    "Bearer token that requests must carry. Prefer the variable: other users of the machine can see flags.",
)
@_option(
    "require_key",
    "--require-key",
    "MLX_SERVER_REQUIRE_KEY",
    _flag,
    "Refuse to start without a key on an address that other machines reach.",
)
@_option(
    "rate_limit",
    "--rate-limit",
    "MLX_SERVER_RATE_LIMIT",
    _integer(0, _MAX_INT),
    "Requests a minute that each client may make; 0: no limit.",
)
@_option("timeout_s", "--timeout", "MLX_SERVER_TIMEOUT", _seconds, "Seconds after which a request is given up.")
@_option(
    "allowed_hosts",
    "--allowed-hosts",
    "MLX_SERVER_ALLOWED_HOSTS",
    _host_names,
    "Names under which requests may reach a server without a key, beside this machine's own; separated by commas.",
)
@_option(
    "allowed_origins",
    "--allowed-origins",
    "MLX_SERVER_ALLOWED_ORIGINS",
    _origins,
    "Origins of web pages that may use this server (CORS), separated by commas; *: all.",
)
@_option(
    "kv_bits",
    "--kv-bits",
    "MLX_SERVER_KV_BITS",
    _kv_bits,
    "8: hold the KV cache as 8-bit integers, for about twice as many tokens (four times on the CPU).",
)
@_option(
    "batch_invariant",
    "--batch-invariant",
    "MLX_SERVER_BATCH_INVARIANT",
    _flag,
    "Compute each request to the same bits whatever runs beside it. Slower on GPUs; CPUs do so anyway, but for "
    "recurrent models.",
)
@_option("strict", "--strict", "MLX_SERVER_STRICT", _flag, "Refuse requests with fields that the API does not have.")
@_option(
    "tool_parser",
    "--tool-parser",
    "MLX_SERVER_TOOL_PARSER",
    _tool_parser,
    f"The format of the model's tool calls, where its template does not tell: {', '.join(TOOL_PARSERS)}.",
)
@_option(
    "memory_limit",
    "--memory-limit",
    "MLX_SERVER_MEMORY_LIMIT",
    _memory,
    "What weights, caches and scratch may take together, such as 8GB or 80%; by default most of what the device has.",
)
@_option(
    "max_queue",
    "--max-queue",
    "MLX_SERVER_MAX_QUEUE",
    _integer(1, _MAX_INT),
    "Requests that may wait for their turn; more are refused with a 503, or a 429 if their client has too many.",
)
@_option(
    "speculation",
    "--speculation",
    "MLX_SERVER_SPECULATION",
    _speculation,
    "on: guess tokens from a request's own text and compute them together, where that is faster; off: never.",
)
@_option("log_level", "--log-level", "MLX_SERVER_LOG", _log_level, "Least level to log: debug, info, warning or error.")
@click.version_option(package_name="mlx-server")
def _command(**settings: Any) -> Settings:
    """Serve a language model to OpenAI clients.

    A flag wins over its environment variable.
    """
    if settings["model"] is None:
        raise click.UsageError(f"--model (or MLX_SERVER_MODEL) is not set, but must be {_MODEL_HELP}")
    if click.get_current_context().get_parameter_source("max_tokens") is not ParameterSource.DEFAULT:
        settings["completion_tokens"] = settings["max_tokens"]
    return Settings(**settings)
