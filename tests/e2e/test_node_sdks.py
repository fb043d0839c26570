"""The npm SDKs of `node/package.json` against a real server, where Node is installed; always in CI."""

import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from mlx_server.checkpoint.demo import cache_dir
from server_process import ServerProcess

SCRIPTS = Path(__file__).parent / "node"
pytestmark = [
    pytest.mark.model,
    pytest.mark.skipif(
        not ("CI" in os.environ or (shutil.which("npm") and shutil.which("node"))), reason="needs node and npm"
    ),
]
Run = Callable[[str], None]


@pytest.fixture(scope="module")
def run_script(server: ServerProcess, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Runs a script in a copy of the folder, beside the packages."""
    folder = tmp_path_factory.mktemp("node")
    shutil.copytree(SCRIPTS, folder, dirs_exist_ok=True)
    command = ["npm", "install", "--silent", "--no-audit", "--no-fund", f"--cache={cache_dir() / 'npm'}"]
    subprocess.run([*command, "--prefer-offline"], cwd=folder, check=True, timeout=240, stdin=subprocess.DEVNULL)

    def run(name: str) -> None:
        result = subprocess.run(
            ["node", name, server.url()], cwd=folder, check=False, capture_output=True, text=True, timeout=120
        )
        assert result.returncode == 0, f"{result.stderr}\n{server.err}"

    return run


@pytest.mark.parametrize("name", ["openai.mjs", "anthropic.mjs", "ai.mjs"])
def test_a_script_runs(run_script: Run, name: str) -> None:
    run_script(name)
