import os
import random
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from huggingface_hub import constants

from checkpoint.fake_hub import COMMIT, FakeHub, running
from checkpoint.recorder import Recorder
from mlx_server.chat.template_source import TemplateSource, templates_of_directory
from mlx_server.checkpoint import hub as hub_module
from mlx_server.checkpoint.hub import fetch_from_hub
from mlx_server.checkpoint.progress import NoProgress
from mlx_server.errors import ModelLoadError

WEIGHTS = random.Random(1).randbytes(300_000)
FILES = {
    "config.json": b'{"model_type": "llama"}',
    "tokenizer.json": b"{}",
    "chat_template.jinja": b"{{ messages }}",
    "additional_chat_templates/tool_use.jinja": b"{{ tools }}",
    "model-00001-of-00002.safetensors": WEIGHTS[:200_000],
    "model-00002-of-00002.safetensors": WEIGHTS[200_000:],
    "model.safetensors.index.json": b'{"weight_map": {}}',
}
OTHERS = {
    "README.md": b"# Model",
    "modeling.py": b"raise SystemExit",
    "pytorch_model.bin": b"x" * 2000,
    "consolidated.safetensors": b"x" * 2000,
    "onnx/config.json": b"{}",
    "onnx/chat_template.jinja": b"{{ messages }}",
    "additional_chat_templates/rag.jinja": b"{{ documents }}",
    "original/model.safetensors": b"x" * 2000,
}


MODEL_INFO, CONFIG = "/api/models/org/model", f"/org/model/resolve/{COMMIT}/config.json"


def use_endpoint(monkeypatch: pytest.MonkeyPatch, url: str) -> None:
    """What HF_ENDPOINT does when huggingface-hub is imported."""
    monkeypatch.setattr(constants, "ENDPOINT", url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", url + "/{repo_id}/resolve/{revision}/{filename}")


@pytest.fixture
def hub(tmp_path, monkeypatch):
    hub = FakeHub()
    hub.files = FILES | OTHERS
    monkeypatch.setattr(hub_module, "RETRY_DELAYS_S", (0.0, 0.0, 0.0))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    with running(hub):
        use_endpoint(monkeypatch, hub.url)
        yield hub


def contents(snapshot: Path) -> dict[str, bytes]:
    files = (path for path in snapshot.rglob("*") if path.is_file())
    return {path.relative_to(snapshot).as_posix(): path.read_bytes() for path in files}


def leftovers() -> list[str]:
    return [path.name for path in Path(constants.HF_HUB_CACHE).rglob("*.incomplete")]


def refused(model_id: str = "org/model") -> str:
    with pytest.raises(ModelLoadError) as caught:
        fetch_from_hub(model_id, NoProgress())
    assert "\n" not in caught.value.message
    return caught.value.message


def test_downloads_what_is_needed_and_nothing_else(hub):
    progress = Recorder()
    snapshot = fetch_from_hub("org/model", progress)
    assert snapshot == Path(constants.HF_HUB_CACHE) / "models--org--model" / "snapshots" / COMMIT
    assert contents(snapshot) == FILES
    size = sum(map(len, FILES.values()))
    assert progress.tasks == [("Downloading org/model", size, 0)]
    assert progress.done_bytes == size
    assert leftovers() == []


def test_a_downloaded_model_has_its_template_for_tools(hub):
    templates = templates_of_directory(fetch_from_hub("org/model", NoProgress()), {})
    assert templates == TemplateSource(default="{{ messages }}", tool_use="{{ tools }}")


def test_a_second_start_asks_only_whether_there_is_a_newer_version(hub):
    first = fetch_from_hub("org/model", NoProgress())
    hub.requests.clear()
    progress = Recorder()
    assert fetch_from_hub("org/model", progress) == first
    assert hub.paths() == ["GET /api/models/org/model"]
    assert progress.tasks == []


def test_a_changed_file_alone_is_downloaded_again(hub):
    fetch_from_hub("org/model", NoProgress())
    hub.files = hub.files | {"config.json": b'{"model_type": "qwen3"}'}
    progress = Recorder()
    fetch_from_hub("org/model", progress)
    assert progress.done_bytes == len(hub.files["config.json"])


def test_the_weights_of_a_model_that_is_not_supported_are_not_downloaded(hub):
    hub.files = hub.files | {"config.json": b'{"model_type": "gpt2"}'}
    for _ in range(2):  # the second time the config is in the cache
        assert "org/model: model_type 'gpt2' is not supported (supported: gemma3_text, llama" in refused()
    assert hub.paths() == [f"GET {path}" for path in (MODEL_INFO, CONFIG, MODEL_INFO)]


def test_the_token_stays_with_the_hub(hub):
    fetch_from_hub("org/model", NoProgress())
    to_hub = [headers for _, origin, headers in hub.requests if origin == "hub"]
    to_cdn = [headers for _, origin, headers in hub.requests if origin == "cdn"]
    assert {headers["authorization"] for headers in to_hub} == {"Bearer hf_secret"}
    assert len(to_cdn) == 2
    assert not any("authorization" in headers for headers in to_cdn)


def test_a_cut_download_goes_on_where_it_ended(hub):
    hub.cut_after = {"config.json": 10, "model-00001-of-00002.safetensors": 150_000}
    progress = Recorder()
    assert contents(fetch_from_hub("org/model", progress)) == FILES
    assert progress.done_bytes == sum(map(len, FILES.values()))
    ranges = [headers["range"] for _, _, headers in hub.requests if "range" in headers]
    assert ranges == ["bytes=10-", "bytes=150000-", "bytes=150000-"]  # the last is asked of both origins


def test_a_new_process_goes_on_where_the_old_one_was_killed(hub, monkeypatch):
    monkeypatch.setattr(hub_module, "RETRY_DELAYS_S", ())
    hub.files = {"model.safetensors": WEIGHTS}
    hub.cut_after = {"model.safetensors": 100_000}
    assert "the download goes on" in refused()
    assert leftovers() != []
    progress = Recorder()
    assert contents(fetch_from_hub("org/model", progress)) == {"model.safetensors": WEIGHTS}
    assert progress.tasks == [("Downloading org/model", 300_000, 100_000)]
    assert progress.done_bytes == 200_000


def test_a_server_that_ignores_ranges(hub):
    hub.files = {"model.safetensors": WEIGHTS}
    hub.cut_after = {"model.safetensors": 100_000}
    hub.ignore_range = True
    progress = Recorder()
    assert contents(fetch_from_hub("org/model", progress)) == {"model.safetensors": WEIGHTS}
    assert progress.done_bytes == 300_000


@pytest.mark.parametrize("status", [408, 429, 500, 502, 503, 504])
def test_passing_faults_are_tried_again(hub, status):
    hub.statuses = [(status, ""), (status, "")]
    assert contents(fetch_from_hub("org/model", NoProgress())) == FILES


def test_a_fault_of_one_file_is_tried_again(hub, monkeypatch):
    listing = hub.listing
    monkeypatch.setattr(hub, "listing", lambda: (hub.statuses.append((503, "")), listing())[1])
    assert contents(fetch_from_hub("org/model", NoProgress())) == FILES


def test_a_lasting_fault_is_named(hub):
    hub.statuses = [(503, "")] * 4
    assert "answers with status 503" in refused()
    assert len(hub.requests) == 4


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_damaged_content_of_the_right_length_is_not_kept(hub, name):
    hub.files = {"model.safetensors": b"w" * 500} | {name: FILES.get(name, WEIGHTS)}
    hub.corrupt = True
    assert f"{name} of org/model arrived damaged" in refused() or name == "config.json"
    assert leftovers() == []
    hub.corrupt = False
    assert contents(fetch_from_hub("org/model", NoProgress())) == hub.files


@pytest.mark.parametrize(
    ("status", "code", "words"),
    [
        (403, "GatedRepo", "org/model is gated: accept its terms at http://127.0.0.1"),
        (401, "GatedRepo", "is gated"),
        (404, "RepoNotFound", "org/model is not on http://127.0.0.1"),
        (401, "RepoNotFound", "is not on"),
        (401, "", "refuses access to org/model (status 401); check HF_TOKEN"),
        (403, "", "refuses access to org/model (status 403); check HF_TOKEN"),
    ],
)
def test_refusals(hub, status, code, words):
    hub.statuses = [(status, code)]
    assert words in refused()
    assert len(hub.requests) == 1


def test_an_unknown_model(hub):
    assert "org/other is not on" in refused("org/other")


def test_a_file_that_is_gated(hub, monkeypatch):
    listing = hub.listing
    monkeypatch.setattr(hub, "listing", lambda: (hub.statuses.append((403, "GatedRepo")), listing())[1])
    assert "is gated" in refused()


def test_no_weights(hub):
    hub.files = {"config.json": b"{}", "model.gguf": WEIGHTS}
    assert "has no *.safetensors weights" in refused()


def test_a_login_page_in_between(hub):
    hub.portal = True
    assert "does not answer as the Hugging Face Hub does" in refused()


@pytest.mark.parametrize("sha", ["../../../etc", "", None, 7])
def test_a_listing_can_not_name_paths(hub, monkeypatch, sha):
    listing = hub.listing() | {"sha": sha}
    monkeypatch.setattr(hub, "listing", lambda: listing)
    assert "does not answer as the Hugging Face Hub does" in refused()


def test_offline(hub, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert "HF_HUB_OFFLINE forbids" in refused()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    snapshot = fetch_from_hub("org/model", NoProgress())
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    hub.requests.clear()
    assert fetch_from_hub("org/model", NoProgress()) == snapshot
    assert hub.requests == []


def test_no_network(hub, monkeypatch):
    snapshot = fetch_from_hub("org/model", NoProgress())
    use_endpoint(monkeypatch, "http://127.0.0.1:1")
    assert fetch_from_hub("org/model", NoProgress()) == snapshot
    assert "http://127.0.0.1:1 can't be reached" in refused("org/other")


def test_a_hub_that_stalls(hub, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_ETAG_TIMEOUT", 0.05)
    hub.stalled = threading.Event()
    try:
        assert "can't be reached" in refused()
    finally:
        hub.stalled.set()
    assert len(hub.requests) == 4


def test_no_disk_space(hub, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: type("Usage", (), {"free": 300_000})())
    assert "org/model needs 0.00 GB in" in refused()
    assert hub.paths() == ["GET /api/models/org/model"]


def test_the_disk_becomes_full(hub, monkeypatch):
    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(hub_module, "_stream", full)
    assert "can't be stored in" in refused()


def test_the_environment_of_a_new_process(hub, tmp_path):
    code = (
        "from mlx_server.checkpoint.resolve import resolve; from mlx_server.checkpoint.progress import NoProgress\n"
        "print(resolve('org/model', progress=NoProgress()).path)"
    )

    def path_in(environment: dict[str, str]) -> str:
        command = [sys.executable, "-c", code]
        return subprocess.run(
            command, env=os.environ | environment, stdout=subprocess.PIPE, text=True, check=True
        ).stdout.strip()

    environment = {"HF_ENDPOINT": hub.url, "HF_HUB_CACHE": str(tmp_path / "other"), "HF_TOKEN": "hf_other"}
    snapshot = path_in(environment)
    assert snapshot == str(tmp_path / "other/models--org--model/snapshots" / COMMIT)
    assert contents(Path(snapshot)) == FILES
    assert set(hub.paths()) == {
        "GET /api/models/org/model",
        *(f"GET /org/model/resolve/{COMMIT}/{name}" for name in FILES),
    }
    headers = hub.requests[0][2]
    assert headers["authorization"] == "Bearer hf_other"
    assert "mlx-server/" in headers["user-agent"]
    hub.requests.clear()
    assert path_in(environment | {"HF_HUB_OFFLINE": "1"}) == snapshot
    assert hub.requests == []
