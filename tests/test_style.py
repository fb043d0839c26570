"""What a linter does not say about the code's shape: it stays in pieces that fit on a screen, under names that tell."""

import ast
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
PYTHON = sorted(path for folder in ("python", "tests", "bench", "tools") for path in (ROOT / folder).rglob("*.py"))
CPP = sorted(path for folder in ("csrc", "tests/cpp") for path in (ROOT / folder).rglob("*") if path.is_file())
MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 60
VAGUE_NAMES = {"adapter", "common", "helper", "helpers", "misc", "postprocessor", "service", "util", "utils"}
# The only places that catch whatever comes and go on; each says on its line why.
BROAD_EXCEPTS = {
    "api/sse.py",  # a stream, whose client can't be told by a status any more
    "chat/grammar.py",  # the library raises nothing narrower
    "chat/sandbox.py",  # a model's template runs code of strangers
    "chat/tokenizer.py",  # the library raises nothing narrower
    "engine/transport.py",  # the loop of the engine process
    "engine_client.py",  # the loop of the API process's connection to it
}


def name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def functions(path: Path) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node


def goes_on_after_anything(handler: ast.ExceptHandler) -> bool:
    """Whether it catches all exceptions and does not raise them again."""
    broad = handler.type is None or ast.unparse(handler.type) in {"Exception", "BaseException"}
    return broad and not any(isinstance(node, ast.Raise) and node.exc is None for node in ast.walk(handler))


def test_files_are_short() -> None:
    assert [name(path) for path in PYTHON + CPP if len(path.read_text().splitlines()) > MAX_FILE_LINES] == []


def test_functions_fit_on_a_screen() -> None:
    long = [
        f"{name(path)}: {function.name}"
        for path in PYTHON
        for function in functions(path)
        if (function.end_lineno or 0) - function.lineno >= MAX_FUNCTION_LINES
    ]
    assert long == []


def test_names_say_what_is_inside() -> None:
    assert [name(path) for path in PYTHON + CPP if path.stem in VAGUE_NAMES] == []


def test_exceptions_are_caught_narrowly() -> None:
    package = ROOT / "python/mlx_server"
    found = {
        path.relative_to(package).as_posix()
        for path in package.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.ExceptHandler) and goes_on_after_anything(node)
    }
    assert found == BROAD_EXCEPTS


def test_every_kernel_runs_in_a_cpp_test() -> None:
    tests = "".join(path.read_text() for path in (ROOT / "tests/cpp").glob("test_*.cpp"))
    kernels = [path.relative_to(ROOT / "csrc").as_posix() for path in CPP if path.suffix == ".kernel"]
    assert kernels
    assert [kernel for kernel in kernels if f'#include "{kernel}"' not in tests] == []
