"""Where Kubeflow Pipelines is, and who asks: from the config and the environment, where credentials belong."""

from __future__ import annotations

import ipaddress
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit, urlunsplit

from dpo_train.config import KubeflowConfig
from dpo_train.errors import ConfigError

HOST = "KF_PIPELINES_ENDPOINT"
PAGE = "KF_PIPELINES_UI_ENDPOINT"
TOKENS = ("KF_PIPELINES_TOKEN", "KUBEFLOW_TOKEN")
COOKIES = "KF_PIPELINES_COOKIES"
TOKEN_FILE = "KF_PIPELINES_SA_TOKEN_PATH"  # noqa: S105 # a variable's name
MOUNTED_TOKEN = "/var/run/secrets/kubeflow/pipelines/token"  # noqa: S105 # a path
AUTHORITIES = ("KF_PIPELINES_SSL_CA_CERT", "SSL_CERT_FILE", "REQUESTS_CA_BUNDLE")
"""Environment variables; of several the first that is set counts."""

LOGIN_FIX = (
    f"set {TOKENS[0]} to a fresh token, or {COOKIES} to the cookies of a browser that is logged in; in a pod mount a "
    f"service account's token and name it in {TOKEN_FILE} (docs/kubeflow.md)"
)


@dataclass(frozen=True, kw_only=True)
class Login:
    """What a request carries; at most one of them. None of it is ever shown."""

    token: str | None = field(default=None, repr=False)
    cookies: str | None = field(default=None, repr=False)
    token_file: str | None = None
    """Read again for every request: the cluster renews it."""


@dataclass(frozen=True, kw_only=True)
class Address:
    """Where requests go, and how."""

    api: str
    """Without a slash at its end; ``/apis/v2beta1/...`` follows."""
    page: str
    """The same of the pages for people."""
    authorities: str | None
    """File of certificates that are trusted."""
    login: Login


def address(config: KubeflowConfig, environment: Mapping[str, str] = os.environ) -> Address:
    """The address that the config names, or else the environment.

    Raises:
        ConfigError: there is none, or it is no address, or a login cannot be used.
    """
    given = config.host or environment.get(HOST)
    if not given:
        raise ConfigError(
            "Kubeflow Pipelines has no address",
            fix=f"set kubeflow.host or {HOST}, e.g. https://kubeflow.example.com/pipeline",
        )
    api = _base(given)
    page = environment.get(PAGE)
    return Address(
        api=api,
        page=_base(page) if page else api,
        authorities=_authorities(environment),
        login=_login(environment),
    )


def is_local(host: str | None) -> bool:
    """Whether a host's name means the very machine that asks."""
    if host is None or host == "localhost" or host.endswith(".localhost"):
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _base(given: str) -> str:
    """People copy what the browser shows: the part behind # is the page's own."""
    parts = urlsplit(given if "://" in given else f"https://{given}")
    if parts.scheme not in {"http", "https"} or not parts.hostname:
        raise ConfigError(
            "The address of Kubeflow Pipelines is none of http",
            got=given,
            expected="https://host, or https://host/path",
        )
    if parts.username or parts.password:
        raise ConfigError(
            "The address of Kubeflow Pipelines holds a login, and addresses are shown and recorded", fix=LOGIN_FIX
        )
    return urlunsplit((parts.scheme, parts.netloc, parts.path.rstrip("/"), "", ""))


def _login(environment: Mapping[str, str]) -> Login:
    for name in TOKENS:
        if token := environment.get(name, "").strip():
            return Login(token=_header(name, token.removeprefix("Bearer ")))
    if cookies := environment.get(COOKIES, "").strip():
        return Login(cookies=_header(COOKIES, cookies))
    if path := environment.get(TOKEN_FILE):
        if not Path(path).is_file():
            raise ConfigError(f"{TOKEN_FILE} names no file", got=path, fix="mount the token there, or unset it")
        return Login(token_file=path)
    return Login(token_file=MOUNTED_TOKEN if Path(MOUNTED_TOKEN).is_file() else None)


def _header(name: str, text: str) -> str:
    if not text.isascii() or not text.isprintable():
        raise ConfigError(f"{name} holds signs that no HTTP header may have", fix="copy it again, in one line")
    return text


def _authorities(environment: Mapping[str, str]) -> str | None:
    for name in AUTHORITIES:
        if path := environment.get(name):
            if not Path(path).is_file():
                raise ConfigError(f"{name} names no file", got=path, expected="certificates in PEM form")
            return path
    return None
