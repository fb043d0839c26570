"""Each access to a model's files fails once, as a disk does: the one sentence names the file and the fault."""

import errno
import os
from pathlib import Path

import pytest

from chat.test_tokenizer import byte_backend, write
from checkpoint.test_safetensors import GOOD
from fail_once import failing
from gguf_writer import write_gguf
from mlx_server.chat.tokenizer import Tokenizer
from mlx_server.checkpoint.gguf import read_gguf
from mlx_server.checkpoint.model_config import generation_defaults
from mlx_server.checkpoint.pooling import pooling_of
from mlx_server.checkpoint.safetensors import weight_files
from mlx_server.errors import ModelLoadError


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    byte_backend().save(str(tmp_path / "tokenizer.json"))
    write(tmp_path / "config.json", {"model_type": "llama", "vocab_size": 260})
    write(tmp_path / "generation_config.json", {"eos_token_id": 3})
    write(tmp_path / "tokenizer_config.json", {"eos_token": "<|end|>"})
    write(tmp_path / "model.safetensors.index.json", {"weight_map": {"weight": "a.safetensors"}})
    (tmp_path / "chat_template.jinja").write_text("{{ messages }}")
    (tmp_path / "a.safetensors").write_bytes(GOOD)
    (tmp_path / "a.gguf").write_bytes(write_gguf({"a": 1}, {}))
    return tmp_path


def load(directory: Path) -> None:
    generation_defaults(directory)
    pooling_of(directory)
    Tokenizer.load(directory)
    weight_files(directory)
    read_gguf(directory / "a.gguf")


@pytest.mark.parametrize("name", ["open", "read_text", "stat"])
def test_one_fault_of_the_disk(directory: Path, name: str) -> None:
    at = 0
    has_happened = True
    while has_happened:
        at += 1
        message = None
        with failing(Path, name, at, OSError(errno.EIO, os.strerror(errno.EIO))) as fault:
            try:
                load(directory)
            except ModelLoadError as error:
                message = error.message
            has_happened = fault.has_happened
        if message is not None:
            assert str(directory) in message and "can't be read: Input/output error" in message
        assert (message is not None) == has_happened
    assert at > 4
