"""What happens to every request before and after its resource: id, log, origin, Host, key, rate."""

import hashlib
import hmac
import ipaddress
import logging
import math
import socket
import time
import uuid
from collections.abc import Callable, Collection, Iterable, Iterator
from typing import Any
from urllib.parse import quote

import falcon

from mlx_server.api.errors import HttpError
from mlx_server.api.rate_limit import RateLimiter

log = logging.getLogger(__name__)

_StartResponse = Callable[[str, list[tuple[str, str]]], Callable[[bytes], None]]

HEALTH_PATHS = ("/health", "/health/ready")
_NO_KEY = (*HEALTH_PATHS, "/docs")  # a page that is the same for all servers; it asks for the key itself
_CORS_MAX_AGE_S = 600
# `*` covers neither `authorization` nor, in all browsers, the others.
_CORS_REQUEST_HEADERS = "authorization, content-type, x-api-key, anthropic-version, anthropic-beta"
_CORS_RESPONSE_HEADERS = "x-request-id, request-id, retry-after, x-should-retry, x-mlx-server-ignored"


def new_request_id() -> str:
    return f"req_{uuid.uuid4().hex}"


class RequestId:
    """Gives each request an id of ours; both vendors' clients read it from a header."""

    def process_request(self, req: falcon.Request, resp: falcon.Response) -> None:
        request_id = new_request_id()
        req.env[AccessLog.ID_KEY] = request_id
        resp.set_headers({"x-request-id": request_id, "request-id": request_id})


class Cors:
    """Lets web pages of the allowed origins read the answers. Browsers ask first, without a key: that is answered here.

    See the Fetch standard, section 3.2.
    """

    def __init__(self, origins: Collection[str]) -> None:
        """`origins`: such as `http://localhost:3000`; `*` allows all."""
        self._origins = origins

    def headers(self, origin: str | None) -> dict[str, str]:
        """Of any answer to a page of that origin."""
        if not self._origins:
            return {}
        headers = {"vary": "Origin"}
        if origin and self._allows(origin):
            headers |= {
                "access-control-allow-origin": origin,
                "access-control-expose-headers": _CORS_RESPONSE_HEADERS,
            }
        return headers

    def process_request(self, req: falcon.Request, resp: falcon.Response) -> None:
        origin = req.get_header("origin")
        resp.set_headers(self.headers(origin))
        is_preflight = req.method == "OPTIONS" and req.get_header("access-control-request-method") is not None
        if is_preflight and origin and self._allows(origin):
            self._answer_preflight(req, resp)

    def _allows(self, origin: str) -> bool:
        return "*" in self._origins or origin in self._origins

    def _answer_preflight(self, req: falcon.Request, resp: falcon.Response) -> None:
        asked = req.get_header("access-control-request-headers")
        resp.set_headers(
            {
                "access-control-allow-methods": "GET, HEAD, POST, DELETE",
                "access-control-allow-headers": asked or _CORS_REQUEST_HEADERS,
                "access-control-max-age": str(_CORS_MAX_AGE_S),
            }
        )
        if req.get_header("access-control-request-private-network") == "true":
            resp.set_header("access-control-allow-private-network", "true")
        resp.status = falcon.HTTP_204
        resp.complete = True


class HostCheck:
    """Refuses requests that a foreign web page sends after rebinding its own name to this machine's address.

    A key stops them too, so the name is checked on servers without one. Names without a dot can't be rebound: the
    public DNS does not serve them.
    """

    def __init__(self, own_names: Collection[str], *, any_name: bool) -> None:
        self._any_name = any_name
        machine = socket.gethostname().lower()
        self._names = {"localhost", machine, machine.split(".")[0] + ".local", *(name.lower() for name in own_names)}

    def process_request(self, req: falcon.Request, resp: falcon.Response) -> None:
        header = req.get_header("host")
        if header is None:
            if req.env.get("SERVER_PROTOCOL") == "HTTP/1.0":
                return
            raise HttpError(400, "host_required", "The Host header is missing.")
        if not (self._any_name or self._is_ours(header)):
            raise HttpError(
                421,
                "unknown_host",
                "This server does not answer to that Host name: use its IP address, or start it with --allowed-hosts "
                "or --api-key.",
            )

    def _is_ours(self, header: str) -> bool:
        host = header.partition("]")[0].lstrip("[") if header.startswith("[") else header.partition(":")[0]
        host = host.lower().rstrip(".")
        if "." not in host or host in self._names or host.endswith(".localhost"):
            return True
        try:
            ipaddress.ip_address(host)
        except ValueError:
            return False
        return True


class Auth:
    """Asks for the key on every path, known or not, but for /health and /docs."""

    def __init__(self, api_key: str) -> None:
        self._key_hash = _hash(api_key.encode())

    def process_request(self, req: falcon.Request, resp: falcon.Response) -> None:
        if req.path in _NO_KEY:
            return
        scheme, _, bearer = (req.get_header("authorization") or "").partition(" ")
        keys = [bearer.strip()] if scheme.lower() == "bearer" else []
        keys.append(req.get_header("x-api-key") or "")
        # Of equal length, and all compared, so that the time it takes tells nothing. WSGI hands bytes on as Latin-1.
        if not sum(hmac.compare_digest(_hash(key.encode("latin-1", "replace")), self._key_hash) for key in keys):
            raise HttpError(
                401,
                "invalid_api_key",
                "Incorrect API key provided: send the server's key as 'Authorization: Bearer KEY'.",
                kind="authentication_error",
                www_authenticate="Bearer",
            )


class RateLimit:
    """Counts requests by the client's address; those for health are free."""

    def __init__(self, limiter: RateLimiter) -> None:
        self._limiter = limiter

    def process_request(self, req: falcon.Request, resp: falcon.Response) -> None:
        if req.path in HEALTH_PATHS:
            return
        wait_s = self._limiter.admit(req.remote_addr)
        if wait_s:
            raise HttpError(
                429,
                "rate_limit_exceeded",
                "Too many requests from this address; try again later.",
                kind="rate_limit_error",
                retry_after=str(math.ceil(wait_s)),
            )


class AccessLog:
    """WSGI wrapper: one line a request when its answer has ended. No query, header or body is logged."""

    ID_KEY = "mlx_server.request_id"

    def __init__(self, app: falcon.App[falcon.Request, falcon.Response]) -> None:
        self._app = app

    def __call__(self, environ: dict[str, Any], start_response: _StartResponse) -> Iterable[bytes]:
        start = time.monotonic()
        status = "-"

        def remember_status(line: str, headers: list[tuple[str, str]]) -> Callable[[bytes], None]:
            nonlocal status
            status = line.partition(" ")[0]
            return start_response(line, headers)

        def write_line() -> None:
            log.info(
                "%s %s %s %s %.0f ms",
                environ.get(self.ID_KEY, "-"),
                environ["REQUEST_METHOD"],
                quote(environ.get("PATH_INFO", "")[:200], encoding="latin-1"),
                status,
                1e3 * (time.monotonic() - start),
            )

        return _Body(self._app(environ, remember_status), write_line)


class _Body:
    """An answer's body that calls `on_close` when the server is done with it."""

    def __init__(self, body: Iterable[bytes], on_close: Callable[[], None]) -> None:
        self._body = body
        self._on_close = on_close

    def __iter__(self) -> Iterator[bytes]:
        return iter(self._body)

    def close(self) -> None:
        close = getattr(self._body, "close", None)
        if close is not None:
            close()
        self._on_close()


def _hash(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()
