"""How llama.cpp's conversion script writes tensors: names and the order of rows."""

from typing import Any

import numpy as np

Array = np.ndarray[Any, np.dtype[Any]]

LLAMA = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
QWEN3 = LLAMA | {"self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm"}
GEMMA3 = QWEN3 | {
    "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}


def gguf_name(name: str, names: dict[str, str]) -> str:
    """model.layers.0.self_attn.q_proj.weight -> blk.0.attn_q.weight"""
    layer, _, kind = name.rpartition(".")
    if layer.startswith("model.layers."):
        _, _, index, layer = layer.split(".", 3)
        return f"blk.{index}.{names[layer]}.{kind}"
    return f"{names[layer]}.{kind}"


def interleave(rows: Array, num_heads: int) -> Array:
    """As llama.cpp's conversion script does with q and k: the halves of each head's rows, alternating."""
    return rows.reshape(num_heads, 2, -1, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)
