"""From a checkpoint on disk to a model in memory."""

from collections.abc import Callable
from pathlib import Path
from typing import cast

import mlx.core as mx

from mlx_server.checkpoint.gguf import read_gguf
from mlx_server.checkpoint.json_file import JsonObject
from mlx_server.checkpoint.model_config import check_model_type, is_gguf, load_config
from mlx_server.checkpoint.safetensors import weight_files
from mlx_server.errors import ModelLoadError
from mlx_server.models.base import Model
from mlx_server.models.gemma3_text import Gemma3Text
from mlx_server.models.gguf import load_gguf_tensors
from mlx_server.models.llama import Llama
from mlx_server.models.mistral import Mistral
from mlx_server.models.quantize import QuantizationPlan, read_plan
from mlx_server.models.qwen2 import Qwen2
from mlx_server.models.qwen3 import Qwen3
from mlx_server.models.qwen3_moe import Qwen3Moe
from mlx_server.models.qwen3_next import Qwen3Next
from mlx_server.models.weights import Weights

# Each of MODEL_TYPES -> its architecture. Only these are ever built, whatever a model's folder asks for.
ARCHITECTURES: dict[str, Callable[[JsonObject, Weights], Model]] = {
    "gemma3_text": Gemma3Text,
    "llama": Llama,
    "mistral": Mistral,
    "qwen2": Qwen2,
    "qwen3": Qwen3,
    "qwen3_moe": Qwen3Moe,
    "qwen3_next": Qwen3Next,
}


def load_model(path: str) -> Model:
    """The model of a directory (config.json, *.safetensors) or of a .gguf file, its weights evaluated.

    On the CPU everything but packed weights is cast to float32, which loses nothing and is many times faster there; on
    a GPU activations have the checkpoint's dtype. ModelLoadError says what is missing, broken or not supported.
    """
    config = load_config(Path(path))
    architecture = ARCHITECTURES[check_model_type(config, path)]
    tensors, plan = _load_tensors(Path(path), config)
    weights = Weights(path, tensors, plan, _activation_dtype(tensors))
    model = architecture(config, weights)
    weights.check_all_taken()
    try:
        mx.eval(weights.taken)
    except RuntimeError as error:
        raise ModelLoadError(f"{path}: the weights can't be read, or memory does not hold them") from error
    return model


def _load_tensors(path: Path, config: JsonObject) -> tuple[dict[str, mx.array], QuantizationPlan]:
    if is_gguf(path):
        return load_gguf_tensors(read_gguf(path), cast("int", config["head_dim"]))
    tensors: dict[str, mx.array] = {}
    for file in weight_files(path):
        tensors |= cast("dict[str, mx.array]", mx.load(str(file), format="safetensors"))
    return tensors, read_plan(config, str(path))


def _activation_dtype(tensors: dict[str, mx.array]) -> mx.Dtype:
    """float32 on the CPU, else the floating point dtype that most of the checkpoint's numbers have."""
    sizes: dict[mx.Dtype, int] = {}
    for tensor in tensors.values():
        if mx.issubdtype(tensor.dtype, mx.floating):
            sizes[tensor.dtype] = sizes.get(tensor.dtype, 0) + tensor.size
    if mx.default_device() == mx.Device(mx.cpu) or not sizes:
        return mx.float32
    return max(sizes, key=lambda dtype: sizes[dtype])
