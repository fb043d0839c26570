import subprocess
import sys
from pathlib import Path


def test_the_readme_lists_what_the_code_supports() -> None:
    script = Path(__file__).parents[2] / "tools/supported_models.py"
    result = subprocess.run(
        [sys.executable, script, "--check"], capture_output=True, text=True, check=False, timeout=60
    )
    assert result.returncode == 0, result.stdout + result.stderr
