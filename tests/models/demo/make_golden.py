"""Makes golden.json and choices.json: `python make_golden.py MODEL.gguf`, with transformers and torch installed.

Nothing here goes through our loader or model: NumPy dequantizes the file's blocks, transformers computes.
"""

import json
import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from mlx_server.chat.tokenizer import Tokenizer
from mlx_server.checkpoint.gguf import GGUF, read_gguf

HERE = Path(__file__).parent
NUM_TOKENS = 64
END_TOKEN_ID = 2  # <|im_end|>
SYSTEM = "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
USER = SYSTEM + "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
PROMPTS = {
    "capital": USER.format("What is the capital of France?"),
    "haiku": USER.format("Write a haiku about the sea."),
    "accents and emoji": USER.format("Übersetze ins Englische: „Der Käse ist köstlich 🧀“"),
    "story": "Once upon a time, in a village at the foot of a mountain,",
    "code": "def fibonacci(n):\n    ",
}
# A task of lm-eval's kind: context, and continuations of which the first is right.
CHOICES = {
    "The capital of France is": [" Paris", " London", " a fish"],
    "Water freezes at zero degrees": [" Celsius", " Ernest", " banana"],
    "The opposite of hot is": [" cold", " seven", " window"],
    "Cats and dogs are": [" animals", " numbers", " mountains"],
}
LAYERS = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
HEAD_DIM = 64
CONFIG = LlamaConfig(
    hidden_size=576,
    intermediate_size=1536,
    num_hidden_layers=30,
    num_attention_heads=9,
    num_key_value_heads=3,
    head_dim=HEAD_DIM,
    vocab_size=49152,
    max_position_embeddings=8192,
    rms_norm_eps=1e-5,
    rope_parameters={"rope_type": "default", "rope_theta": 100000.0},
    tie_word_embeddings=True,
    attn_implementation="eager",
)


def dequantize(gguf: GGUF, name: str) -> Any:
    """A tensor's values in float32."""
    tensor = gguf.tensors[name]
    data = np.fromfile(gguf.path, np.uint8, tensor.size_bytes, offset=tensor.offset)
    match tensor.type:
        case "F32":
            return data.view(np.float32).reshape(tensor.shape)
        case "Q8_0":  # scale float16, 32 values int8
            blocks = data.reshape(-1, 34)
            values = blocks[:, :2].copy().view(np.float16).astype(np.float32) * blocks[:, 2:].view(np.int8)
        case (
            "Q4_1"
        ):  # scale and minimum float16, 16 bytes with values 0 to 15 in the low and 16 to 31 in the high halves
            blocks = data.reshape(-1, 20)
            scale, minimum = blocks[:, :4].copy().view(np.float16).astype(np.float32).T[..., None]
            values = np.concatenate([blocks[:, 4:] & 15, blocks[:, 4:] >> 4], axis=1) * scale + minimum
        case _:
            raise NotImplementedError(tensor.type)
    return values.astype(np.float32).reshape(tensor.shape)


def state_dict(gguf: GGUF) -> dict[str, torch.Tensor]:
    weights = {
        "model.embed_tokens.weight": dequantize(gguf, "token_embd.weight"),
        "model.norm.weight": dequantize(gguf, "output_norm.weight"),
    }
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"]
    for layer in range(CONFIG.num_hidden_layers):
        for theirs, ours in LAYERS.items():
            weight = dequantize(gguf, f"blk.{layer}.{theirs}.weight")
            if theirs in ("attn_q", "attn_k"):  # llama.cpp's conversion script, backwards
                weight = weight.reshape(-1, HEAD_DIM // 2, 2, weight.shape[-1])
                weight = weight.swapaxes(1, 2).reshape(-1, weight.shape[-1])
            weights[f"model.layers.{layer}.{ours}.weight"] = weight
    return {name: torch.from_numpy(weight) for name, weight in weights.items()}


def greedy(model: Any, prompt: list[int]) -> tuple[list[int], list[float]]:
    """The most likely tokens and by how much each won."""
    tokens, margins, cache, new = list[int](), list[float](), None, prompt
    while len(tokens) < NUM_TOKENS:
        output = model(torch.tensor([new]), past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        best = torch.topk(output.logits[0, -1], 2)
        new = [int(best.indices[0])]
        if new[0] == END_TOKEN_ID:
            break
        tokens += new
        margins.append(round(float(best.values[0] - best.values[1]), 4))
    return tokens, margins


def perplexity(model: Any, token_ids: list[int]) -> float:
    logprobs = model(torch.tensor([token_ids])).logits[0, :-1].log_softmax(-1)
    return math.exp(-float(logprobs[range(len(token_ids) - 1), token_ids[1:]].mean()))


def choice(model: Any, tokenizer: Tokenizer, context: str, continuation: str) -> dict[str, Any]:
    """The log-likelihood of a continuation, as lm-eval asks for it."""
    prefix, ids = tokenizer.encode(context), tokenizer.encode(context + continuation)
    logprobs = model(torch.tensor([ids])).logits[0].log_softmax(-1)
    score = sum(float(logprobs[pos - 1, ids[pos]]) for pos in range(len(prefix), len(ids)))
    return {"prompt": ids, "num_context": len(prefix), "logprob": round(score, 4)}


def main() -> None:
    torch.set_grad_enabled(False)
    path = Path(sys.argv[1])
    model, tokenizer = LlamaForCausalLM(CONFIG).eval(), Tokenizer.load(path)
    model.load_state_dict(state_dict(read_gguf(path)))
    prompts = []
    for name, text in PROMPTS.items():
        prompt = tokenizer.encode(text)
        tokens, margins = greedy(model, prompt)
        prompts.append({"name": name, "prompt": prompt, "tokens": tokens, "margins": margins})
        print(name, min(margins), repr(tokenizer.decode(tokens)))
    token_ids = tokenizer.encode((HERE.parent.parent / "data" / "prose.txt").read_text())
    prose = {"tokens": token_ids, "perplexity": round(perplexity(model, token_ids), 4)}
    choices = [[choice(model, tokenizer, context, text) for text in texts] for context, texts in CHOICES.items()]
    (HERE / "choices.json").write_text(json.dumps(choices) + "\n")
    lines = ",\n".join(json.dumps(one) for one in prompts)
    (HERE / "golden.json").write_text(f'{{"prose": {json.dumps(prose)},\n"prompts": [\n{lines}\n]}}\n')


if __name__ == "__main__":
    main()
