"""Logins come from the environment and go to the server, and nowhere else."""

from __future__ import annotations

import datetime
import ipaddress
import ssl
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from tests.kubeflow.commands import dpo, write_config
from tests.kubeflow.server import Server, serving

Capture = pytest.CaptureFixture[str]
Patch = pytest.MonkeyPatch


@pytest.mark.parametrize("name", ["KF_PIPELINES_TOKEN", "KUBEFLOW_TOKEN"])
def test_token(name: str, server: Server, tmp_path: Path, capsys: Capture, monkeypatch: Patch) -> None:
    """Either variable's token opens the server, whose name for it stands in no line."""
    server.state.token = "secret-token"
    monkeypatch.setenv(name, "secret-token")

    code, out, err = dpo(capsys, "submit", write_config(tmp_path, server))

    assert code == 0
    assert "secret-token" not in out + err
    assert "secret-token" not in str(server.state.runs)


def test_cookies(server: Server, tmp_path: Path, capsys: Capture, monkeypatch: Patch) -> None:
    """As a browser has them; without, the server shows its login page."""
    server.state.cookie = "authservice_session=abc"
    config = write_config(tmp_path, server)

    assert "login page" in dpo(capsys, "submit", config)[2]
    monkeypatch.setenv("KF_PIPELINES_COOKIES", "authservice_session=abc")
    assert dpo(capsys, "submit", config)[0] == 0


def test_token_of_a_service_account(server: Server, tmp_path: Path, capsys: Capture, monkeypatch: Patch) -> None:
    """The file is read for every request: the cluster renews it while a run is waited for."""
    file = tmp_path / "token"
    file.write_text("first\n")
    monkeypatch.setenv("KF_PIPELINES_SA_TOKEN_PATH", str(file))
    server.before("/apis/v2beta1/healthz", lambda: file.write_text("second\n"))

    assert dpo(capsys, "submit", write_config(tmp_path, server))[0] == 0

    tokens = [headers["authorization"] for headers in server.headers]
    assert tokens[0] == "Bearer first"
    assert set(tokens[1:]) == {"Bearer second"}


def test_missing_token_file(server: Server, tmp_path: Path, capsys: Capture, monkeypatch: Patch) -> None:
    """It is named."""
    monkeypatch.setenv("KF_PIPELINES_SA_TOKEN_PATH", str(tmp_path / "nothing"))

    code, _, err = dpo(capsys, "submit", write_config(tmp_path, server))

    assert code == 2
    assert "KF_PIPELINES_SA_TOKEN_PATH names no file" in err


def test_token_with_a_line_break_is_not_sent(
    server: Server, tmp_path: Path, capsys: Capture, monkeypatch: Patch
) -> None:
    """It would end the header, and begin another."""
    monkeypatch.setenv("KF_PIPELINES_TOKEN", "one\r\nX-Evil: two")

    code, _, err = dpo(capsys, "submit", write_config(tmp_path, server))

    assert code == 2
    assert "no HTTP header may have" in err
    assert "X-Evil" not in err
    assert server.requests == []


def test_token_does_not_follow_a_redirect(server: Server, tmp_path: Path, capsys: Capture, monkeypatch: Patch) -> None:
    """One request was made, and none where it was sent on to."""
    monkeypatch.setenv("KF_PIPELINES_TOKEN", "secret-token")
    server.fail("/healthz", "redirect")

    assert dpo(capsys, "submit", write_config(tmp_path, server))[0] == 2

    assert [request.path for request in server.requests] == ["/apis/v2beta1/healthz"]


def test_authority_of_ones_own(tmp_path: Path, capsys: Capture, monkeypatch: Patch) -> None:
    """A certificate is trusted when its file is named, and not before."""
    context, certificate = own_authority(tmp_path)
    with serving(tls=context) as server:
        config = write_config(tmp_path, server)

        code, _, err = dpo(capsys, "submit", config)
        assert code == 2
        assert "a certificate that is not trusted" in err
        assert "KF_PIPELINES_SSL_CA_CERT" in err

        monkeypatch.setenv("KF_PIPELINES_SSL_CA_CERT", str(certificate))
        assert dpo(capsys, "submit", config)[0] == 0


def own_authority(folder: Path) -> tuple[ssl.SSLContext, Path]:
    """A context for a server at 127.0.0.1, and the certificate that it shows."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "of a test")])
    now = datetime.datetime.now(tz=datetime.UTC)
    made = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]), False)
        .sign(key, hashes.SHA256())
    )
    certificate, private = folder / "ca.pem", folder / "key.pem"
    certificate.write_bytes(made.public_bytes(serialization.Encoding.PEM))
    private.write_bytes(
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, private)
    return context, certificate
