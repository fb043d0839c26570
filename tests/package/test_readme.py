"""The README's commands are the ones that .ci/run runs, so that neither can go stale alone."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]


def set_up_commands() -> list[str]:
    """The command lines of the section "Set-up", in order."""
    section = (ROOT / "README.md").read_text().split("\n## Set-up\n")[1].split("\n## ")[0]
    blocks = re.findall(r"```sh\n(.*?)```", section, flags=re.DOTALL)
    return [line for block in blocks for line in block.splitlines()]


def ci_commands() -> list[str]:
    return [line.replace(" --quiet", "") for line in (ROOT / ".ci/run").read_text().splitlines()]


def test_set_up_is_two_commands() -> None:
    server, tests = set_up_commands()
    assert server.endswith("&& .venv/bin/mlx-server --model demo")
    assert tests == ".venv/bin/pytest"


def test_ci_installs_as_the_readme_says() -> None:
    install, _, server = set_up_commands()[0].rpartition(" && ")
    assert server == ".venv/bin/mlx-server --model demo"  # started by the tests in tests/e2e
    assert install in ci_commands()


def test_each_promise_is_proved_by_one_test() -> None:
    words = re.findall(r"\| `\.venv/bin/pytest -m soak -k (\w+)` \|", (ROOT / "README.md").read_text())
    soak = (ROOT / "tests/soak/test_promises.py").read_text()
    tests = re.findall(r"^def (test_\w+)", soak, re.MULTILINE)
    assert "pytest.mark.soak" in soak
    assert [[name for name in tests if word in name] for word in words] == [[name] for name in tests]


def test_ci_ends_with_the_readmes_test_command() -> None:
    assert ci_commands()[-1] == set_up_commands()[1]
