"""moto's S3 server in a process of its own, and the fixtures ``s3_server`` and ``s3_proxy``.

Another test package imports the fixtures into its conftest.py and hands ``s3_server.environment()`` or
``s3_proxy.environment()`` to the processes that it starts.
"""

from __future__ import annotations

import functools
import http.client
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.s3.proxy import Proxy

READY_S = 60  # how long a loaded machine may take to import moto

# Whatever the developer's machine knows of clouds must not take part.
ENVIRONMENT = {
    "AWS_ACCESS_KEY_ID": "test-key",
    "AWS_SECRET_ACCESS_KEY": "test-secret",
    "AWS_EC2_METADATA_DISABLED": "true",
    "AWS_CONFIG_FILE": os.devnull,
    "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
    "AWS_REGION": "us-east-1",
}


@dataclass(frozen=True)
class Server:
    """A running server."""

    endpoint: str

    def environment(self, endpoint: str | None = None) -> dict[str, str]:
        """The variables that a process needs to find it."""
        return {**ENVIRONMENT, "AWS_ENDPOINT_URL": endpoint or self.endpoint}

    def client(self, service: str = "s3") -> Any:
        """A plain client of the server, past everything that is tested, with any keys."""
        return _client(service, self.endpoint)

    def bucket(self, name: str) -> str:
        """Creates a bucket, or empties the one of this name; its address."""
        s3 = self.client()
        if name in [bucket["Name"] for bucket in s3.list_buckets()["Buckets"]]:
            for item in s3.list_objects_v2(Bucket=name).get("Contents", []):
                s3.delete_object(Bucket=name, Key=item["Key"])
            for upload in s3.list_multipart_uploads(Bucket=name).get("Uploads", []):
                s3.abort_multipart_upload(Bucket=name, Key=upload["Key"], UploadId=upload["UploadId"])
        else:
            s3.create_bucket(Bucket=name)
        return f"s3://{name}"

    def objects(self, bucket: str) -> dict[str, bytes]:
        """Keys and contents of a bucket."""
        get = self.client().get_object
        return {key: get(Bucket=bucket, Key=key)["Body"].read() for key in self.keys(bucket)}

    def keys(self, bucket: str) -> list[str]:
        """The keys alone, where others delete objects meanwhile."""
        return [item["Key"] for item in self.client().list_objects_v2(Bucket=bucket).get("Contents", [])]

    def unfinished(self, bucket: str) -> list[str]:
        """The keys of multipart uploads that were neither completed nor aborted."""
        return [upload["Key"] for upload in self.client().list_multipart_uploads(Bucket=bucket).get("Uploads", [])]

    @contextmanager
    def enforcing(self) -> Iterator[None]:
        """Meanwhile every request must be signed with a key that ``user`` made, and be permitted."""
        self._post("/moto-api/reset-auth", "0")
        try:
            yield
        finally:
            self._post("/moto-api/reset-auth", "inf")

    def user(self, name: str, *actions: str) -> dict[str, str]:
        """Variables with the keys of a new user who may do these actions everywhere."""
        iam = self.client("iam")
        iam.create_user(UserName=name)
        if actions:
            statement = {"Effect": "Allow", "Action": list(actions), "Resource": "*"}
            policy = json.dumps({"Version": "2012-10-17", "Statement": [statement]})
            iam.put_user_policy(UserName=name, PolicyName="test", PolicyDocument=policy)
        key = iam.create_access_key(UserName=name)["AccessKey"]
        return {"AWS_ACCESS_KEY_ID": key["AccessKeyId"], "AWS_SECRET_ACCESS_KEY": key["SecretAccessKey"]}

    def _post(self, path: str, body: str) -> None:
        connection = http.client.HTTPConnection(self.endpoint.removeprefix("http://"), timeout=READY_S)
        connection.request("POST", path, body)
        assert connection.getresponse().status == 200
        connection.close()


@functools.cache
def _client(service: str, endpoint: str) -> Any:
    from botocore.session import Session

    return Session().create_client(
        service,
        region_name="us-east-1",
        endpoint_url=endpoint,
        aws_access_key_id="test-admin",
        aws_secret_access_key="test-admin",
    )


@contextmanager
def serve(log: Path) -> Iterator[Server]:
    """A server on a free port of this machine, until the end of the block."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    with log.open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)],
            stdout=output,
            stderr=subprocess.STDOUT,
            env={**os.environ, **ENVIRONMENT},
            start_new_session=True,  # a Ctrl-C in a test is not meant for it
        )
    try:
        _wait(process, port, log)
        yield Server(f"http://127.0.0.1:{port}")
    finally:
        process.terminate()
        process.wait()


def _wait(process: subprocess.Popen[bytes], port: int, log: Path) -> None:
    end = time.monotonic() + READY_S
    while time.monotonic() < end:
        assert process.poll() is None, f"the S3 server ended: {log.read_text()[-2000:]}"
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
        except OSError:
            time.sleep(0.02)
        else:
            return
    raise TimeoutError(f"the S3 server did not start in {READY_S} s: {log.read_text()[-2000:]}")


@pytest.fixture(scope="session")
def s3_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """One server for all tests; each takes a bucket of its own."""
    with serve(tmp_path_factory.mktemp("s3") / "server.log") as server:
        yield server


@pytest.fixture(scope="session")
def _one_proxy(s3_server: Server) -> Iterator[Proxy]:
    # One address for all tests: making a client for a new one takes a quarter of a second.
    with Proxy(s3_server.endpoint, ENVIRONMENT) as proxy:
        yield proxy


@pytest.fixture
def s3_proxy(_one_proxy: Proxy) -> Proxy:
    """A way to the server that does harm when told to; a test finds it without rules and with nothing seen."""
    _one_proxy.clear()
    return _one_proxy
