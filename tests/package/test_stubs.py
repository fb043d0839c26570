import subprocess
import sys
from pathlib import Path


def test_the_committed_stub_is_what_the_extension_generates() -> None:
    script = Path(__file__).parents[2] / "tools/stubs.py"
    result = subprocess.run(
        [sys.executable, script, "--check"], capture_output=True, text=True, check=False, timeout=60
    )
    assert result.returncode == 0, result.stdout + result.stderr
