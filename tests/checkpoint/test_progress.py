import io
import threading

from rich.console import Console

from mlx_server.checkpoint.progress import NoProgress, RichProgress


def test_a_bar_with_bytes_on_a_terminal():
    console = Console(file=io.StringIO(), force_terminal=True, width=120)
    with RichProgress(console).task("Downloading", 2_000_000, done_bytes=500_000) as advance:
        threads = [threading.Thread(target=advance, args=(500_000,)) for _ in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert "Downloading" in console.file.getvalue()
    assert "1.5/2.0 MB" in console.file.getvalue()


def test_one_line_elsewhere():
    console = Console(file=io.StringIO(), width=120)
    with RichProgress(console).task("Downloading", 2_000_000, done_bytes=500_000) as advance:
        advance(1_500_000)
    assert console.file.getvalue() == "Downloading (1.5 MB)\n"


def test_nothing():
    with NoProgress().task("Downloading", 2) as advance:
        advance(2)
