"""What `--model` names, as files on disk."""

from pathlib import Path

from mlx_server.checkpoint.demo import fetch_demo
from mlx_server.checkpoint.model_config import is_gguf
from mlx_server.checkpoint.progress import Progress
from mlx_server.config import ResolvedModel
from mlx_server.errors import ModelLoadError

DEMO = "demo"


def resolve(model: str, *, progress: Progress) -> ResolvedModel:
    """Find the model that `--model` names and download it if it is not on disk yet.

    `demo`, a model directory, a .gguf file, or a Hugging Face id; a path that exists goes before an id. Blocks while it
    downloads. ModelLoadError says in one sentence what is missing or what went wrong.
    """
    if model == DEMO:
        return ResolvedModel(DEMO, str(fetch_demo(progress)))
    path = Path(model).expanduser()
    if path.is_dir():
        if not (path / "config.json").exists():
            raise ModelLoadError(f"{model} is no model directory: it has no config.json")
        return ResolvedModel(path.resolve().name, str(path.resolve()))
    if path.is_file():
        if not is_gguf(path):
            raise ModelLoadError(f"{model} is not a model: give a directory with config.json, or a .gguf file")
        return ResolvedModel(path.stem, str(path.resolve()))
    raise ModelLoadError(
        f"{model!r} is no model: there is no such file or directory, and it is no Hugging Face id like org/name; "
        f"`{DEMO}` is a small model to try"
    )
