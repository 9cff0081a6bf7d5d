"""The Kubernetes API: the official client's logins and connections, and requests with one layer of retries over them.

Requests go over the client's connection pool and not through its generated classes: those hide Retry-After, choose a
patch type that custom resources refuse, and read a log by lines that they drop when empty.

In a pod the login is the service account's, else the kubeconfig's. Tokens of service accounts rotate, and logins made
by a program expire: after a 401 the login is read once more before it counts as refused.
"""

from __future__ import annotations

import json
import os
import random
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import urllib3
import yaml

from dpo_train.cluster.kube_errors import PASSING, NoLoginError, refusal, retry_after_s, words_of
from dpo_train.errors import MissingPackageError, RunError, first_line

IN_CLUSTER = Path("/var/run/secrets/kubernetes.io/serviceaccount")
"""Where Kubernetes mounts a pod's login."""
MERGE_PATCH = "application/merge-patch+json"
JSON_PATCH = "application/json-patch+json"
PATIENCE_S = 120.0
"""How long a request is tried again before the cluster counts as out of reach."""
FIRST_PAUSE_S = 0.5
LONGEST_PAUSE_S = 15.0
CONNECT_TIMEOUT_S = 10.0
READ_TIMEOUT_S = 30.0


class StreamBrokenError(Exception):
    """A watch or a log was cut; what came before the cut is good."""


@dataclass(frozen=True)
class _Link:
    """A login and its connections."""

    configuration: Any
    pool: urllib3.PoolManager

    def headers(self) -> dict[str, str]:
        """The login's header. The client reads the file of a service account's token again every minute."""
        settings = self.configuration.auth_settings().values()
        return {setting["key"]: setting["value"] for setting in settings if setting["value"]}


class Kube:
    """One namespace of a cluster. Safe to use from several threads."""

    def __init__(self, namespace: str | None = None, *, role: str = "dpo-launcher") -> None:
        """Finds the login; asks the cluster nothing.

        Args:
            namespace: default: the one of this pod, or of the kubeconfig's context.
            role: the Role that errors advise to bind.

        Raises:
            NoLoginError: there is none that can be used.
            MissingPackageError: the package `kubernetes` is not installed.
        """
        self._link, self.home = _connect()
        self.namespace = namespace or self.home
        self._role = role
        self._lock = threading.Lock()
        self.pause: Callable[[float], None] = time.sleep

    def ask(
        self,
        method: str,
        path: str,
        *,
        query: Mapping[str, str] | None = None,
        body: object = None,
        content_type: str = "application/json",
        patience_s: float = PATIENCE_S,
        timeout_s: float = READ_TIMEOUT_S,
    ) -> dict[str, Any]:
        """The answer to a request; what may pass is tried again.

        Raises:
            RefusedError: with the answer's status.
            RunError: the API could not be reached for ``patience_s``.
        """
        data = None if body is None else json.dumps(body).encode()
        headers = {"Accept": "application/json"} if data is None else {"Content-Type": content_type}
        response = self._send(method, path, query, data, headers, patience_s=patience_s, timeout_s=timeout_s)
        return dict(json.loads(response.data or b"{}"))

    def lines(
        self, path: str, query: Mapping[str, str], *, silence_s: float, patience_s: float = PATIENCE_S
    ) -> Iterator[str]:
        """The lines of an answer that goes on, without their ends, until the server ends it in order.

        Args:
            silence_s: after so long without a byte the connection counts as lost.

        Raises:
            StreamBrokenError: the answer was cut.
            RefusedError, RunError: as of ``ask``.
        """
        headers = {"Accept": "*/*"}
        response = self._send("GET", path, query, None, headers, patience_s=patience_s, timeout_s=silence_s, keep=True)
        rest = b""
        try:
            for block in response.stream(2**16, decode_content=False):
                *whole, rest = (rest + block).split(b"\n")
                for line in whole:
                    yield line.decode("utf-8", errors="replace")
        except (urllib3.exceptions.HTTPError, OSError) as error:
            raise StreamBrokenError(first_line(error)) from error
        finally:
            response.close()  # not back into the pool: an answer that was left early is still under way
        if rest:
            yield rest.decode("utf-8", errors="replace")

    def _send(
        self,
        method: str,
        path: str,
        query: Mapping[str, str] | None,
        body: bytes | None,
        headers: Mapping[str, str],
        *,
        patience_s: float,
        timeout_s: float,
        keep: bool = False,
    ) -> urllib3.BaseHTTPResponse:
        end = time.monotonic() + patience_s
        failures, renewed = 0, False
        while True:
            link = self._link
            wait_s: float | None = None
            try:
                response = link.pool.request(
                    method,
                    link.configuration.host + path + (f"?{urlencode(query)}" if query else ""),
                    body=body,
                    headers={**headers, **link.headers()},
                    timeout=urllib3.Timeout(connect=min(CONNECT_TIMEOUT_S, timeout_s), read=timeout_s),
                    preload_content=not keep,
                    retries=False,  # ours are the only ones; urllib3's would also wait by Retry-After, out of sight
                )
                if response.status < 400:
                    return response
                words = words_of(response.data)
                if response.status == 401 and not renewed:
                    renewed = True
                    self._renew(link)
                    continue
                if response.status not in PASSING:
                    action = f"{method} {path}"
                    raise refusal(response.status, words, action=action, namespace=self.namespace, role=self._role)
                wait_s = retry_after_s(response.headers)
                trouble = f"{response.status} {words}"
            except (urllib3.exceptions.HTTPError, OSError) as error:
                trouble = _trouble(error, link.configuration.host)
            failures += 1
            wait_s = _pause_s(failures) if wait_s is None else wait_s
            if time.monotonic() + wait_s > end:
                raise RunError(
                    f"The Kubernetes API at {link.configuration.host} cannot be reached",
                    got=f"{trouble} ({method} {path}, {failures} attempts in {patience_s:.0f} s)",
                    fix="check the network and the cluster, and run the same command again: a job that runs is found",
                )
            self.pause(wait_s)

    def _renew(self, refused: _Link) -> None:
        """Reads the login again, unless another thread has done so since."""
        with self._lock:
            if self._link is refused:
                self._link, _ = _connect()


def _pause_s(failures: int) -> float:
    longest = min(LONGEST_PAUSE_S, FIRST_PAUSE_S * 2.0 ** (failures - 1))
    return longest * (0.5 + 0.5 * random.random())  # noqa: S311  # spreads load, no secret


def _trouble(error: Exception, host: str) -> str:
    """The words of a failed connection.

    Raises:
        NoLoginError: another attempt would fail in the same way.
    """
    if "CERTIFICATE_VERIFY_FAILED" in str(error):
        raise NoLoginError(
            f"The certificate of the Kubernetes API at {host} is not trusted",
            got=first_line(error),
            fix="set certificate-authority in the kubeconfig to the cluster's own",
        ) from error
    return f"{type(error).__name__}: {first_line(error)}"


def _connect() -> tuple[_Link, str]:
    """A login, and the namespace that goes with it."""
    try:
        import kubernetes  # type: ignore[import-untyped]
        from kubernetes.config import ConfigException  # type: ignore[import-untyped]
    except ImportError as error:
        raise MissingPackageError("Clusters need the package kubernetes", fix="pip install 'dpo-train[k8s]'") from error
    configuration = kubernetes.client.Configuration()
    configuration.connection_pool_maxsize = 8
    path = os.environ.get("KUBECONFIG") or "~/.kube/config"
    try:
        if "KUBERNETES_SERVICE_HOST" in os.environ and (IN_CLUSTER / "token").is_file():
            _load_in_cluster(configuration)
            namespace = (IN_CLUSTER / "namespace").read_text().strip()
        else:
            _require(path)
            kubernetes.config.load_kube_config(path, client_configuration=configuration)
            _, context = kubernetes.config.list_kube_config_contexts(path)
            namespace = context["context"].get("namespace") or "default"
    except (ConfigException, OSError, ValueError, TypeError, yaml.YAMLError) as error:  # TypeError: a file of a list
        raise NoLoginError(
            "The login for the cluster cannot be used",
            got=f"{first_line(error)} ({path})",
            fix="try `kubectl get namespace default` with the same KUBECONFIG, and renew it",
        ) from error
    return _Link(configuration, kubernetes.client.ApiClient(configuration).rest_client.pool_manager), namespace


def _load_in_cluster(configuration: Any) -> None:
    from kubernetes.config.incluster_config import InClusterConfigLoader  # type: ignore[import-untyped]

    loader = InClusterConfigLoader(token_filename=str(IN_CLUSTER / "token"), cert_filename=str(IN_CLUSTER / "ca.crt"))
    loader.load_and_set(configuration)


def _require(path: str) -> None:
    """A list of files, as kubectl takes it, of which one is there."""
    if not any(Path(part).expanduser().is_file() for part in path.split(os.pathsep)):
        raise NoLoginError(
            "There is no login for a cluster",
            got=f"no file {path}, and this is no pod",
            expected="KUBECONFIG, ~/.kube/config, or a pod with a service account",
            fix="export KUBECONFIG=FILE, as your cluster's documentation has it",
        )
