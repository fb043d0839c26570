"""Faults on purpose: a function of ours fails at its n-th call, then never again, as SQLite's tests do with malloc.

The functions are replaced from outside, so that the program itself has no trace of it.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


class InjectedError(Exception):
    """What no code of ours expects."""


class Fault:
    """The n-th call of a function fails."""

    def __init__(self, at: int) -> None:
        self.at = at
        self.num_calls = 0

    @property
    def has_happened(self) -> bool:
        return self.num_calls >= self.at

    def count(self) -> None:
        self.num_calls += 1
        if self.num_calls == self.at:
            raise InjectedError(f"call {self.at} fails, as the test wants it")


@contextmanager
def failing(owner: Any, name: str, at: int) -> Iterator[Fault]:
    """Let the `at`-th call of `owner.name`, a function or method, fail before it does anything."""
    original = owner.__dict__[name]
    function = original.__func__ if isinstance(original, staticmethod) else original
    fault = Fault(at)

    def replaced(*args: Any, **kwargs: Any) -> Any:
        fault.count()
        return function(*args, **kwargs)

    setattr(owner, name, staticmethod(replaced) if isinstance(original, staticmethod) else replaced)
    try:
        yield fault
    finally:
        setattr(owner, name, original)
