"""A Progress that remembers."""

from mlx_server.checkpoint.progress import Advance


class Recorder:
    def __init__(self) -> None:
        self.tasks: list[tuple[str, int, int]] = []  # description, total and done bytes
        self.done_bytes = 0

    def task(self, description: str, total_bytes: int, done_bytes: int = 0) -> "Recorder":
        self.tasks.append((description, total_bytes, done_bytes))
        return self

    def __enter__(self) -> Advance:
        return self.advance

    def __exit__(self, *exc_info: object) -> None:
        pass

    def advance(self, num_bytes: int) -> None:
        self.done_bytes += num_bytes
