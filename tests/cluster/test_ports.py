"""Ports and addresses of this machine."""

import socket
from pathlib import Path

import pytest

from flowprefill_sglang.cluster import ports
from flowprefill_sglang.cluster.ports import free_ports, local_url, require_free
from flowprefill_sglang.errors import StartupError


def test_free_ports_differ_and_can_be_listened_on() -> None:
    found = free_ports(20)
    assert len(set(found)) == 20
    for port in found:
        require_free("127.0.0.1", port)


def test_free_ports_are_out_of_the_way_of_outgoing_connections(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    setting = tmp_path / "ip_local_port_range"
    monkeypatch.setattr(ports, "_EPHEMERAL_RANGE", setting)
    setting.write_text("20000\t60999\n")
    assert all(10_000 <= port < 20_000 for port in free_ports(50))
    setting.write_text("1024\t65535\n")  # nothing is left: any will do
    assert all(10_000 <= port < 30_000 for port in free_ports(50))
    setting.unlink()
    assert all(10_000 <= port < 30_000 for port in free_ports(50))


@pytest.mark.parametrize("address", ["127.0.0.1", "127.0.0.2", "0.0.0.0"])
def test_a_listening_port_is_not_free_on_whatever_address(monkeypatch: pytest.MonkeyPatch, address: str) -> None:
    (port,) = free_ports(1)
    with socket.socket() as taken:
        taken.bind((address, port))
        taken.listen()
        monkeypatch.setattr(ports, "_CANDIDATES", range(port, port + 1))
        with pytest.raises(StartupError, match="1 free ports are needed"):
            free_ports(1)


def test_a_taken_port() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(StartupError, match=f"cannot listen on 127.0.0.1:{port}: .*choose another --port"):
            require_free("127.0.0.1", port)


def test_an_address_that_is_not_this_machines() -> None:
    words = r"cannot listen on 192\.0\.2\.1:0: .*; choose an address of this machine for --host"
    with pytest.raises(StartupError, match=words):  # RFC 5737: nobody's
        require_free("192.0.2.1", 0)
    with pytest.raises(StartupError, match=r"no such address: --host no-such-host\.invalid"):
        require_free("no-such-host.invalid", 0)


@pytest.mark.parametrize(
    ("host", "url"),
    [
        ("0.0.0.0", "http://127.0.0.1:1"),
        ("10.0.0.1", "http://10.0.0.1:1"),
        ("localhost", "http://localhost:1"),
        ("::", "http://[::1]:1"),
        ("fd00::1", "http://[fd00::1]:1"),
    ],
)
def test_local_url(host: str, url: str) -> None:
    assert local_url(host, 1) == url
