import subprocess
import sys
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlx_server.api import rate_limit
from mlx_server.api.rate_limit import RateLimiter


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(rate_limit, "time", clock)
    return clock


@pytest.mark.parametrize("limit", [1, 3, 7, 60, 1000])
def test_so_many_at_once_then_so_many_a_minute(tmp_path: Path, clock: Clock, limit: int) -> None:
    limiter = RateLimiter(tmp_path / "rate", limit)
    assert [limiter.admit("a") for _ in range(limit)] == [0.0] * limit
    wait_s = limiter.admit("a")
    assert wait_s == pytest.approx(60 / limit)
    clock.now += wait_s * 0.99
    assert limiter.admit("a") > 0
    clock.now += wait_s * 0.011
    assert limiter.admit("a") == 0.0
    assert limiter.admit("a") > 0
    clock.now += 61
    assert [limiter.admit("a") for _ in range(limit)] == [0.0] * limit


def test_each_client_has_its_own(tmp_path: Path, clock: Clock) -> None:
    limiter = RateLimiter(tmp_path / "rate", 1)
    assert limiter.admit("10.0.0.1") == 0.0
    assert limiter.admit("10.0.0.2") == 0.0
    assert limiter.admit("::1") == 0.0
    assert limiter.admit("10.0.0.1") > 0


def test_a_worker_that_starts_later_knows_what_was_used(tmp_path: Path, clock: Clock) -> None:
    assert RateLimiter(tmp_path / "rate", 1).admit("a") == 0.0
    assert RateLimiter(tmp_path / "rate", 1).admit("a") > 0


@given(pauses=st.lists(st.floats(0, 30), max_size=60), limit=st.integers(1, 20))
def test_never_more_than_twice_the_limit_in_a_minute(
    tmp_path_factory: pytest.TempPathFactory, pauses: list[float], limit: int
) -> None:
    with pytest.MonkeyPatch.context() as monkeypatch:
        clock = Clock()
        monkeypatch.setattr(rate_limit, "time", clock)
        limiter = RateLimiter(tmp_path_factory.mktemp("rate") / "rate", limit)
        admitted: list[float] = []
        for pause_s in pauses:
            clock.now += pause_s
            if limiter.admit("a") == 0.0:
                admitted.append(clock.now)
        limiter.close()
    for start in admitted:
        assert sum(start <= moment < start + 60 for moment in admitted) <= 2 * limit


def test_processes_count_together(tmp_path: Path) -> None:
    ask_50_times = (
        "import sys; from pathlib import Path; from mlx_server.api.rate_limit import RateLimiter; "
        "limiter = RateLimiter(Path(sys.argv[1]), 50); print(sum(limiter.admit('a') == 0.0 for _ in range(50)))"
    )
    command = [sys.executable, "-c", ask_50_times, str(tmp_path / "rate")]
    start = time.monotonic()
    processes = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    admitted = [int(process.communicate(timeout=60)[0]) for process in processes]
    num_freed = (time.monotonic() - start) * 50 / 60
    assert 50 <= sum(admitted) <= 50 + num_freed
