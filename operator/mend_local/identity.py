"""Who asks: the admin's token, and signed tokens for service accounts."""

from __future__ import annotations

import base64
import hmac
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

Object = dict[str, Any]

ADMINS = "system:masters"
EVERYONE = "system:authenticated"


@dataclass(frozen=True, slots=True)
class Identity:
    """A user as RBAC knows it."""

    user: str
    groups: tuple[str, ...]
    uid: str = ""

    @property
    def is_admin(self) -> bool:
        """May do everything, whatever the bindings say."""
        return ADMINS in self.groups


ADMIN = Identity("kubernetes-admin", (ADMINS, EVERYONE))


class Tokens:
    """Issues and checks tokens. Those of service accounts are signed, not stored, so they survive a restart."""

    def __init__(self, admin_token: str, account: Callable[[str, str], Object | None]) -> None:
        """`account` looks up a ServiceAccount by namespace and name."""
        self._admin = admin_token
        self._key = hmac.digest(admin_token.encode(), b"service account tokens", "sha256")
        self._account = account

    def issue(self, account: Object, seconds: int) -> tuple[str, float]:
        """A token for a service account, and when it expires (seconds since the epoch)."""
        metadata = account["metadata"]
        expires = time.time() + seconds
        claims = {
            "iss": "mend-local",
            "sub": f"system:serviceaccount:{metadata['namespace']}:{metadata['name']}",
            "uid": metadata["uid"],
            "exp": expires,
        }
        signed = ".".join(_encode(json.dumps(part).encode()) for part in ({"alg": "HS256", "typ": "JWT"}, claims))
        return f"{signed}.{self._signature(signed)}", expires

    def identify(self, authorization: str) -> Identity | None:
        """Whose token an Authorization header carries; None if nobody's."""
        scheme, _, token = authorization.partition(" ")
        if scheme.lower() != "bearer":
            return None
        if hmac.compare_digest(token.encode(), self._admin.encode()):
            return ADMIN
        signed, _, signature = token.rpartition(".")
        if not signed or not hmac.compare_digest(signature.encode(), self._signature(signed).encode()):
            return None
        claims = json.loads(_decode(signed.partition(".")[2]))
        _, _, namespace, name = claims["sub"].split(":")
        account = self._account(namespace, name)
        if account is None or account["metadata"]["uid"] != claims["uid"] or claims["exp"] < time.time():
            return None
        groups = ("system:serviceaccounts", f"system:serviceaccounts:{namespace}", EVERYONE)
        return Identity(claims["sub"], groups, claims["uid"])

    def _signature(self, signed: str) -> str:
        return _encode(hmac.digest(self._key, signed.encode(), "sha256"))


def _encode(raw: bytes) -> str:
    return base64.urlsafe_b64encode(raw).rstrip(b"=").decode()


def _decode(text: str) -> bytes:
    return base64.urlsafe_b64decode(text + "=" * (-len(text) % 4))
