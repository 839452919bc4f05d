"""How a store is reached: a private authority, and credentials from arguments, environment or web identity."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs

import pytest

from mend.environment import ENV_STORE_AUTHORITY
from mend.prefixes import _open
from mend.spec import Checkpointing
from mend.store import BadCredentials, Credentials, open_store
from mend_local.certificates import Credentials as Certificates
from mend_local.certificates import credentials as certificates
from s3 import KEY_ID, SECRET, FaultyProxy, S3Server, rclone

TOKEN = "the-token-of-a-service-account"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    """It checks signatures."""
    with rclone(tmp_path_factory.mktemp("rclone")) as running:
        yield running


@pytest.fixture
def private(tmp_path: Path) -> Certificates:
    """An authority of our own and a server's certificate by it."""
    return certificates(tmp_path)


@pytest.fixture
def tls(server: S3Server, private: Certificates) -> Iterator[S3Server]:
    """The same server behind https, with a certificate of the private authority."""
    with FaultyProxy(server, private.server_context()) as proxy:
        yield proxy.server


def test_the_controller_takes_the_authority_from_the_secret(tls: S3Server, private: Certificates) -> None:
    """`ca.crt` beside the keys in the run's Secret is what the controller checks the service against."""
    secret = {
        "AWS_ACCESS_KEY_ID": KEY_ID,
        "AWS_SECRET_ACCESS_KEY": SECRET,
        "ca.crt": private.ca_pem.decode(),
    }
    catalog = _open(Checkpointing(uri=tls.uri("secret"), endpoint=tls.endpoint), secret, None)
    assert catalog.checkpoints() == ()


def test_a_rank_takes_the_authority_from_its_environment(
    tls: S3Server, private: Certificates, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same `ca.crt` reaches a rank as text in its environment."""
    monkeypatch.setenv(ENV_STORE_AUTHORITY, private.ca_pem.decode())
    store = open_store(tls.uri("environment"), tls.endpoint, tls.credentials)
    store.put("x", b"over tls")
    assert store.get("x") == b"over tls"


def test_a_bundle_is_taken_from_where_aws_tools_look(
    tls: S3Server, private: Certificates, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """AWS_CA_BUNDLE names a file with the authority's certificates."""
    (tmp_path / "bundle.pem").write_bytes(private.ca_pem)
    monkeypatch.setenv("AWS_CA_BUNDLE", str(tmp_path / "bundle.pem"))
    store = open_store(tls.uri("bundle"), tls.endpoint, tls.credentials)
    store.put("x", b"over tls")
    assert store.get("x") == b"over tls"


class _TokenService(BaseHTTPRequestHandler):
    """Gives the server's keys to whoever shows the token."""

    def do_POST(self) -> None:
        asked = parse_qs(self.rfile.read(int(self.headers["Content-Length"])).decode())
        if asked["Action"] != ["AssumeRoleWithWebIdentity"] or asked["WebIdentityToken"] != [TOKEN]:
            self._answer(403, "<ErrorResponse><Error><Code>AccessDenied</Code></Error></ErrorResponse>")
            return
        self._answer(
            200,
            "<AssumeRoleWithWebIdentityResponse xmlns='https://sts.amazonaws.com/doc/2011-06-15/'>"
            "<AssumeRoleWithWebIdentityResult><Credentials>"
            f"<AccessKeyId>{KEY_ID}</AccessKeyId><SecretAccessKey>{SECRET}</SecretAccessKey>"
            "<SessionToken>session</SessionToken><Expiration>2999-01-01T00:00:00Z</Expiration>"
            "</Credentials></AssumeRoleWithWebIdentityResult></AssumeRoleWithWebIdentityResponse>",
        )

    def _answer(self, status: int, text: str) -> None:
        self.send_response(status)
        self.send_header("Content-Type", "text/xml")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text.encode())

    def log_message(self, format: str, *args: object) -> None:
        """Quiet."""


@pytest.fixture
def token_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The environment of a pod whose service account stands for a role."""
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    with ThreadingHTTPServer(("127.0.0.1", 0), _TokenService) as service:
        threading.Thread(target=service.serve_forever, args=(0.05,), daemon=True).start()
        monkeypatch.setenv("AWS_ENDPOINT_URL_STS", f"http://127.0.0.1:{service.server_address[1]}")
        monkeypatch.setenv("AWS_ROLE_ARN", "arn:aws:iam::123456789012:role/clio")
        monkeypatch.setenv("AWS_WEB_IDENTITY_TOKEN_FILE", str(tmp_path / "token"))
        yield tmp_path / "token"
        service.shutdown()


def test_credentials_come_by_web_identity(server: S3Server, token_file: Path) -> None:
    """A pod's service account is exchanged for keys, as on EKS, and with them the store is used."""
    token_file.write_text(TOKEN)
    store = open_store(server.uri("identity"), server.endpoint, Credentials(region="us-east-1"))
    store.put("x", b"1")
    assert store.get("x") == b"1"


def test_an_identity_that_is_refused_is_told(server: S3Server, token_file: Path) -> None:
    """When the token is not taken, the error is one of credentials and names the role's variables."""
    token_file.write_text("another token")
    with pytest.raises(BadCredentials, match="AWS_ROLE_ARN"):
        open_store(server.uri("identity"), server.endpoint, deadline_seconds=2.0).probe()


def test_a_token_file_that_is_missing_is_told(server: S3Server, token_file: Path) -> None:
    """When the token is not mounted, the error names the variables too."""
    with pytest.raises(BadCredentials, match="AWS_WEB_IDENTITY_TOKEN_FILE"):
        open_store(server.uri("identity"), server.endpoint, deadline_seconds=2.0).probe()
