"""How workers of one run know each other: the same key and certificate on both ends, pinned, and a token for snapshots.

Pods come and go, so no host name is checked, and neither is the time: their clocks may be wrong, and a certificate that
is made for one run ends with it. What a peer presents must be this very certificate, whoever else the key has signed.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import ssl
from dataclasses import dataclass, field
from typing import Final

_NO_CHECK_TIME: Final = 0x200000  # X509_V_FLAG_NO_CHECK_TIME; the ssl module has no name for it
_END: Final = "-----END CERTIFICATE-----"
_BEGIN: Final = "-----BEGIN CERTIFICATE-----"


class BadCertificate(ValueError):
    """The run's key and certificate cannot be used, and why."""


class WrongPeer(ConnectionError):
    """The other end is not of this run."""


@dataclass(frozen=True, slots=True)
class RunTls:
    """The run's certificate as both ends use it."""

    serving: ssl.SSLContext
    asking: ssl.SSLContext
    certificate: bytes = field(repr=False)  # DER

    def check(self, connection: ssl.SSLSocket) -> None:
        """After the handshake: raises `WrongPeer` unless the other end has shown the run's own certificate."""
        if not hmac.compare_digest(connection.getpeercert(binary_form=True) or b"", self.certificate):
            raise WrongPeer("the other end shows another certificate than the run's own")


def read_run_tls(pem: str) -> RunTls:
    """From the text of a private key and its certificate, as the pod has it in MEND_TLS_PEM."""
    start, end = pem.find(_BEGIN), pem.find(_END)
    if start < 0 or end < 0:
        raise BadCertificate("MEND_TLS_PEM: no certificate in it; expected a private key and a certificate in PEM")
    certificate = pem[start : end + len(_END)]
    try:
        return RunTls(
            serving=_context(ssl.PROTOCOL_TLS_SERVER, pem, certificate),
            asking=_context(ssl.PROTOCOL_TLS_CLIENT, pem, certificate),
            certificate=ssl.PEM_cert_to_DER_cert(certificate),
        )
    except (ssl.SSLError, ValueError) as error:
        raise BadCertificate(
            f"MEND_TLS_PEM: {error}; expected a private key and the certificate that belongs to it, in PEM"
        ) from error


def snapshot_token(token: str) -> str:
    """What opens snapshots, and only those: ranks may have it, while the run's token would let them give orders."""
    return hmac.new(token.encode(), b"mend snapshots", hashlib.sha256).hexdigest()


def _context(side: int, pem: str, certificate: str) -> ssl.SSLContext:
    context = ssl.SSLContext(side)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.check_hostname = False
    context.verify_mode = ssl.CERT_REQUIRED
    context.verify_flags |= _NO_CHECK_TIME
    context.load_verify_locations(cadata=certificate)
    # The module reads keys from files only; this one is on no disk and has no name.
    descriptor = os.memfd_create("mend-tls", os.MFD_CLOEXEC)
    try:
        os.write(descriptor, pem.encode())
        context.load_cert_chain(f"/proc/self/fd/{descriptor}")
    finally:
        os.close(descriptor)
    if side == ssl.PROTOCOL_TLS_SERVER:
        context.num_tickets = 0  # nobody resumes; and a ticket to one who hung up early would be an error
    return context
