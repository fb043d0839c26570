from mlx_server import pulse
from mlx_server.pulse import Pulse


def test_a_loop_is_late_when_it_stands_still(tmp_path, monkeypatch):
    now_s = 1000.0
    monkeypatch.setattr(pulse.time, "monotonic", lambda: now_s)
    loop, watcher = Pulse(tmp_path), Pulse(tmp_path)
    assert not watcher.is_late(0.0, 0)  # it has not begun
    loop.beat(slowest_step_s=0.5)
    assert not watcher.is_late(4.0, 4)
    now_s += 5
    assert watcher.is_late(4.0, 4)
    assert not watcher.is_late(4.0, 20)  # its steps may take that long
    loop.beat(slowest_step_s=0.5)
    assert not watcher.is_late(4.0, 4)


def test_half_a_file_is_no_pulse(tmp_path):
    (tmp_path / "engine.pulse").write_bytes(b"1234")
    assert not Pulse(tmp_path).is_late(0.0, 0)
