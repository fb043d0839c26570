"""What `--model` names, as files on disk."""

import re
from pathlib import Path

from mlx_server.checkpoint.demo import fetch_demo
from mlx_server.checkpoint.hub import fetch_from_hub
from mlx_server.checkpoint.model_config import is_gguf
from mlx_server.checkpoint.progress import Progress
from mlx_server.config import ResolvedModel
from mlx_server.errors import ModelLoadError

DEMO = "demo"

_HUB_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}/[A-Za-z0-9][A-Za-z0-9._-]{0,95}")


def resolve(model: str, *, progress: Progress) -> ResolvedModel:
    """Find the model that `--model` names and download it if it is not on disk yet.

    `demo`, a model directory, a .gguf file, or a Hugging Face id; a path that exists goes before an id. Blocks while it
    downloads. ModelLoadError says in one sentence what is missing or what went wrong.
    """
    if model == DEMO:
        return ResolvedModel(DEMO, str(fetch_demo(progress)))
    path = Path(model).expanduser()
    if model.strip() and path.is_dir():
        if not (path / "config.json").exists():
            raise ModelLoadError(f"{model} is no model directory: it has no config.json")
        return ResolvedModel(path.resolve().name, str(path.resolve()))
    if path.is_file():
        if not is_gguf(path):
            raise ModelLoadError(f"{model} is not a model: give a directory with config.json, or a .gguf file")
        return ResolvedModel(path.stem, str(path.resolve()))
    if _HUB_ID.fullmatch(model) and not is_gguf(path) and ".." not in model:
        return ResolvedModel(model, str(fetch_from_hub(model, progress)))
    raise ModelLoadError(
        f"{model!r} is no model: there is no such file or directory, and it is no Hugging Face id like org/name; "
        f"`{DEMO}` is a small model to try"
    )
