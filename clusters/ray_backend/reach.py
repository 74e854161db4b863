"""Checks whether a Ray can be reached and accepts our token, before joining it: Ray itself would try for 20 s and longer.

Three checks, each with a time limit: the port answers (TCP), the server speaks Ray's protocol (a gRPC server sends its HTTP/2
SETTINGS immediately), and our token is accepted (one call of Ray's own client, which fails immediately instead of after twenty
tries).
"""

import contextlib
import os
import socket
import tempfile
from collections.abc import Iterator

from ray._private import services
from ray._raylet import GcsClient  # type: ignore[attr-defined]  # the stub lists a part of the module
from ray.exceptions import AuthenticationError, RpcError

TIMEOUT_S = 5.0
_PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes(
    [0, 0, 0, 4, 0, 0, 0, 0, 0]
)  # RFC 9113, 3.4: preface, empty SETTINGS
_SETTINGS_FRAME = 4


def parse_address(address: str) -> tuple[str, int, bool]:
    """Host, port, and whether it is the address of a client server. Raises ``ValueError`` for a malformed address."""
    client = address.startswith("ray://")
    host, colon, port = address.removeprefix("ray://").rpartition(":")
    if not host or not colon or not port.isdecimal() or not 0 < int(port) < 65536:
        raise ValueError(f"ray.address is {address!r}; it must be auto, host:port or ray://host:port")
    return host.strip("[]"), int(port), client


def resolve_auto() -> str:
    """The address that "auto" stands for: RAY_ADDRESS, or that of the one Ray that runs on this machine."""
    try:
        return str(services.canonicalize_bootstrap_address_or_die("auto"))
    except ConnectionError as error:
        raise ValueError(
            "ray.address is 'auto', but RAY_ADDRESS is not set and this machine does not run exactly one Ray; give host:port"
        ) from error


def check_reachable(shown: str, host: str, port: int) -> None:
    """Raise ``ValueError`` unless a server that may be a Ray answers. ``shown``: the address, for errors."""
    try:
        with socket.create_connection((host, port), timeout=TIMEOUT_S) as connection:
            if os.environ.get("RAY_USE_TLS", "0").lower() in ("1", "true"):
                return  # nothing more can be checked without the TLS handshake
            connection.sendall(_PREFACE)
            answer = connection.recv(9)
    except TimeoutError as error:
        raise ValueError(f"ray.address is {shown}, which did not answer within {TIMEOUT_S:g} s") from error
    except OSError as error:
        reason = error.strerror or str(error)
        raise ValueError(f"ray.address is {shown}, which cannot be reached: {reason.lower()}") from error
    if len(answer) < 9 or answer[3] != _SETTINGS_FRAME:
        raise ValueError(
            f"ray.address is {shown}, where something answers that is not Ray; it must be the port of a Ray head"
        )


def bound_to_loopback(host: str, port: int) -> bool:
    """Whether a server at a loopback ``host`` is bound to loopback only: Ray would connect to the machine's own address."""
    if host not in ("localhost", "127.0.0.1", "::1"):
        return False
    with socket.socket() as probe:
        probe.settimeout(TIMEOUT_S)
        return probe.connect_ex((services.get_node_ip_address(), port)) != 0


def check_token(shown: str, target: str) -> None:
    """Raise ``ValueError`` when the Ray at ``target`` (host:port) refuses the token of the environment, or the lack of one."""
    try:
        with muted_stderr():
            GcsClient(address=target)
    except AuthenticationError as error:
        token = "our token" if os.environ.get("RAY_AUTH_MODE") == "token" else "us without a token"
        raise ValueError(
            f"ray.address is {shown}, which refuses {token}; "
            "set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN (or RAY_AUTH_TOKEN_PATH) to that cluster's"
        ) from error
    except RpcError as error:
        raise ValueError(
            f"ray.address is {shown}, where no Ray head answers; it must be the port of a Ray head"
        ) from error


@contextlib.contextmanager
def muted_stderr() -> Iterator[None]:
    """Suppress what C++ code writes to file descriptor 2; errors are reported by Python's exceptions."""
    with tempfile.TemporaryFile() as sink:
        saved = os.dup(2)
        os.dup2(sink.fileno(), 2)
        try:
            yield
        finally:
            os.dup2(saved, 2)
            os.close(saved)
