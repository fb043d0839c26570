"""Which pooling a model's files ask for."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gguf_writer import write_gguf
from mlx_server.checkpoint.pooling import pooling_of
from mlx_server.errors import ModelLoadError

TRANSFORMER = {"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"}
POOLING = {"idx": 1, "name": "1", "path": "1_Pooling", "type": "sentence_transformers.models.Pooling"}
NORMALIZE = {"idx": 2, "name": "2", "path": "2_Normalize", "type": "sentence_transformers.models.Normalize"}
DENSE = {"idx": 2, "name": "2", "path": "2_Dense", "type": "sentence_transformers.models.Dense"}
MODES = ("cls_token", "mean_tokens", "max_tokens", "mean_sqrt_len_tokens", "weightedmean_tokens", "lasttoken")


def write(folder: Path, modules: Any = None, pooling: Any = None) -> Path:
    if modules is not None:
        (folder / "modules.json").write_text(json.dumps(modules))
    if pooling is not None:
        (folder / "1_Pooling").mkdir()
        (folder / "1_Pooling/config.json").write_text(json.dumps(pooling))
    return folder


def mode(*names: str) -> dict[str, Any]:
    """As sentence-transformers writes it."""
    modes = {f"pooling_mode_{name}": name in names for name in MODES}
    return {"word_embedding_dimension": 64, "include_prompt": True} | modes


def test_a_model_that_says_nothing_gives_its_last_token(tmp_path: Path) -> None:
    assert pooling_of(tmp_path) == "last"


@pytest.mark.parametrize(
    "pooling, expected",
    [
        (mode("mean_tokens"), "mean"),
        (mode("cls_token"), "cls"),
        (mode("lasttoken"), "last"),
        (mode("max_tokens"), None),
        (mode("mean_tokens", "cls_token"), None),
        (mode(), None),
        ({"embedding_dimension": 64, "pooling_mode": "mean"}, "mean"),
        ({"embedding_dimension": 64, "pooling_mode": "lasttoken"}, "last"),
        ({"embedding_dimension": 64, "pooling_mode": "max"}, None),
    ],
)
def test_sentence_transformers_config(tmp_path: Path, pooling: Any, expected: str | None) -> None:
    assert pooling_of(write(tmp_path, [TRANSFORMER, POOLING, NORMALIZE], pooling)) == expected


@pytest.mark.parametrize("modules", [[TRANSFORMER, POOLING, DENSE], [TRANSFORMER, POOLING | {"path": "2_Pooling"}]])
def test_what_needs_more_than_pooling_is_not_served(tmp_path: Path, modules: Any) -> None:
    assert pooling_of(write(tmp_path, modules, mode("mean_tokens"))) is None


@pytest.mark.parametrize("modules", [{}, [1], "x"])
def test_broken_files(tmp_path: Path, modules: Any) -> None:
    with pytest.raises(ModelLoadError, match=r"modules\.json must hold"):
        pooling_of(write(tmp_path, modules))


@pytest.mark.parametrize(
    "number, expected", [(None, "last"), (0, "last"), (1, "mean"), (2, "cls"), (3, "last"), (4, None)]
)
def test_gguf(tmp_path: Path, number: int | None, expected: str | None) -> None:
    metadata = {"general.architecture": "llama"} | ({} if number is None else {"llama.pooling_type": number})
    path = tmp_path / "a.gguf"
    path.write_bytes(write_gguf(metadata, {"a": np.zeros(1, np.float32)}))
    assert pooling_of(path) == expected
