"""Which part of the program may import what. ruff's `banned-api` shows a breach in the editor; this says it exactly."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "python/mlx_server"

# Import -> the only places that may have it.
OWNERS = {
    "mlx": ("engine", "models", "ops"),
    "mlx_server._ext": ("ops",),
    "falcon": ("api",),
    "gunicorn": ("api/server.py",),
    "jinja2": ("chat/sandbox.py",),
    "tokenizers": ("chat",),
    "huggingface_hub": ("checkpoint/hub.py",),
    "dill": (),
    "marshal": (),
    "pickle": (),
    "shelve": (),
    "torch": (),
    "transformers": (),
}
WALL_CLOCKS = ("time.time", "time.time_ns", "datetime.now", "datetime.utcnow", "datetime.today", "date.today")
# Part of ours -> the parts that may import it. The processes share no code but the messages between them.
USERS = {
    "engine": ("engine",),
    "models": ("engine", "models"),
    "ops": ("engine", "models", "ops"),
    "api": ("api",),
    "supervisor": ("cli", "supervisor"),
}


def imports(source: Path) -> Iterator[str]:
    """Full names of what a file imports anywhere, also inside functions: `from a import b` gives `a.b`."""
    for node in ast.walk(ast.parse(source.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def breaches(name: str, allowed: tuple[str, ...]) -> list[str]:
    """Files outside the allowed places that import a module or something in it."""
    return [
        f"{path} imports {imported}"
        for source in sorted(PACKAGE.rglob("*.py"))
        if not (path := source.relative_to(PACKAGE).as_posix()).startswith(allowed)
        for imported in imports(source)
        if imported == name or imported.startswith(f"{name}.")
    ]


@pytest.mark.parametrize(("name", "allowed"), OWNERS.items(), ids=OWNERS)
def test_third_party_packages_stay_where_they_belong(name: str, allowed: tuple[str, ...]) -> None:
    assert breaches(name, allowed) == []


@pytest.mark.parametrize(("part", "users"), USERS.items(), ids=USERS)
def test_parts_import_only_what_is_below_them(part: str, users: tuple[str, ...]) -> None:
    assert breaches(f"mlx_server.{part}", users) == []


@pytest.mark.parametrize(
    ("module", "absent"),
    [
        ("mlx_server.cli", "mlx falcon gunicorn jinja2 numpy rich tokenizers zmq"),
        ("mlx_server.supervisor", "mlx falcon gunicorn jinja2 numpy tokenizers"),
        ("mlx_server.api.app", "mlx gunicorn"),
        ("mlx_server.api.server", "mlx"),
        ("mlx_server.engine.__main__", "falcon gunicorn jinja2 rich"),
    ],
)
def test_processes_load_only_what_is_theirs(module: str, absent: str) -> None:
    code = f"import sys, {module}; print(*(name for name in {absent.split()} if name in sys.modules))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert result.stdout.split() == []


def test_templates_are_rendered_in_the_immutable_sandbox_only() -> None:
    tree = ast.parse((PACKAGE / "chat/sandbox.py").read_text())
    attributes = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    imported = {name.rpartition(".")[2] for name in imports(PACKAGE / "chat/sandbox.py")}
    environments = {name for name in attributes | imported if name.endswith("Environment")}
    assert environments == {"ImmutableSandboxedEnvironment"}


def test_only_answers_tell_the_date() -> None:
    """All else is measured by clocks that nobody sets, so that a jump of the machine's clock changes nothing."""
    dated = {
        source.relative_to(PACKAGE).as_posix()
        for source in PACKAGE.rglob("*.py")
        for node in ast.walk(ast.parse(source.read_text()))
        if isinstance(node, ast.Attribute) and ast.unparse(node).endswith(WALL_CLOCKS)
    }
    assert dated == {"api/openai/chat.py", "api/openai/completions.py", "api/openai/responses.py", "api/server.py"}


def test_the_patterns_of_clients_are_llguidances() -> None:
    """Its engine takes linear time. Those of Python's `re` are written where they are used, or texts, escaped."""
    foreign = [
        f"{source.relative_to(PACKAGE)}: {ast.unparse(node)}"
        for source in PACKAGE.rglob("*.py")
        for node in ast.walk(ast.parse(source.read_text()))
        if isinstance(node, ast.Call) and ast.unparse(node.func).startswith("re.")
        if not isinstance(node.args[0], ast.Constant | ast.JoinedStr) and "re.escape" not in ast.unparse(node)
    ]
    assert foreign == []
    assert not any("std::regex" in path.read_text() for path in (PACKAGE.parents[1] / "csrc").rglob("*.cpp"))


def test_imports_are_seen(tmp_path: Path) -> None:
    source = tmp_path / "a.py"
    source.write_text("import mlx.core as mx\ndef f():\n    from jinja2 import Environment, sandbox\n")
    assert list(imports(source)) == ["mlx.core", "jinja2.Environment", "jinja2.sandbox"]
