"""Settings of a server, and what the supervisor hands to the processes that it starts."""

import re
import signal
from pathlib import Path
from typing import Literal

import msgspec

MEMORY_HELP = "an amount such as 8GB, 512MiB or 80% (of the device's memory), at least 1 MB"
_MEMORY_UNITS = {"mb": 1e6, "gb": 1e9, "tb": 1e12, "mib": 2**20, "gib": 2**30, "tib": 2**40}
_MEMORY = re.compile(r"([0-9]{1,9}(?:\.[0-9]{1,3})?) ?(%|[mgt]i?b)")

STACKS_SIGNAL = signal.SIGUSR2  # lets the engine write what its threads are doing to its log

Speculation = Literal["on", "off"]
LogLevel = Literal["debug", "info", "warning", "error"]


class Settings(msgspec.Struct, frozen=True, kw_only=True):
    """The command line's settings, checked. Flag, variable, default and help of each stand in `cli`."""

    model: str
    host: str = "0.0.0.0"
    port: int = 8000  # 0: any free port
    max_tokens: int = 32768
    completion_tokens: int = 16  # the same for raw prompts: OpenAI's default, unless max_tokens is set
    api_key: str | None = None
    require_key: bool = False  # refuse to start open to other machines without a key
    rate_limit: int = 0  # requests a minute and client; 0: off
    timeout_s: float = 300.0
    allowed_hosts: tuple[str, ...] = ()  # names that Host may have, beside this machine's own
    allowed_origins: tuple[str, ...] = ()  # of web pages that may call this server
    kv_bits: int | None = None  # of the KV cache's elements: 8, or None for the model's dtype
    batch_invariant: bool = False  # the same bits in any batch, also on GPUs
    strict: bool = False  # refuse fields that the API does not have
    memory_limit: str | None = None  # of weights, caches and scratch together: `memory_bytes` reads it
    max_queue: int = 128  # requests that may wait
    tool_parser: str | None = None  # name of the format of tool calls; None: the model's template tells
    speculation: Speculation = "on"
    log_level: LogLevel = "info"


def memory_bytes(text: str, total_bytes: int) -> int:
    """An amount of memory such as `8GB`, `512MiB` or, of `total_bytes`, `80%`.

    Raises:
        ValueError: it is none, or not between 1 MB and 1 PB, or more than 100%.
    """
    found = _MEMORY.fullmatch(text.strip().lower())
    if found is None:
        raise ValueError(MEMORY_HELP)
    number, unit = float(found[1]), found[2]
    size = number / 100 * total_bytes if unit == "%" else number * _MEMORY_UNITS[unit]
    if not 1e6 <= size <= 1e15 or (unit == "%" and number > 100):
        raise ValueError(MEMORY_HELP)
    return int(size)


class ResolvedModel(msgspec.Struct, frozen=True):
    """A model that is on disk."""

    name: str  # the served name: `demo`, a Hugging Face id, a directory's or a file's name
    path: str  # a directory with config.json and *.safetensors, or a .gguf file


class Launch(msgspec.Struct, frozen=True):
    """What engine and API processes need to start; `launch.json` in the run directory (mode 0700: it holds the key)."""

    settings: Settings
    model: ResolvedModel
    engine_address: str  # ipc:// of the engine's socket

    def write(self, run_dir: Path) -> None:
        path = run_dir / "launch.json"
        path.touch(mode=0o600)
        path.write_bytes(msgspec.json.encode(self))

    @staticmethod
    def read(run_dir: Path) -> "Launch":
        return msgspec.json.decode((run_dir / "launch.json").read_bytes(), type=Launch)
