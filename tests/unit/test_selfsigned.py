"""The key and certificate of a run: with them two workers trust each other, and nobody else."""

from __future__ import annotations

import ssl
from pathlib import Path

import pytest

from mend.selfsigned import self_signed


def contexts(pem: str, folder: Path, trusted: str) -> tuple[ssl.SSLContext, ssl.SSLContext]:
    """A server and a client that show the first and trust the second, as a saver does."""
    file = folder / "tls.pem"
    file.write_text(pem)
    certificate = trusted[trusted.index("-----BEGIN CERTIFICATE-----") :]
    made = []
    for side in (ssl.PROTOCOL_TLS_SERVER, ssl.PROTOCOL_TLS_CLIENT):
        context = ssl.SSLContext(side)
        context.check_hostname = False
        context.verify_mode = ssl.CERT_REQUIRED
        context.load_verify_locations(cadata=certificate)
        context.load_cert_chain(file)
        made.append(context)
    return made[0], made[1]


def shake_hands(server: ssl.SSLContext, client: ssl.SSLContext) -> None:
    """A handshake in memory, both ways of trust; raises `SSLError` where either refuses the other."""
    to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
    ends = [server.wrap_bio(to_server, to_client, server_side=True), client.wrap_bio(to_client, to_server)]
    for _ in range(8):
        for end in ends:
            try:
                end.do_handshake()
            except ssl.SSLWantReadError:
                continue


@pytest.mark.parametrize("name", ["mend run 1b4e28ba-2fa1-11d2-883f-0016d3cca427", "x" * 200])
def test_both_ends_of_a_run_trust_each_other(tmp_path: Path, name: str) -> None:
    """The same certificate serves and asks; a name of any length is cut to what X.509 allows."""
    pem = self_signed(name)
    assert pem.startswith("-----BEGIN PRIVATE KEY-----")
    shake_hands(*contexts(pem, tmp_path, pem))


def test_the_certificate_of_another_run_is_refused(tmp_path: Path) -> None:
    """Each run has a key of its own, also if it has the name of another."""
    mine, other = self_signed("mend run"), self_signed("mend run")
    server, _ = contexts(other, tmp_path, mine)
    _, client = contexts(mine, tmp_path, mine)
    with pytest.raises(ssl.SSLError, match="CERTIFICATE_VERIFY_FAILED"):
        shake_hands(server, client)
