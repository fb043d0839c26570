"""How a model's hidden states become one embedding, as its own files say."""

from pathlib import Path

from mlx_server.checkpoint.gguf import read_gguf
from mlx_server.checkpoint.json_file import JsonObject, read_optional_json, read_optional_json_list
from mlx_server.checkpoint.model_config import is_gguf
from mlx_server.errors import ModelLoadError
from mlx_server.wire import Pooling

# Of a causal model's tokens only the last has seen all others; so vLLM, too, pools models that say nothing.
DEFAULT_POOLING: Pooling = "last"

_SENTENCE_TRANSFORMERS: dict[str, Pooling] = {"mean_tokens": "mean", "lasttoken": "last", "cls_token": "cls"}
_NEWER_NAMES: dict[str, Pooling] = {"mean": "mean", "lasttoken": "last", "cls": "cls"}
_GGUF: dict[int, Pooling] = {0: DEFAULT_POOLING, 1: "mean", 2: "cls", 3: "last"}  # llama.cpp's numbers; 0: none
_MODULES = {"Transformer", "Pooling", "Normalize"}  # vectors are always normalized


def pooling_of(path: Path) -> Pooling | None:
    """The pooling of a model directory or a GGUF file; None if its embeddings need more than pooling, or another one.

    sentence-transformers writes `modules.json` and a folder for each module; GGUF has `*.pooling_type`.
    """
    if is_gguf(path):
        gguf = read_gguf(path)
        number = gguf.get(f"{gguf.require('general.architecture', str)}.pooling_type", int)
        return _GGUF.get(number or 0)
    folder = "1_Pooling"
    for module in read_optional_json_list(path / "modules.json"):
        if not isinstance(module, dict):
            raise ModelLoadError(f"{path / 'modules.json'} must hold objects")
        kind = str(module.get("type")).rpartition(".")[2]
        if kind not in _MODULES or (kind == "Pooling" and module.get("path") != folder):
            return None
    return _mode(read_optional_json(path / folder / "config.json"))


def _mode(config: JsonObject) -> Pooling | None:
    if not config:
        return DEFAULT_POOLING
    if "pooling_mode" in config:
        return _NEWER_NAMES.get(str(config["pooling_mode"]))
    prefix = "pooling_mode_"
    modes = [name.removeprefix(prefix) for name, value in config.items() if name.startswith(prefix) and value is True]
    return _SENTENCE_TRANSFORMERS.get(modes[0]) if len(modes) == 1 else None
