"""lm-eval on the demo model through our server (`local-completions`) and through mlx-lm: the same answers, one by one.

mlx-lm computes with the same weights, dequantized to float32. The tasks lie in `lm_eval_tasks/`.
"""

import json
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

from e2e_server import start
from mlx_server.chat.tokenizer import Tokenizer
from mlx_server.checkpoint.gguf import read_gguf
from mlx_server.checkpoint.model_config import load_config
from mlx_server.models.gguf import load_gguf_tensors
from server_process import ServerProcess

TASKS = Path(__file__).parent / "lm_eval_tasks"
NAMES = ["facts", "prose", "continuations"]
TOLERANCE = 0.02  # of the log-likelihood of a document

# Task -> a list for each document: log-likelihoods with "would greedy decoding give it", a log-likelihood, or a text.
Answers = dict[str, list[list[Any]]]


@pytest.fixture(scope="module")
def server() -> Iterator[ServerProcess]:
    pytest.importorskip("lm_eval")
    pytest.importorskip("mlx_lm")
    with start() as server:
        yield server


@pytest.fixture(scope="module")
def directory(demo_gguf: Path, server: ServerProcess, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo model as mlx-lm loads one, with what the server says of its tokenizer."""
    path = tmp_path_factory.mktemp("demo")
    config = load_config(demo_gguf)
    tensors, plan = load_gguf_tensors(read_gguf(demo_gguf), config["head_dim"])  # type: ignore[arg-type]
    for name in [name for name in tensors if name.endswith(".scales")]:
        layer = name.removesuffix(".scales")
        quantization = plan.of(layer, has_scales=True)
        weight, scales, biases = tensors[f"{layer}.weight"], tensors.pop(name), tensors.pop(f"{layer}.biases")
        tensors[f"{layer}.weight"] = mx.dequantize(weight, scales, biases, quantization.group_size, quantization.bits)
    mx.save_safetensors(str(path / "model.safetensors"), {name: x.astype(mx.float32) for name, x in tensors.items()})
    (path / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
    (path / "tokenizer.json").write_text(Tokenizer.load(demo_gguf).to_json())
    with urllib.request.urlopen(f"{server.url()}/tokenizer_info", timeout=60) as info:
        (path / "tokenizer_config.json").write_bytes(info.read())
    return path


def mlx_lm(directory: Path) -> Any:
    from lm_eval.api.instance import Instance  # noqa: PLC0415 - its imports take some ten seconds
    from mlx_lm.evaluate import MLXLM  # noqa: PLC0415

    bos = json.loads((directory / "tokenizer_config.json").read_text())["bos_token"]

    class Peer(MLXLM):  # type: ignore[misc]
        """mlx-lm leaves out a text's first token; lm-eval means it to be scored after BOS."""

        def loglikelihood_rolling(self, requests: list[Instance]) -> list[float]:
            after_bos = [Instance("loglikelihood", request.doc, (bos, *request.args), 0) for request in requests]
            return [logprob for logprob, _ in self.loglikelihood(after_bos)]

    return Peer(str(directory))


def evaluate(model: Any, model_args: dict[str, Any] | None = None) -> tuple[dict[str, Any], Answers]:
    """The tasks' metrics, and what the model answered."""
    from lm_eval.evaluator import simple_evaluate  # noqa: PLC0415
    from lm_eval.tasks import TaskManager  # noqa: PLC0415

    result = simple_evaluate(
        model,
        model_args=model_args,
        batch_size=8,
        tasks=NAMES,
        task_manager=TaskManager(include_path=str(TASKS), include_defaults=False),
        bootstrap_iters=0,
    )
    metrics = {
        f"{task} {name.partition(',')[0]}": value
        for task, values in result["results"].items()
        for name, value in values.items()
        if isinstance(value, float) and "stderr" not in name
    }
    answers = {
        task: [sample["filtered_resps"] for sample in sorted(samples, key=lambda sample: sample["doc_id"])]
        for task, samples in result["samples"].items()
    }
    return metrics, answers


def bench_scores(benchmark, server, directory, tmp_path, monkeypatch):
    monkeypatch.chdir(TASKS)  # the tasks name their files relative to it
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path))
    arguments = {"model": "default", "base_url": f"{server.url()}/v1/completions", "num_concurrent": 4}
    metrics, ours = benchmark.pedantic(evaluate, ("local-completions", arguments), rounds=1)
    peer_metrics, theirs = evaluate(mlx_lm(directory))
    benchmark.extra_info |= {"ours": metrics, "mlx-lm": peer_metrics}
    assert [len(ours[name]) for name in NAMES] == [16, 3, 8]
    for name in NAMES:
        for ours_of, theirs_of in zip(ours[name], theirs[name], strict=True):
            for answer, expected in zip(ours_of, theirs_of, strict=True):
                assert_same(answer, expected)


def assert_same(answer: Any, expected: Any) -> None:
    if isinstance(expected, tuple):
        assert answer[1] == expected[1]
        answer, expected = answer[0], expected[0]
    assert answer == (expected if isinstance(expected, str) else pytest.approx(expected, abs=TOLERANCE))
