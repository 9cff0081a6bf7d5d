"""k8s/image/Dockerfile, as far as it can be read: nothing here builds it."""

from __future__ import annotations

import fnmatch
import re
import tomllib
from pathlib import Path

from dpo_train.cluster.rayjob import USER
from tests.manifests import K8S

ROOT = K8S.parent
LINES = (K8S / "image" / "Dockerfile").read_text().splitlines()
TEXT = "\n".join(line for line in LINES if not line.startswith("#"))
IGNORE = (K8S / "image" / "Dockerfile.dockerignore").read_text().splitlines()


def test_it_runs_as_the_user_of_the_pods_and_starts_dpo() -> None:
    """What it leaves behind is of the second stage, whose last word on the user is a number."""
    final = TEXT.split("FROM ${BASE}\n")[1]

    assert re.findall(r"^USER (.*)$", final, re.M) == [f"{USER}:{USER}"]
    assert re.findall(r"^ENTRYPOINT (.*)$", final, re.M) == ['["dpo"]']
    assert len(re.findall(r"^FROM \$\{BASE\}", TEXT, re.M)) == 2
    assert {"title", "version", "revision", "created", "licenses", "base.name"} <= set(
        re.findall(r"org\.opencontainers\.image\.([a-z.]+)=", final)
    )


def test_versions_come_from_the_lock() -> None:
    """Every installation is held by it, and what the extras ask for is in it."""
    installs = re.findall(r"pip install (.*)", TEXT)
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    locked = {
        line.split("==")[0].lower().replace("_", "-") for line in (ROOT / "requirements.lock").read_text().splitlines()
    }

    assert installs
    assert all("--constraint requirements.lock" in line for line in installs)
    [names] = re.findall(r"^ARG EXTRAS=(.*)$", TEXT, re.M)
    for extra in names.split(","):
        for wanted in extras[extra] if extra != "all" else []:
            assert re.split(r"[\[<>=]", wanted)[0].lower() in locked, wanted
    assert {"mlflow[auth]", "psycopg2-binary", "boto3"} <= {re.split(r"[<>=]", each)[0] for each in extras["server"]}


def test_no_secret_can_get_in() -> None:
    """No argument or variable is made for one, and of the repository only the sources are sent to the builder."""
    assert not re.search(r"(?im)^(ARG|ENV).*(password|secret|token|_key)", TEXT)
    assert IGNORE[1] == "*"
    allowed = {line[1:] for line in IGNORE if line.startswith("!")}
    copied = {
        word.removeprefix("./")
        for line in re.findall(r"^COPY (?!--from)(.*) \S+$", TEXT, re.M)
        for word in line.split()
    }

    assert copied == allowed
    assert all((ROOT / name).exists() for name in copied)
    assert not [path for path in map(Path, allowed) if fnmatch.fnmatch(path.name, ".*")]
