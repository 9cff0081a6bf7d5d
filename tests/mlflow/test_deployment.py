"""The MLflow server as k8s/ deploys it: its very command and environment, over real PostgreSQL and a real S3 server."""

from __future__ import annotations

import base64
import re
import shutil
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

pytest.importorskip("mlflow")

from dpo_train.tracking import Tracking
from tests.manifests import built, of_kind
from tests.mlflow.postgres import postgres
from tests.mlflow.server import environment, free_port, running
from tests.restricted import pods_of
from tests.s3.server import Server, serve
from tests.tiny import tiny_config

NAMESPACE = "dpo"
PASSWORDS = {
    "admin-password": "the-password-of-the-administrator",
    "session-key": "the-key-of-sessions",
    "database-password": "the-password/of the:database@",
}
USER = ("runs", "the-password-of-those-who-run")


@dataclass(frozen=True)
class Deployed:
    """The server that stands, and what is behind it."""

    url: str
    log: Path
    s3: Server
    database: str
    pod: dict[str, Any]
    said: dict[str, list[str]]
    """By the init containers, at the first start and at the second."""


@pytest.fixture(scope="module")
def deployed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployed]:
    """overlays/kind: first what its init containers do, twice, then the server."""
    folder = tmp_path_factory.mktemp("deployed")
    objects = built("kind")
    [(_, pod)] = pods_of(of_kind(objects, "Deployment")["mlflow"])
    with postgres() as address, serve(folder / "s3.log") as s3:
        database = _database(address)
        place = {
            "mlflow-postgres:5432": database,
            "http://s3:9000": s3.endpoint,
            "/etc/mlflow": str(folder),
            "/etc/bucket": str(folder),
        }
        secrets = {
            **PASSWORDS,
            **{key: s3.environment()[key] for key in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY")},
        }
        for settings in of_kind(objects, "ConfigMap").values():
            for name, content in settings["data"].items():
                (folder / name).write_text(_placed(content, place))
        firsts = {each["name"]: each for each in pod["initContainers"]}
        [server] = pod["containers"]
        said = {name: [] for name in firsts}
        for name in [*firsts, *firsts]:
            said[name].append(_run(firsts[name], _variables(firsts[name], objects, secrets, place), place))
        port = free_port()
        command = [sys.executable, "-m", *server["command"]]
        assert "--port=5000" in command
        command = [word.replace("5000", str(port)).replace("0.0.0.0", "127.0.0.1") for word in command]
        variables = _variables(server, objects, secrets, {**place, ":5000": f":{port}"})
        url, log = f"http://127.0.0.1:{port}", folder / "server.log"
        with running(command, url, server["readinessProbe"]["httpGet"]["path"], log, environment(**variables)):
            yield Deployed(url=url, log=log, s3=s3, database=address, pod=pod, said=said)


def _database(address: str) -> str:
    """Makes the user and the database that the StatefulSet would have; from then on passwords are asked for."""
    import psycopg2

    connection = psycopg2.connect(address.replace("+psycopg2", ""))
    connection.autocommit = True
    cursor = connection.cursor()
    cursor.execute("CREATE USER mlflow PASSWORD %s", (PASSWORDS["database-password"],))
    cursor.execute("CREATE DATABASE mlflow OWNER mlflow")
    cursor.execute("SHOW hba_file")
    [(file,)] = cursor.fetchall()
    rules = "(VALUES ('host all mlflow 127.0.0.1/32 scram-sha-256'), ('host all all 127.0.0.1/32 trust'))"
    cursor.execute(f"COPY {rules} TO '{file}'")
    cursor.execute("SELECT pg_reload_conf()")
    connection.close()
    return urlsplit(address).netloc.removeprefix("tester@")


def _placed(text: str, place: dict[str, str]) -> str:
    for there, here in place.items():
        text = text.replace(there, here)
    return text


def _variables(
    container: dict[str, Any], objects: list[dict[str, Any]], secrets: dict[str, str], place: dict[str, str]
) -> dict[str, str]:
    """A container's environment, put together as the kubelet does."""
    found: dict[str, str] = {}
    for source in container.get("envFrom", []):
        found |= of_kind(objects, "ConfigMap")[source["configMapRef"]["name"]]["data"]
    for variable in container["env"]:
        origin = variable.get("valueFrom", {})
        if "secretKeyRef" in origin:
            value = secrets[origin["secretKeyRef"]["key"]]
        elif "fieldRef" in origin:
            value = {"metadata.namespace": NAMESPACE}[origin["fieldRef"]["fieldPath"]]
        else:
            value = _expanded(variable["value"], found)
        found[variable["name"]] = value
    return {name: _placed(value, place) for name, value in found.items()}


def _run(container: dict[str, Any], variables: dict[str, str], place: dict[str, str]) -> str:
    """Runs a container's command to its end; what it printed."""
    program, *arguments = [_placed(_expanded(word, variables), place) for word in container["command"]]
    command = [sys.executable, *([] if program == "python" else ["-m", program]), *arguments]
    done = subprocess.run(command, env=environment(**variables), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip() or done.stderr


def _expanded(text: str, variables: Mapping[str, str]) -> str:
    return re.sub(r"\$\((\w+)\)", lambda match: variables[match[1]], text)


def _status(url: str, login: tuple[str, str] | None = None, host: str | None = None) -> int:
    request = urllib.request.Request(url, headers={"Host": host} if host else {})
    if login:
        request.add_header("Authorization", "Basic " + base64.b64encode(":".join(login).encode()).decode())
    try:
        with urllib.request.urlopen(request, timeout=30) as response:
            return int(response.status)
    except urllib.error.HTTPError as error:
        return error.code


def test_what_runs_before_the_server_may_run_again(deployed: Deployed) -> None:
    """At every start of the pod: bucket and tables are made once."""
    assert deployed.said["bucket"] == ["dpo made", "dpo is there"]
    first, second = deployed.said["tables"]
    assert "Creating initial MLflow database tables" in first
    assert "Creating initial" not in second


def test_database_asks_for_the_password(deployed: Deployed) -> None:
    """So that the server can only have it from PGPASSWORD: it stands in no address."""
    import psycopg2

    address = deployed.database.replace("+psycopg2", "").replace("tester@", "mlflow@").replace("/postgres", "/mlflow")
    with pytest.raises(psycopg2.OperationalError, match="password"):
        psycopg2.connect(address)
    psycopg2.connect(address, password=PASSWORDS["database-password"]).close()


def test_server_answers_probes_to_anyone_and_everything_else_to_who_logs_in(deployed: Deployed) -> None:
    """By the names that the cluster has for it, and by no other: that would be somebody else's page in a browser."""
    port = deployed.url.rsplit(":", 1)[1]
    experiments = f"{deployed.url}/api/2.0/mlflow/experiments/search?max_results=1"
    admin = ("admin", PASSWORDS["admin-password"])

    for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
        path = deployed.pod["containers"][0][probe]["httpGet"]["path"]
        assert _status(deployed.url + path, host="100.64.0.7:5000") == 200
    assert _status(experiments) == 401
    assert _status(experiments, ("admin", "password1234")) == 401
    for name in ("mlflow", "mlflow.dpo", "mlflow.dpo.svc", "mlflow.dpo.svc.cluster.local", "localhost"):
        assert _status(experiments, admin, host=f"{name}:{port}") == 200, name
    assert _status(experiments, admin, host=f"evil.example:{port}") == 403


def test_runs_go_to_postgresql_and_artifacts_by_way_of_the_server_to_s3(
    deployed: Deployed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For a user that the administrator made; the client has no login for S3."""
    import psycopg2
    from mlflow.server.auth.client import AuthServiceClient

    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", "admin")
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", PASSWORDS["admin-password"])
    AuthServiceClient(deployed.url).create_user(*USER)
    monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", USER[0])
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", USER[1])
    tracking = Tracking(tiny_config(tmp_path, tracking__uri=deployed.url, tracking__experiment="deployed"))
    run = tracking.start_run("first")
    tracking.client.log_text(run, "kept", "notes/word.txt")

    [key] = [key for key in deployed.s3.keys("dpo") if key.endswith("notes/word.txt")]
    assert key.startswith("mlflow/")
    assert deployed.s3.objects("dpo")[key] == b"kept"
    address = deployed.database.replace("+psycopg2", "").replace("/postgres", "/mlflow")
    with psycopg2.connect(address) as connection, connection.cursor() as cursor:
        cursor.execute("SELECT run_uuid FROM runs")
        assert cursor.fetchall() == [(run,)]
        cursor.execute("SELECT username FROM users ORDER BY username")
        assert cursor.fetchall() == [("admin",), (USER[0],)]


def test_no_secret_is_in_a_log_or_an_argument(deployed: Deployed) -> None:
    """Of the server and all processes that it started."""
    if shutil.which("ps") is None:
        pytest.skip("ps is not on the path")
    arguments = subprocess.run(["ps", "-ww", "-eo", "args"], capture_output=True, text=True, check=True).stdout
    log = deployed.log.read_text()

    assert deployed.url.rsplit(":", 1)[1] in arguments
    for secret in (*PASSWORDS.values(), USER[1]):
        assert secret not in log
        assert secret not in arguments
