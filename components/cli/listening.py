"""Where a server of ours listens, and the token that its callers need where other machines can reach it."""

import ipaddress
import os
import secrets
import socket

from univigu.errors import BadInputError, ConfigError

SHORTEST_TOKEN = 16  # characters of a token that a user chooses
LOCAL_NAMES = ("localhost",)


def is_loopback(host: str) -> bool:
    """Whether an address is this machine's own, which no other machine can reach."""
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host in LOCAL_NAMES


def choose_token(host: str, variable: str) -> str:
    """The token that requests need; "" for none.

    It is the value of the environment's `variable`, or a new one where other machines can reach the server. Raises
    `ConfigError` if the value is too short to keep anyone out.
    """
    given = os.environ.get(variable, "")
    if given and len(given) < SHORTEST_TOKEN:
        raise ConfigError(f"{variable} has {len(given)} characters; give at least {SHORTEST_TOKEN}, or leave it unset.")
    return given or ("" if is_loopback(host) else secrets.token_urlsafe(24))


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens; raises `BadInputError` if the address is taken, or isn't one of this machine."""
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        return socket.create_server(address[:2], family=family)
    except OSError as error:
        raise BadInputError(
            f"Nothing can listen on {host}, port {port} ({error.strerror or error}); give another --port, or an "
            "address of this machine."
        ) from error


def address_of(host: str, port: int) -> str:
    """The address of a server on `host`, such as ``http://127.0.0.1:7860``."""
    return f"http://{f'[{host}]' if ':' in host else host}:{port}"
