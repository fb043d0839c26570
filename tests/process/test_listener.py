"""The listening socket."""

import socket
from typing import cast

import pytest

from mlx_server.errors import SettingError
from mlx_server.supervisor.listener import StartError, bind, client_url, is_loopback


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost"])
def test_a_loopback_listener(host):
    with bind(host, 0) as listener:
        assert is_loopback(listener)
        assert client_url(listener) == f"http://127.0.0.1:{listener.getsockname()[1]}"
        socket.create_connection(("127.0.0.1", listener.getsockname()[1])).close()


def test_a_listener_on_every_interface_is_reached_on_loopback():
    with bind("0.0.0.0", 0) as listener:
        assert not is_loopback(listener)
        assert client_url(listener) == f"http://127.0.0.1:{listener.getsockname()[1]}"


class Listener6:
    family = socket.AF_INET6

    def __init__(self, host: str) -> None:
        self.host = host

    def getsockname(self) -> tuple[str, int, int, int]:
        return self.host, 8000, 0, 0


@pytest.mark.parametrize(("host", "url", "loopback"), [("::", "[::1]", False), ("::1", "[::1]", True)])
def test_ipv6_addresses_are_in_brackets(host, url, loopback):
    listener = cast("socket.socket", Listener6(host))
    assert client_url(listener) == f"http://{url}:8000"
    assert is_loopback(listener) == loopback


def test_a_port_in_use():
    with bind("127.0.0.1", 0) as first:
        port = first.getsockname()[1]
        for host in ("127.0.0.1", "0.0.0.0"):
            with pytest.raises(StartError, match=f"^port {port} is in use on {host}: "):
                bind(host, port)


def test_an_address_of_another_machine():
    with pytest.raises(SettingError, match=r"^host '192\.0\.2\.1' is not an address of this machine"):
        bind("192.0.2.1", 0)
