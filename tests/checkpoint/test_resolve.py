from pathlib import Path

import pytest

from mlx_server.checkpoint import resolve as resolve_module
from mlx_server.checkpoint.progress import NoProgress
from mlx_server.checkpoint.resolve import resolve
from mlx_server.errors import ModelLoadError


@pytest.fixture
def here(tmp_path, monkeypatch) -> Path:
    """The current directory, with a model directory and a GGUF file; what would be downloaded is only named."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(resolve_module, "fetch_demo", lambda progress: Path("/cache/demo.gguf"))
    monkeypatch.setattr(resolve_module, "fetch_from_hub", lambda model_id, progress: Path("/hub") / model_id)
    (tmp_path / "org/Model-1B").mkdir(parents=True)
    (tmp_path / "org/Model-1B/config.json").write_text("{}")
    (tmp_path / "Small.Q4_0.GGUF").write_bytes(b"GGUF")
    return tmp_path


def name_and_path(model: str) -> tuple[str, str]:
    resolved = resolve(model, progress=NoProgress())
    return resolved.name, resolved.path


def test_served_names_and_paths(here):
    directory = str(here / "org/Model-1B")
    assert name_and_path("demo") == ("demo", "/cache/demo.gguf")
    assert name_and_path(directory) == ("Model-1B", directory)
    assert name_and_path("org/Model-1B") == ("Model-1B", directory)  # what is on disk goes before the hub
    assert name_and_path("./org/Model-1B/") == ("Model-1B", directory)
    assert name_and_path("Small.Q4_0.GGUF") == ("Small.Q4_0", str(here / "Small.Q4_0.GGUF"))
    assert name_and_path("mlx-community/Qwen3-8B-4bit") == (
        "mlx-community/Qwen3-8B-4bit",
        "/hub/mlx-community/Qwen3-8B-4bit",
    )


@pytest.mark.parametrize(
    "model", ["", " ", "model", "a/b/c", "../x", "/no/such/dir", "none/..", "org/a b", "x.gguf", "org/x.gguf"]
)
def test_refuses_what_is_no_model(here, model):
    with pytest.raises(ModelLoadError, match="is no model: there is no such file") as caught:
        resolve(model, progress=NoProgress())
    assert repr(model) in caught.value.message


def test_refuses_other_directories_and_files(here):
    with pytest.raises(ModelLoadError, match=r"org is no model directory: it has no config\.json"):
        resolve("org", progress=NoProgress())
    with pytest.raises(ModelLoadError, match=r"config\.json is not a model"):
        resolve("org/Model-1B/config.json", progress=NoProgress())
