"""Random models of any shape, saved by transformers, and what it computes with them."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoConfig, AutoModelForCausalLM


def save_random(directory: Path, config: dict[str, Any], seed: int = 0) -> Any:
    """A model of transformers with random float32 weights, written to `directory` as transformers writes it."""
    model_type = config["model_type"]
    fields = {key: value for key, value in config.items() if key != "model_type"}
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(model_type, **fields), attn_implementation="eager", dtype=torch.float32
    ).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if "norm" in name or parameter.ndim == 1:
                parameter.add_(0.2 * noise)  # about their own initial values: ones, or zeros where zero-centred
            else:
                parameter.copy_(noise * (1.0 / parameter.shape[-1]) ** 0.5)
    model.save_pretrained(directory)
    return model


def transformers_logits(model: Any, token_ids: list[int]) -> np.ndarray:
    """[T, V] float32, without a cache: the plainest way."""
    with torch.no_grad():
        return model(torch.tensor([token_ids]), use_cache=False).logits[0].numpy()
