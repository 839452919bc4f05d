"""TLS for a server on loopback: a CA and a server certificate of our own, and the kubeconfig that trusts them."""

from __future__ import annotations

import base64
import ipaddress
import os
import secrets
import ssl
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

import yaml
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

_NAMES = ("localhost", "kubernetes", "kubernetes.default", "kubernetes.default.svc")
_VALID = timedelta(days=3650)


@dataclass(frozen=True, slots=True)
class Credentials:
    """What a server of one state directory identifies itself and its admin with."""

    ca_pem: bytes
    server_file: Path  # certificate and key
    admin_token: str

    def server_context(self) -> ssl.SSLContext:
        """The TLS settings of the server."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(self.server_file)
        return context

    def client_context(self) -> ssl.SSLContext:
        """TLS settings of a client that trusts this server and no other."""
        return ssl.create_default_context(cadata=self.ca_pem.decode())


def credentials(state_dir: Path, host: str = "127.0.0.1") -> Credentials:
    """The credentials kept in `state_dir`, made on the first call, so that kubeconfigs outlive a restart."""
    ca_file, server_file, token_file = (state_dir / name for name in ("ca.crt", "server.pem", "admin.token"))
    if not (ca_file.exists() and server_file.exists() and token_file.exists()):
        state_dir.mkdir(parents=True, exist_ok=True)
        ca_pem, server_pem = _make_pair(host)
        _write_private(server_file, server_pem)
        _write_private(token_file, secrets.token_urlsafe(32).encode())
        ca_file.write_bytes(ca_pem)
    return Credentials(ca_file.read_bytes(), server_file, token_file.read_text())


def write_kubeconfig(path: Path, *, server: str, ca_pem: bytes, token: str, name: str = "mend-local") -> None:
    """Write a kubeconfig with one cluster, user and context, readable by its owner only."""
    config = {
        "apiVersion": "v1",
        "kind": "Config",
        "clusters": [
            {
                "name": name,
                "cluster": {"server": server, "certificate-authority-data": base64.b64encode(ca_pem).decode()},
            }
        ],
        "users": [{"name": name, "user": {"token": token}}],
        "contexts": [{"name": name, "context": {"cluster": name, "user": name, "namespace": "default"}}],
        "current-context": name,
        "preferences": {},
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    _write_private(path, yaml.safe_dump(config, sort_keys=False).encode())


def _write_private(path: Path, content: bytes) -> None:
    """Write a secret so that it is never readable by others, not even for a moment, nor ever half there."""
    temporary = path.with_name(path.name + ".tmp")
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(descriptor, "wb") as file:
        file.write(content)
    temporary.replace(path)


def _make_pair(host: str) -> tuple[bytes, bytes]:
    """A CA certificate, and a server's certificate with its key, both PEM. The CA's key is thrown away."""
    ca_key, server_key = ec.generate_private_key(ec.SECP256R1()), ec.generate_private_key(ec.SECP256R1())
    ca_name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "mend-local-ca")])
    now = datetime.now(UTC)
    ca = (
        _builder(ca_name, ca_name, ca_key, now)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_usage(signs_certificates=True), critical=True)
        .sign(ca_key, hashes.SHA256())
    )
    addresses = {ipaddress.ip_address("127.0.0.1"), ipaddress.ip_address("::1")}
    names = set(_NAMES)
    try:
        addresses.add(ipaddress.ip_address(host))
    except ValueError:
        names.add(host)
    alternatives = [*map(x509.DNSName, sorted(names)), *map(x509.IPAddress, sorted(addresses, key=str))]
    server = (
        _builder(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "mend-local")]), ca_name, server_key, now)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_usage(signs_certificates=False), critical=True)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .add_extension(x509.SubjectAlternativeName(alternatives), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(ca_key.public_key()), critical=False)
        .sign(ca_key, hashes.SHA256())
    )
    key_pem = server_key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    pem = serialization.Encoding.PEM
    return ca.public_bytes(pem), server.public_bytes(pem) + key_pem


def _builder(
    subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePrivateKey, now: datetime
) -> x509.CertificateBuilder:
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(days=1))
        .not_valid_after(now + _VALID)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
    )


def _usage(*, signs_certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=True,
        key_cert_sign=signs_certificates,
        crl_sign=signs_certificates,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )
