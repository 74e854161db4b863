import os
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import pytest
from fedbonsai.clusters.ray_backend import reach
from fedbonsai.clusters.ray_backend.reach import bound_to_loopback, check_reachable, muted_stderr, parse_address


@contextmanager
def server(answer: bytes | None) -> Iterator[int]:
    """A TCP server on loopback that takes one connection and answers with ``answer`` (None: never); yields its port."""
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve() -> None:
            connection, _ = listener.accept()
            with connection:
                connection.recv(1024)
                if answer is not None:
                    connection.sendall(answer)
                with suppress(ConnectionResetError):  # it may leave without reading all of the answer
                    connection.recv(1024)

        thread = threading.Thread(target=serve)
        thread.start()
        yield listener.getsockname()[1]
        thread.join()


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


@pytest.mark.parametrize(
    ("address", "parts"),
    [
        ("10.0.0.1:6379", ("10.0.0.1", 6379, False)),
        ("head.example:6379", ("head.example", 6379, False)),
        ("[::1]:6379", ("::1", 6379, False)),
        ("ray://head:10001", ("head", 10001, True)),
    ],
)
def test_addresses(address: str, parts: tuple[str, int, bool]) -> None:
    assert parse_address(address) == parts


@pytest.mark.parametrize("address", ["", "head", "head:", ":6379", "head:port", "head:0", "head:65536", "ray://"])
def test_malformed_addresses(address: str) -> None:
    with pytest.raises(ValueError, match=r"it must be auto, host:port or ray://host:port$") as caught:
        parse_address(address)
    assert repr(address) in str(caught.value)


def test_nothing_listens() -> None:
    port = free_port()
    with pytest.raises(
        ValueError, match=rf"^ray.address is '127.0.0.1:{port}', which cannot be reached: connection refused$"
    ):
        check_reachable(f"'127.0.0.1:{port}'", "127.0.0.1", port)


def test_a_name_that_does_not_exist() -> None:
    with pytest.raises(ValueError, match=r"^ray.address is 'no-such-host.invalid:1', which cannot be reached: "):
        check_reachable("'no-such-host.invalid:1'", "no-such-host.invalid", 1)


def test_a_server_that_does_not_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reach, "TIMEOUT_S", 0.2)
    with (
        server(None) as port,
        pytest.raises(ValueError, match=r"^ray.address is 'x', which did not answer within 0.2 s$"),
    ):
        check_reachable("'x'", "127.0.0.1", port)


@pytest.mark.parametrize("answer", [b"HTTP/1.0 400 Bad Request\r\n\r\n", b"short"])
def test_a_server_that_is_not_ray(answer: bytes) -> None:
    with server(answer) as port, pytest.raises(ValueError, match=r"something answers that is not Ray"):
        check_reachable("'x'", "127.0.0.1", port)


def test_a_server_that_may_be_a_ray() -> None:
    with server(bytes([0, 0, 0, 4, 0, 0, 0, 0, 0])) as port:
        check_reachable("'x'", "127.0.0.1", port)


def test_with_tls_only_the_port_is_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_USE_TLS", "1")
    with socket.create_server(("127.0.0.1", 0)) as listener:
        check_reachable("'x'", "127.0.0.1", listener.getsockname()[1])


def test_a_port_bound_to_loopback_alone() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        assert bound_to_loopback("localhost", listener.getsockname()[1])
    with socket.create_server(("0.0.0.0", 0)) as listener:
        assert not bound_to_loopback("127.0.0.1", listener.getsockname()[1])
    assert not bound_to_loopback("10.0.0.1", 6379)


def test_stderr_is_back_afterwards(capfd: pytest.CaptureFixture[str]) -> None:
    with muted_stderr():
        os.write(2, b"hidden")
    os.write(2, b"shown")
    assert capfd.readouterr().err == "shown"
