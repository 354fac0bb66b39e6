"""Who may talk to the labelling page: hosts, origins, the token, sessions and what they may load.

A browser keeps two kinds of strangers out of a page on this machine only if the server helps: pages
of other sites that send requests here (Origin, a cookie that is SameSite=Strict, and a header that
such a page cannot know), and sites whose name suddenly means this machine (Host).
"""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
import os
import secrets
import socket
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from alignjax.core.errors import UserError

MIN_TOKEN_LEN = 16

HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; "
    "img-src 'self'; connect-src 'self'; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-store",
}
"""Of every answer."""


@dataclass(frozen=True)
class Access:
    """The rules of one server.

    Attributes:
      key: secret; the same after a restart, so that open pages go on working.
      token: what somebody has to know to get in; None lets in everybody who reaches the server.
      hosts: the names, lower case, by which it may be called.
      any_address: whether it may be called by any IP address. (No site can take one as its name.)
    """

    key: bytes
    token: str | None
    hosts: frozenset[str]
    any_address: bool

    def is_token(self, given: str) -> bool:
        return self.token is None or hmac.compare_digest(given.encode(), self.token.encode())

    def new_session(self) -> str:
        """The value of a cookie; nothing is kept here, it proves itself."""
        nonce = secrets.token_urlsafe(16)
        return f"{nonce}.{self._sign('session', nonce)}"

    def is_session(self, value: str) -> bool:
        nonce, _, signature = value.partition(".")
        return hmac.compare_digest(signature.encode(), self._sign("session", nonce).encode())

    @property
    def identity(self) -> str:
        """Tells the servers apart that follow each other at one address. No secret."""
        return self._sign("identity", "")[:16]

    def csrf(self, session: str) -> str:
        """What requests of this session that change something have to bring in a header."""
        return self._sign("csrf", session)

    def is_csrf(self, session: str, given: str) -> bool:
        return hmac.compare_digest(given.encode(), self.csrf(session).encode())

    def is_host(self, header: str) -> bool:
        """Whether the Host of a request means this server; the port may be that of a tunnel."""
        try:
            name = (urlsplit(f"//{header}").hostname or "").rstrip(".")
        except ValueError:
            return False
        return name in self.hosts or (self.any_address and _address(name) is not None)

    def _sign(self, purpose: str, text: str) -> str:
        message = "\0".join((purpose, text, self.token or "")).encode()
        return hmac.new(self.key, message, hashlib.sha256).hexdigest()


def make_access(
    host: str, *, key: bytes, token: str | None = None, names: Iterable[str] = ()
) -> Access:
    """The rules for a server that listens on `host`.

    Args:
      host: address or name; anything but this machine itself requires a token.
      key: of `load_key`.
      token: to be required. None: of a server on this machine none, else one that follows from the
        key.
      names: further names by which it may be called.
    Raises:
      UserError: if the token is too short to be kept secret.
    """
    if token is not None and len(token) < MIN_TOKEN_LEN:
        raise UserError(f"--token: has {len(token)} characters; expected {MIN_TOKEN_LEN} or more")
    hosts = {host.lower(), *(name.lower() for name in names), "localhost", "127.0.0.1", "::1"}
    is_local = is_loopback(host)
    if not is_local:
        hosts |= {socket.gethostname().lower(), socket.getfqdn().lower()}
        token = token or hmac.new(key, b"token", hashlib.sha256).hexdigest()[:32]
    return Access(key, token, frozenset(hosts), any_address=not is_local)


def is_loopback(host: str) -> bool:
    address = _address(host)
    return host.lower() == "localhost" if address is None else address.is_loopback


def load_key(path: Path) -> bytes:
    """The secret of a store, made if there is none; a file that only its owner reads."""
    try:
        with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
            file.write(secrets.token_bytes(32))
    except FileExistsError:
        pass
    except OSError as error:
        raise UserError(f"{path}: cannot be written: {error.strerror}") from error
    key = path.read_bytes()
    if len(key) != 32:
        raise UserError(f"{path}: expected 32 bytes, came {len(key)}; delete it, to make another")
    return key


def _address(name: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    try:
        return ipaddress.ip_address(name)
    except ValueError:
        return None
