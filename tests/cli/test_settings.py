"""Every setting as flag, variable and default; what is said of a wrong one."""

import os
import re
from pathlib import Path

import pytest

from mlx_server import cli
from mlx_server.cli import read_settings
from mlx_server.config import Settings
from mlx_server.errors import SettingError

# Flag, variable, field, a value and what it becomes.
SETTINGS = [
    ("--kv-bits", "MLX_SERVER_KV_BITS", "kv_bits", "8", 8),
    ("--model", "MLX_SERVER_MODEL", "model", "org/name", "org/name"),
    ("--host", "MLX_SERVER_HOST", "host", "127.0.0.1", "127.0.0.1"),
    ("--port", "MLX_SERVER_PORT", "port", "0", 0),
    ("--max-tokens", "MLX_SERVER_MAX_TOKENS", "max_tokens", "1", 1),
    ("--api-key", "MLX_SERVER_API_KEY", "api_key", "sk-1", "sk-1"),
    ("--rate-limit", "MLX_SERVER_RATE_LIMIT", "rate_limit", "60", 60),
    ("--timeout", "MLX_SERVER_TIMEOUT", "timeout_s", "0.5", 0.5),
    ("--allowed-hosts", "MLX_SERVER_ALLOWED_HOSTS", "allowed_hosts", "a.example, b", ("a.example", "b")),
    ("--allowed-origins", "MLX_SERVER_ALLOWED_ORIGINS", "allowed_origins", "http://a:1,*", ("http://a:1", "*")),
    ("--memory-limit", "MLX_SERVER_MEMORY_LIMIT", "memory_limit", "8GB", "8GB"),
    ("--tool-parser", "MLX_SERVER_TOOL_PARSER", "tool_parser", "mistral", "mistral"),
    ("--max-queue", "MLX_SERVER_MAX_QUEUE", "max_queue", "7", 7),
    ("--speculation", "MLX_SERVER_SPECULATION", "speculation", "OFF", "off"),
    ("--log-level", "MLX_SERVER_LOG", "log_level", "DEBUG", "debug"),
]
# Flags without a value: flag, variable, field.
SWITCHES = [
    ("--batch-invariant", "MLX_SERVER_BATCH_INVARIANT", "batch_invariant"),
    ("--strict", "MLX_SERVER_STRICT", "strict"),
    ("--require-key", "MLX_SERVER_REQUIRE_KEY", "require_key"),
]

WRONG = [
    ("--model", "MLX_SERVER_MODEL", ["", " "]),
    ("--host", "MLX_SERVER_HOST", ["", "no.such.host.invalid", "a b", "ü" * 70]),
    ("--port", "MLX_SERVER_PORT", ["", "-1", "65536", "http", "8_0", " 80", "٣", "9" * 5000]),
    ("--max-tokens", "MLX_SERVER_MAX_TOKENS", ["0", "-5", "1.5", "1e3"]),
    ("--api-key", "MLX_SERVER_API_KEY", ["", "two words", "schlüssel", "tab\t"]),
    ("--rate-limit", "MLX_SERVER_RATE_LIMIT", ["-1", "many", "99999999999"]),
    ("--timeout", "MLX_SERVER_TIMEOUT", ["0", "-1", "nan", "inf", "1e300", "soon"]),
    ("--allowed-hosts", "MLX_SERVER_ALLOWED_HOSTS", ["a b", "http://a", "a:80", "a,,b"]),
    ("--allowed-origins", "MLX_SERVER_ALLOWED_ORIGINS", ["localhost", "http://a/", "http://a b", ",", "HTTP://A"]),
    (
        "--memory-limit",
        "MLX_SERVER_MEMORY_LIMIT",
        ["", "8", "GB", "-1GB", "0GB", "101%", "1e3GB", "8 giga", "9" * 5000],
    ),
    ("--tool-parser", "MLX_SERVER_TOOL_PARSER", ["", "Hermes", "xml"]),
    ("--max-queue", "MLX_SERVER_MAX_QUEUE", ["0", "-1", "many"]),
    ("--speculation", "MLX_SERVER_SPECULATION", ["", "auto"]),
    ("--log-level", "MLX_SERVER_LOG", ["", "loud"]),
    ("--kv-bits", "MLX_SERVER_KV_BITS", ["", "4", "16", "eight"]),
]


@pytest.fixture(autouse=True)
def _no_settings_from_outside(monkeypatch):
    for name in os.environ:
        if name.startswith("MLX_SERVER_"):
            monkeypatch.delenv(name)


def test_defaults():
    assert read_settings(["--model", "demo"]) == Settings(
        model="demo",
        host="0.0.0.0",
        port=8000,
        max_tokens=32768,
        api_key=None,
        rate_limit=0,
        timeout_s=300.0,
        log_level="info",
    )


@pytest.mark.parametrize(("flag", "variable", "field", "text", "value"), SETTINGS)
def test_a_flag_wins_over_its_variable(flag, variable, field, text, value, monkeypatch):
    model = [] if field == "model" else ["--model", "demo"]
    assert getattr(read_settings([*model, flag, text]), field) == value
    monkeypatch.setenv(variable, text)
    assert getattr(read_settings(model), field) == value
    monkeypatch.setenv(variable, "not read")
    assert getattr(read_settings([*model, flag, text]), field) == value


def test_max_tokens_is_the_default_of_raw_prompts_too_where_it_is_set(monkeypatch):
    assert read_settings(["--model", "demo"]).completion_tokens == 16
    assert read_settings(["--model", "demo", "--max-tokens", "32768"]).completion_tokens == 32768
    monkeypatch.setenv("MLX_SERVER_MAX_TOKENS", "5")
    assert read_settings(["--model", "demo"]).completion_tokens == 5


@pytest.mark.parametrize(("flag", "variable", "field"), SWITCHES)
def test_switches(flag, variable, field, monkeypatch):
    assert not getattr(read_settings(["--model", "demo"]), field)
    assert getattr(read_settings(["--model", "demo", flag]), field)
    for text, value in [("1", True), ("TRUE", True), ("on", True), ("0", False), ("no", False)]:
        monkeypatch.setenv(variable, text)
        assert getattr(read_settings(["--model", "demo"]), field) is value
        assert getattr(read_settings(["--model", "demo", flag]), field)
    monkeypatch.setenv(variable, "maybe")
    with pytest.raises(SettingError, match=f"{variable} is 'maybe', but must be true or false"):
        read_settings(["--model", "demo"])


@pytest.mark.parametrize(("flag", "variable", "text"), [(f, v, text) for f, v, texts in WRONG for text in texts])
def test_a_wrong_value_is_one_sentence_that_names_where_it_came_from(flag, variable, text, monkeypatch):
    model = [] if flag == "--model" else ["--model", "demo"]
    shown = "(not shown)" if flag == "--api-key" and text else repr(text)
    with pytest.raises(SettingError) as error:
        read_settings([*model, f"{flag}={text}"])
    assert error.value.message.startswith(f"{flag} is {shown}, but must be ")
    assert "\n" not in error.value.message
    monkeypatch.setenv(variable, text)
    with pytest.raises(SettingError) as error:
        read_settings(model)
    assert error.value.message.startswith(f"{variable} is {shown}, but must be ")


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ([], "--model (or MLX_SERVER_MODEL) is not set, but must be a local MLX model directory"),
        (["--model"], "Option '--model' requires an argument."),
        (["--modle", "demo"], "No such option '--modle'"),
        (["demo"], "Got unexpected extra argument (demo)"),
    ],
)
def test_a_wrong_command_line_ends_with_exit_code_2(args, message, capsys):
    assert cli.run(args) == 2
    output = capsys.readouterr()
    assert output.out == ""
    assert output.err.startswith(f"mlx-server: {message}")
    assert output.err.count("\n") == 1


def test_help_shows_flag_variable_and_default_of_each(capsys):
    assert cli.run(["--help"]) == 0
    text = " ".join(capsys.readouterr().out.split())
    for flag, variable, *_ in SETTINGS:
        assert f" {flag} VALUE " in text
        assert f"[env var: {variable}; default: " in text
    for flag, variable, _ in SWITCHES:
        assert f" {flag} " in text and f"[env var: {variable}; default: false]" in text
    for default in ("(required)", "0.0.0.0", "8000", "32768", "(none)", "0", "300", "info"):
        assert f"default: {default}]" in text


def test_version(capsys):
    assert cli.run(["--version"]) == 0
    assert capsys.readouterr().out.startswith("mlx-server, version ")


def test_the_readme_lists_the_settings():
    readme = (Path(__file__).parents[2] / "README.md").read_text()
    rows = re.findall(r"^\| `(--[a-z-]+)` \| `(\w+)` \| (\S+) \| .+ \|$", readme, re.MULTILINE)
    assert {row[:2] for row in rows} == {(flag, variable) for flag, variable, *_ in [*SETTINGS, *SWITCHES]}
    parameters = {parameter.opts[0]: parameter for parameter in cli._command.params}
    for flag, _, default in rows:
        shown = default.strip("`")
        assert shown == (parameters[flag].default or parameters[flag].show_default)
