"""Perplexity of llama.cpp on golden.json's prose: `python llama_cpp_perplexity.py MODEL.gguf`, with xllamacpp.

llama.cpp's server tells no probabilities of a prompt. So each token's is read from the distribution over the whole
vocabulary that follows the tokens before it.
"""

import json
import math
import sys
from pathlib import Path

import xllamacpp

VOCAB_SIZE = 49152


def main() -> None:
    token_ids = json.loads((Path(__file__).parent / "golden.json").read_text())["prose"]["tokens"]
    params = xllamacpp.CommonParams()
    params.model.path = sys.argv[1]
    params.n_ctx, params.n_parallel, params.warmup = 1024, 1, False
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 2
    server = xllamacpp.Server(params)

    logprobs = []
    for i in range(1, len(token_ids)):
        request = {"prompt": token_ids[:i], "n_predict": 1, "n_probs": VOCAB_SIZE, "temperature": 0.0}
        reply = server.handle_completions(request)
        candidates = reply["choices"][0]["logprobs"]["content"][0]["top_logprobs"]
        logprobs.append(next(one["logprob"] for one in candidates if one["id"] == token_ids[i]))
    print(f"perplexity {math.exp(-sum(logprobs) / len(logprobs)):.4f} of {len(logprobs)} tokens")


if __name__ == "__main__":
    main()
