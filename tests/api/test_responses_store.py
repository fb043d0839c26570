"""Which responses are kept, for how long, and from whom."""

import logging
import os
import stat
from pathlib import Path

import msgspec
import pytest

from mlx_server.api.openai.responses_store import ResponseStore, StoredResponse
from mlx_server.api.openai.responses_types import InputItem


def name(number: int) -> str:
    return f"resp_{number:032x}"


def stored(text: str = "a") -> StoredResponse:
    return StoredResponse(msgspec.Raw(b'{"id": "x"}'), [InputItem(role="user", content=text)])


def age(folder: Path, *numbers: int) -> None:
    """Let these have been used long ago, the first one longest."""
    for seconds, number in enumerate(numbers):
        os.utime(folder / name(number), (seconds, seconds))


def test_every_process_has_what_one_has_put(tmp_path: Path) -> None:
    folder = tmp_path / "responses"
    one, other = ResponseStore(folder), ResponseStore(folder)
    one.put(name(1), stored())
    found = other.get(name(1))
    assert found is not None
    assert (bytes(found.response), found.items) == (b'{"id": "x"}', stored().items)
    assert other.delete(name(1)) and not one.delete(name(1)) and one.get(name(1)) is None


def test_nobody_else_may_read_them(tmp_path: Path) -> None:
    store = ResponseStore(tmp_path / "responses")
    store.put(name(1), stored())
    modes = [stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "responses", tmp_path / "responses" / name(1))]
    assert modes == [0o700, 0o600]


@pytest.mark.parametrize("response_id", ["", "resp_", "../secret", name(1).upper(), name(1) + "\n", "x" * 999])
def test_an_id_is_no_path(tmp_path: Path, response_id: str) -> None:
    (tmp_path / "secret").write_text("{}")
    store = ResponseStore(tmp_path / "responses")
    assert store.get(response_id) is None and not store.delete(response_id)


def test_those_not_used_for_longest_go_first(tmp_path: Path) -> None:
    store = ResponseStore(tmp_path, max_responses=3)
    for number in (1, 2, 3):
        store.put(name(number), stored())
    age(tmp_path, 1, 2, 3)
    assert store.get(name(1)) is not None
    store.put(name(4), stored())
    assert sorted(path.name for path in tmp_path.iterdir()) == [name(1), name(3), name(4)]


def test_bytes_are_bounded(tmp_path: Path) -> None:
    store = ResponseStore(tmp_path, max_bytes=5000)
    for number in (1, 2, 3):
        store.put(name(number), stored("x" * 1500))
    age(tmp_path, 2, 1, 3)
    store.put(name(4), stored("x" * 1500))
    assert sorted(path.name for path in tmp_path.iterdir()) == [name(1), name(3), name(4)]
    store.put(name(5), stored("x" * 6000))
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_fails_costs_a_line_in_the_log(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    store = ResponseStore(tmp_path)
    (tmp_path / name(1)).with_suffix(".new").touch()
    with caplog.at_level(logging.WARNING):
        store.put(name(1), stored("secret"))
    assert "could not be kept" in caplog.text and "secret" not in caplog.text
    assert store.get(name(1)) is None and list(tmp_path.iterdir()) == []
