"""Faults on purpose: a function of ours fails at its n-th call, then never again, as SQLite's tests do with malloc.

The functions are replaced from outside, so that the program itself has no trace of it.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest


class InjectedError(Exception):
    """What no code of ours expects."""


class Fault:
    """The n-th call of a function fails."""

    def __init__(self, at: int, error: Exception) -> None:
        self.at = at
        self.num_calls = 0
        self._error = error

    @property
    def has_happened(self) -> bool:
        return self.num_calls >= self.at

    def count(self) -> None:
        self.num_calls += 1
        if self.num_calls == self.at:
            raise self._error


@contextmanager
def failing(owner: Any, name: str, at: int, error: Exception | None = None) -> Iterator[Fault]:
    """Let the `at`-th call of `owner.name`, a function or method, fail before it does anything."""
    function = getattr(owner, name)
    fault = Fault(at, error or InjectedError(f"call {at} fails, as the test wants it"))

    def replaced(*args: Any, **kwargs: Any) -> Any:
        fault.count()
        return function(*args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(owner, name, replaced)
        yield fault
