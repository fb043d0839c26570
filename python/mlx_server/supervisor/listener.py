"""The listening socket. The supervisor binds it before anything slow, the API process takes connections from it."""

import asyncio
import errno
import ipaddress
import socket

from mlx_server.errors import ServerError, SettingError

_BACKLOG = 2048


class StartError(ServerError):
    """The server can't start, though its settings are right (exit code 1)."""


def bind(host: str, port: int) -> socket.socket:
    """A socket that listens, so that a second server on the port fails at once.

    Raises:
        StartError: the port is taken.
        SettingError: host or port can't be bound by this user on this machine.
    """
    try:
        addresses = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        family, _, _, _, address = min(addresses, key=lambda found: found[0] != socket.AF_INET)
        dual_stack = host == "::" and socket.has_dualstack_ipv6()
        return socket.create_server(address, family=family, backlog=_BACKLOG, dualstack_ipv6=dual_stack)
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise StartError(
                f"port {port} is in use on {host}: stop the other program or choose a port with --port"
            ) from None
        if error.errno == errno.EACCES:
            raise SettingError(
                f"port {port} needs administrator rights; choose one from 1024 to 65535 with --port"
            ) from None
        if error.errno == errno.EADDRNOTAVAIL:
            raise SettingError(f"host {host!r} is not an address of this machine; choose one with --host") from None
        raise StartError(f"can't listen on {host!r}, port {port}: {error.strerror}") from None


def is_loopback(listener: socket.socket) -> bool:
    """Whether only this machine can connect."""
    return ipaddress.ip_address(listener.getsockname()[0].partition("%")[0]).is_loopback


def client_address(listener: socket.socket) -> tuple[str, int]:
    """Host and port under which a client on this machine reaches the listener."""
    host, port = listener.getsockname()[:2]
    if ipaddress.ip_address(host.partition("%")[0]).is_unspecified:
        host = "127.0.0.1" if listener.family == socket.AF_INET else "::1"
    return host, port


def client_url(listener: socket.socket) -> str:
    host, port = client_address(listener)
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


async def answers(listener: socket.socket, *, timeout_s: float = 5.0) -> bool:
    """Whether GET /health on the server gives a 200."""
    try:
        return await asyncio.wait_for(_get_health(*client_address(listener)), timeout_s)
    except (OSError, asyncio.TimeoutError):
        return False


async def _get_health(host: str, port: int) -> bool:
    reader, writer = await asyncio.open_connection(host, port)
    try:
        writer.write(b"GET /health HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
        status_line = await reader.readline()
        return status_line.split()[1:2] == [b"200"]
    finally:
        writer.close()
