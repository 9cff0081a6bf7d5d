"""Requests to Kubeflow Pipelines, and what its refusals mean."""

from __future__ import annotations

import json
import re
import time
import urllib.request
from collections.abc import Callable, Iterator
from typing import Any
from urllib.parse import quote, urlsplit

import urllib3

from dpo_train.cluster.kubeflow.login import LOGIN_FIX, Address, is_local
from dpo_train.config import KubeflowConfig
from dpo_train.errors import ConfigError, MissingPackageError, UserError, first_line
from dpo_train.tracking import redacted

try:
    import kfp_server_api  # type: ignore[import-untyped]
except ImportError:
    raise MissingPackageError("Kubeflow Pipelines is not installed", fix="pip install 'dpo-train[kfp]'") from None

messages: Any = kfp_server_api
"""The server's messages, as the generated client has them."""

TIMES = (10, 60)
"""Seconds for a connection, and for an answer."""
PAUSES = (1.0, 3.0)
"""Seconds before a question is asked again that got no answer."""
PAGE_SIZE = 100
_CONNECTION = re.compile(r"^HTTPS?Connection(Pool)?\(.*?\): ")
_HIDDEN = re.compile(r"(?i)\b(bearer\s+)[\w.~+/=-]+")


class KubeflowError(UserError):
    """Kubeflow Pipelines refuses, or what answers is something else."""


class LoginError(KubeflowError):
    """It does not know who asks."""


class NotThereError(KubeflowError):
    """It has nothing of that name."""


class TakenError(KubeflowError):
    """It has something of that name already."""


class AwayError(KubeflowError):
    """It does not answer, or cannot just now; the same request may do later."""

    lost = False
    """Whether the request may have been done, and only its answer was lost."""
    answered = False
    """Whether a server is there, and says that it cannot."""


class Kubeflow:
    """One Kubeflow Pipelines, as one user sees it."""

    def __init__(self, address: Address, namespace: str | None = None) -> None:
        self.address = address
        self.namespace = namespace
        self._api = _api_client(address)
        self.experiments = kfp_server_api.ExperimentServiceApi(self._api)
        self.pipelines = kfp_server_api.PipelineServiceApi(self._api)
        self.uploads = kfp_server_api.PipelineUploadServiceApi(self._api)
        self.runs = kfp_server_api.RunServiceApi(self._api)
        self.recurring_runs = kfp_server_api.RecurringRunServiceApi(self._api)

    def ask(self, function: Callable[..., Any], *arguments: Any, **named: Any) -> Any:
        """A question, which may be asked again if no answer comes.

        Raises:
            KubeflowError: what the server says, or that it does not answer.
        """
        for pause in PAUSES:
            try:
                return self.tell(function, *arguments, **named)
            except AwayError:
                time.sleep(pause)
        return self.tell(function, *arguments, **named)

    def tell(self, function: Callable[..., Any], *arguments: Any, **named: Any) -> Any:
        """A change, which is asked for once: done again after a lost answer it might be done twice.

        Raises:
            KubeflowError: what the server says, or that it does not answer.
        """
        try:
            return function(*arguments, **named)
        except KubeflowError:
            raise
        except (kfp_server_api.ApiException, urllib3.exceptions.HTTPError, OSError, ValueError) as error:
            raise _meaning(error, self.address.api) from error

    def all(self, function: Callable[..., Any], key: str, **named: Any) -> Iterator[Any]:
        """What a listing has, page after page, as far as somebody reads.

        Args:
            key: of an answer, where its items are.
        """
        token = ""
        while True:
            answer = self.ask(function, page_size=PAGE_SIZE, page_token=token, **named)
            yield from getattr(answer, key) or ()
            token = answer.next_page_token or ""
            if not token:
                return

    def named(self, function: Callable[..., Any], key: str, name: str, **more: Any) -> Any | None:
        """The one of this name, or None."""
        found = self.all(function, key, filter=equals("display_name", name), **more)
        return next((item for item in found if item.display_name == name), None)

    @property
    def scope(self) -> dict[str, str]:
        """What a listing of a user's own things says."""
        return {} if self.namespace is None else {"namespace": self.namespace}

    def text(self, path: str, **query: str) -> str:
        """What is no JSON, such as a log. It is asked for once: Kubeflow answers 500 where there is none."""
        parameters = [(name, value) for name, value in query.items() if value]
        answer = self.tell(
            self._api.call_api,
            path,
            "GET",
            query_params=parameters,
            header_params={"Accept": "text/plain"},
            auth_settings=["Bearer"],
            _preload_content=False,
            _return_http_data_only=True,
        )
        return str(answer.data.decode("utf-8", errors="replace"))

    def link(self, run_id: str) -> str:
        """A run's page for people."""
        return f"{self.address.page}/#/runs/details/{run_id}"


def connect(address: Address, config: KubeflowConfig) -> Kubeflow:
    """The server behind the address, asked once whether it is there and how many users it has.

    Raises:
        KubeflowError: it is not, does not know who asks, or is no Kubeflow Pipelines.
        ConfigError: ``kubeflow.namespace`` is missing, or has no meaning there.
    """
    kubeflow = Kubeflow(address, config.namespace)
    health = kfp_server_api.HealthzServiceApi(kubeflow._api)
    try:
        has_users = bool(kubeflow.ask(health.healthz_service_get_healthz).multi_user)
    except NotThereError as error:
        raise _stranger(address.api, "404") from error
    if has_users and config.namespace is None:
        raise ConfigError(
            f"Kubeflow at {address.api} has several users, each with a namespace",
            fix="set kubeflow.namespace to your profile's",
        )
    if not has_users and config.namespace is not None:
        raise ConfigError(
            f"Kubeflow at {address.api} has no users, and so no namespaces",
            got=f"kubeflow.namespace={config.namespace}",
            fix="leave kubeflow.namespace out",
        )
    return kubeflow


def equals(key: str, text: str) -> str:
    """A filter. It is quoted once more because the server takes one more quotation off than HTTP does."""
    return quote(json.dumps({"predicates": [{"operation": "EQUALS", "key": key, "string_value": text}]}))


class _Rest(kfp_server_api.rest.RESTClientObject):  # type: ignore[misc]
    """The generated client's way to HTTP, which takes a login page for an answer with nothing in it."""

    def request(self, method: str, url: str, *arguments: Any, **named: Any) -> Any:
        named["_request_timeout"] = named.get("_request_timeout") or TIMES
        answer = super().request(method, url, *arguments, **named)
        kind = _header(answer, "content-type")
        base = url.partition("/apis/")[0]
        if "html" in kind:
            raise _html(base, answer.data)
        if named.get("_preload_content", True) and "json" not in kind:
            raise _stranger(base, f"an answer of type {kind or 'unknown'}")
        return answer


def _api_client(address: Address) -> Any:
    configuration = kfp_server_api.Configuration(host=address.api)
    configuration.ssl_ca_cert = address.authorities
    # No redirect is followed, least of all with a token: it leads to a login page. Repeating is up to `ask`.
    configuration.retries = urllib3.Retry(total=0, redirect=0, raise_on_redirect=False)
    parts = urlsplit(address.api)
    proxies = urllib.request.getproxies()
    if not is_local(parts.hostname) and not urllib.request.proxy_bypass(parts.netloc):
        configuration.proxy = proxies.get(parts.scheme)
    login = address.login
    if login.token or login.token_file:
        configuration.api_key_prefix["authorization"] = "Bearer"
        configuration.api_key["authorization"] = login.token or ""
    if login.token_file:
        from kfp.client import ServiceAccountTokenVolumeCredentials

        configuration.refresh_api_key_hook = ServiceAccountTokenVolumeCredentials(login.token_file).refresh_api_key_hook
    client = kfp_server_api.ApiClient(configuration, cookie=login.cookies)
    client.rest_client = _Rest(configuration)
    return client


def _header(answer: Any, name: str) -> str:
    headers = getattr(answer, "urllib3_response", answer).headers
    return str(headers.get(name) or "").lower()


def _meaning(error: Exception, api: str) -> KubeflowError:
    """What a failure is to us, and what to do about it."""
    if isinstance(error, kfp_server_api.ApiException) and error.status:
        return _refusal(error, api)
    if isinstance(error, urllib3.exceptions.HTTPError):
        return _away(error, api)
    if isinstance(error, OSError):  # the token's file
        return LoginError(f"The token for Kubeflow cannot be read: {error}", fix=LOGIN_FIX)
    return _stranger(api, f"an answer that is not understood: {first_line(error)[:200]}")


def _away(error: Exception, api: str) -> KubeflowError:
    reason = getattr(error, "reason", None) or error
    text = first_line(reason) if isinstance(reason, Exception) else str(reason)
    text = redacted(_CONNECTION.sub("", text))
    if isinstance(reason, urllib3.exceptions.SSLError):
        return KubeflowError(
            f"Kubeflow at {api} shows a certificate that is not trusted: {text}",
            fix="name the file of your authority's certificates in KF_PIPELINES_SSL_CA_CERT",
        )
    away = AwayError(
        f"Kubeflow at {api} does not answer: {text[:300]}", fix="check kubeflow.host, and whether it is up"
    )
    away.lost = not isinstance(reason, urllib3.exceptions.NewConnectionError | urllib3.exceptions.ConnectTimeoutError)
    return away


def _refusal(error: Any, api: str) -> KubeflowError:
    status, text = int(error.status), _words(error.body)
    headers = error.headers or {}
    if 300 <= status < 400:
        place = str(headers.get("Location", "")).partition("?")[0]
        return LoginError(f"Kubeflow at {api} asks for a login", got=f"a redirect to {place}", fix=LOGIN_FIX)
    if status == 401:
        return LoginError(f"Kubeflow at {api} does not know who asks: {text or 'the login is missing or has expired'}",
                          fix=LOGIN_FIX)  # fmt: skip
    if status == 403:
        return KubeflowError(
            f"Kubeflow at {api} does not allow this: {text or 'access denied'}",
            fix="check kubeflow.namespace, the login, and its rights there",
        )
    if status == 404:
        return NotThereError(f"Kubeflow at {api} has no such thing: {text}") if text else _stranger(api, "404")
    if status == 409:
        return TakenError(f"Kubeflow at {api} has that already: {text}")
    if status in {408, 429} or status >= 500:
        away = AwayError(
            f"Kubeflow at {api} cannot do that just now ({status}): {text or error.reason}",
            fix="try again later; the log of its API server says more",
        )
        away.lost, away.answered = status not in {429, 503}, True
        return away
    return KubeflowError(f"Kubeflow at {api} refuses ({status}): {text or error.reason}")


def _words(body: Any) -> str:
    """The message within an answer's JSON; nothing of a page."""
    text = body.decode("utf-8", errors="replace") if isinstance(body, bytes) else str(body or "")
    try:
        content = json.loads(text)
    except ValueError:
        return ""
    found = [content.get(key) for key in ("message", "error_message", "error")] if isinstance(content, dict) else []
    words = next((word for word in found if isinstance(word, str) and word), "")
    return redacted(_HIDDEN.sub(r"\1***", words.strip().partition("\n")[0]))[:400]


def _html(api: str, page: bytes | str) -> KubeflowError:
    text = (page if isinstance(page, str) else page.decode("utf-8", errors="replace")).lower()
    if any(word in text for word in ("login", "log in", "sign in", "signin", "dex", "oauth", "password")):
        return LoginError(f"Kubeflow at {api} answers with a login page", fix=LOGIN_FIX)
    return _stranger(api, "a web page")


def _stranger(api: str, got: str) -> KubeflowError:
    return KubeflowError(
        f"What answers at {api} is not the API of Kubeflow Pipelines",
        got=got,
        fix="check kubeflow.host; in a full Kubeflow it ends in /pipeline",
    )
