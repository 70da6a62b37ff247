"""Who may come in, and where a form came from: one way for the dashboard and for --metrics-port. No web framework."""

from __future__ import annotations

import base64
import binascii
import functools
import hashlib
import hmac
import re
import secrets
from dataclasses import dataclass, field

# What a browser sends: one origin, whole; no user, no path, not "null".
ORIGIN = re.compile(r"https?://((?:\[[0-9A-Fa-f:.]+\]|[^\s/?#@\\,\[\]:]+)(?::[0-9]+)?)")
REFERER = re.compile(rf"{ORIGIN.pattern}(?:[/?#].*)?")
ROUNDS = 100_000  # some 40 ms, once: whoever may look sees the forms' token, and mustn't find the password by trying


@dataclass(frozen=True)
class Access:
    """Who may do what.

    Args:
        password: for Basic auth, with any user name; None: nobody gets in that way.
        token: for programs, as a bearer token; None likewise.
        read_only: nobody may change anything.
    """

    password: str | None = field(default=None, repr=False)
    token: str | None = field(default=None, repr=False)
    read_only: bool = False

    @property
    def is_guarded(self) -> bool:
        """Whether there is anything to know."""
        return bool(self.password or self.token)

    def admits(self, header: str | None) -> bool:
        """Whether a request with this Authorization header, as WSGI gives it, may come in; compared in constant time.

        Whatever can't be read opens nothing.
        """
        kind, given = _read(header)
        if kind == "basic":
            return _same(given.partition(b":")[2], self.password)
        return kind == "bearer" and _same(given, self.token)

    def form_token(self) -> str:
        """What our forms carry, and no other site can know.

        The same for all processes that have the same password, so that one may take the form that another has shown.
        """
        secret = self.password or self.token
        return _derived(_bytes(secret)) if secret else secrets.token_urlsafe(32)


def user_of(header: str | None) -> str | None:
    """The user name of a Basic login, for a log; None: there is none."""
    kind, given = _read(header)
    if kind != "basic":
        return None
    name = given.partition(b":")[0].decode(errors="replace")
    return "".join(one if one.isprintable() else "?" for one in name)


def sender_of(origin: str | None, referer: str | None) -> str | None:
    """The host, with its port, from which a browser says that a form was sent; None: it can't be told for sure."""
    found = REFERER.fullmatch(referer or "") if origin is None else ORIGIN.fullmatch(origin)
    return found[1].lower() if found else None


def _read(header: str | None) -> tuple[str, bytes]:
    kind, _, given = (header or "").strip().partition(" ")
    try:
        told = given.strip().encode("latin-1")  # as WSGI has read it
        return kind.lower(), base64.b64decode(told, validate=True) if kind.lower() == "basic" else told
    except (binascii.Error, ValueError):
        return "", b""


def _same(given: bytes, secret: str | None) -> bool:
    return bool(secret) and hmac.compare_digest(given, _bytes(secret or ""))


def _bytes(secret: str) -> bytes:
    return secret.encode(errors="surrogateescape")  # as the environment had it


@functools.cache
def _derived(secret: bytes) -> str:
    return hashlib.pbkdf2_hmac("sha256", secret, b"nih-sched: a form of the dashboard", ROUNDS).hex()
