"""A stand-in for the Hugging Face Hub: the two endpoints that a download uses, and ways to fail."""

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

COMMIT = "c0ffee" * 6 + "abcd"


class FakeHub:
    """Serves `files` as the model `org/model`. Faults are set by the test and count down.

    The bytes of LFS files (those larger than 1000 bytes here) are behind a redirect to another origin, as on the hub.
    """

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self.requests: list[tuple[str, str, dict[str, str]]] = []  # method and path, origin, headers (lower case)
        self.statuses: list[tuple[int, str]] = []  # answers of the next requests: status, X-Error-Code
        self.cut_after: dict[str, int] = {}  # file name -> bytes after which its next body ends
        self.corrupt = False  # file bodies have the right length and a wrong byte
        self.ignore_range = False
        self.stalled: threading.Event | None = None  # answers come only after it is set
        self.portal = False  # everything is answered by a login page
        self.url = self.cdn_url = ""

    def paths(self) -> list[str]:
        return [path for path, _, _ in self.requests]

    def listing(self) -> dict[str, object]:
        siblings = []
        for name, data in self.files.items():
            sibling: dict[str, object] = {"rfilename": name, "size": len(data), "blobId": git_hash(data)}
            if len(data) > 1000:
                sha256 = hashlib.sha256(data).hexdigest()
                sibling["lfs"] = {"sha256": sha256, "size": len(data), "pointerSize": 134}
            siblings.append(sibling)
        return {"id": "org/model", "sha": COMMIT, "siblings": siblings}


def git_hash(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


class _Handler(BaseHTTPRequestHandler):
    hub: FakeHub
    origin: str

    def do_GET(self) -> None:
        hub = self.hub
        path = self.path.partition("?")[0]
        hub.requests.append((f"GET {path}", self.origin, {key.lower(): value for key, value in self.headers.items()}))
        if hub.stalled:
            hub.stalled.wait()
        elif hub.portal:
            self.reply(200, b"<html>Log in to the airport's network</html>", {"Content-Type": "text/html"})
        elif hub.statuses:
            status, code = hub.statuses.pop(0)
            self.reply(status, b"{}", {"X-Error-Code": code} if code else {})
        elif path == "/api/models/org/model":
            self.reply(200, json.dumps(hub.listing()).encode(), {"Content-Type": "application/json"})
        elif path.startswith(prefix := f"/org/model/resolve/{COMMIT}/") and path.removeprefix(prefix) in hub.files:
            name = path.removeprefix(prefix)
            if len(hub.files[name]) > 1000 and self.origin == "hub":
                self.reply(302, b"", {"Location": hub.cdn_url + path})
            else:
                self.send_file(name)
        else:
            self.reply(404, b"{}", {"X-Error-Code": "RepoNotFound"})

    def send_file(self, name: str) -> None:
        hub = self.hub
        data = hub.files[name]
        if hub.corrupt:
            data = data[:-1] + bytes([data[-1] ^ 1])
        start = 0
        if (wanted := self.headers.get("Range")) and not hub.ignore_range:
            start = int(wanted.removeprefix("bytes=").removesuffix("-"))
        body = data[start:]
        sent = body[: hub.cut_after.pop(name, len(body))]
        self.reply(206 if start else 200, sent, {"Content-Length": str(len(body))})

    def reply(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in ({"Content-Length": str(len(body))} | headers).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args: object) -> None:
        pass


@contextmanager
def running(hub: FakeHub) -> Iterator[None]:
    """Serve a hub and its content network on two ports of 127.0.0.1."""
    servers = []
    for origin in ("hub", "cdn"):
        handler = type("Handler", (_Handler,), {"hub": hub, "origin": origin})
        server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}).start()
        servers.append(server)
    hub.url, hub.cdn_url = (f"http://127.0.0.1:{server.server_port}" for server in servers)
    try:
        yield
    finally:
        for server in servers:
            server.shutdown()
            server.server_close()
