"""What of a config a cluster cannot see; addresses; names of pods."""

from __future__ import annotations

import json
from typing import Any

import pytest

pytest.importorskip("kfp")

from dpo_train.cluster.kubeflow.login import address, is_local
from dpo_train.cluster.kubeflow.logs import fnv1a
from dpo_train.cluster.kubeflow.reach import check_image, check_logins, check_reach
from dpo_train.config import KubeflowConfig, RunConfig, parse_config
from dpo_train.errors import ConfigError


def config(**sections: Any) -> RunConfig:
    far = {"store": "s3://b/store", "model": {"path": "org/model"}, "prepare": {"path": "s3://b/pairs.jsonl"}}
    return parse_config(json.dumps({**far, **sections}))


@pytest.mark.parametrize(
    "sections",
    [
        {},
        {"model": {"path": "s3://b/model"}, "prepare": {"path": "hf://org/pairs"}},
        {"store": "/data/store", "cluster": {"volumes": {"/data": "claim"}}},
        {"tracking": {"uri": "https://mlflow.example.com"}},
        {"tracking": {"uri": "sqlite:////data/mlflow.db"}, "cluster": {"volumes": {"/data": "claim"}}},
        {"evaluate": {"judge": {"kind": "endpoint", "url": "http://judge.models:8000/v1", "model": "a"}}},
    ],
)
def test_what_a_cluster_sees(sections: dict[str, Any]) -> None:
    """Object storage, hubs, mounted volumes, and addresses of other machines."""
    check_reach(config(**sections))


@pytest.mark.parametrize(
    ("sections", "named"),
    [
        ({"store": "store"}, "store=/"),
        ({"store": "/data2/store", "cluster": {"volumes": {"/data": "claim"}}}, "store=/data2/store"),
        ({"store": "/data/../home", "cluster": {"volumes": {"/data": "claim"}}}, "store=/data/../home"),
        ({"model": {"path": "/models/a", "adapter": "/models/b"}}, "model.path=/models/a, model.adapter=/models/b"),
        ({"prepare": {"sources": [{"path": "s3://b/a"}, {"path": "/b.jsonl"}]}}, r"prepare.sources\[1\].path=/b.jsonl"),
        ({"prepare": {"path": "s3://b/a", "chat_template": "/t.jinja"}}, "prepare.chat_template=/t.jinja"),
        ({"evaluate": {"judge": {"kind": "reward_model", "path": "/rewards"}}}, "evaluate.judge.path=/rewards"),
        ({"tracking": {"uri": "sqlite:///mlflow.db"}}, "tracking.uri"),
        ({"tracking": {"uri": "/home/me/mlruns"}}, "tracking.uri"),
        ({"tracking": {"uri": "http://[::1]:5000"}}, "tracking.uri"),
        ({"storage": {"endpoint": "http://localhost:9000"}}, "storage.endpoint"),
    ],
)
def test_what_it_does_not_see(sections: dict[str, Any], named: str) -> None:
    """The key is named with its value."""
    with pytest.raises(ConfigError, match=named):
        check_reach(config(**sections))


def test_login_within_an_address_is_refused_and_not_shown() -> None:
    """The config is an argument of the run, which is no place for a secret."""
    with pytest.raises(ConfigError, match=r"storage\.endpoint") as caught:
        check_reach(config(storage={"endpoint": "https://me:hunter2@s3.example.com"}))
    assert "hunter2" not in str(caught.value)


@pytest.mark.parametrize(
    ("sections", "named"),
    [
        ({"cluster": {"environment": {"PROXY": "http://me:hunter2@proxy:3128"}}}, r"cluster\.environment\.PROXY"),
        ({"prepare": {"sources": [{"path": "s3://me:hunter2@bucket/a"}]}}, r"prepare\.sources\[0\]\.path"),
    ],
)
def test_login_is_looked_for_in_the_whole_config(sections: dict[str, Any], named: str) -> None:
    """Whichever key holds the address."""
    with pytest.raises(ConfigError, match=named) as caught:
        check_reach(config(**sections))
    assert "hunter2" not in str(caught.value)


def test_login_within_another_argument() -> None:
    """In a list or a mapping too; other texts may hold whatever looks a little like it."""
    check_logins({"a": "me@example.com", "b": ["https://example.com/@me", 3, None], "c": {"d": "https://a/b?page=2"}})
    with pytest.raises(ConfigError, match=r"a\[1\], b\.c") as caught:
        check_logins({"a": ["x", "https://me:hunter2@example.com"], "b": {"c": "https://a/b?token=hunter2"}})
    assert "hunter2" not in str(caught.value)


def test_images_say_which_version_they_are() -> None:
    """A tag or a digest, behind a name that may hold a port."""
    digest = "sha256:" + "0" * 64
    for good in ("dpo:1", "host:5000/a/dpo:1.0-rc_2", f"dpo@{digest}", f"host/dpo:1@{digest}"):
        check_image(good, "--image")
    for bad in ("dpo", "host:5000/dpo", "dpo@sha256:12", "dpo:", ":1", "dpo:1 2", f"dpo@{digest}0"):
        with pytest.raises(ConfigError, match="--image"):
            check_image(bad, "--image")


@pytest.mark.parametrize(
    ("given", "api"),
    [
        ("https://kf.example.com/pipeline/", "https://kf.example.com/pipeline"),
        ("kf.example.com", "https://kf.example.com"),
        ("http://kf.example.com:8080/pipeline/#/runs?x=1", "http://kf.example.com:8080/pipeline"),
    ],
)
def test_address_as_people_copy_it(given: str, api: str) -> None:
    """Without what is the page's own."""
    assert address(KubeflowConfig(host=given), {}).api == api


def test_address_of_the_environment() -> None:
    """The config's comes first; the page for people may be elsewhere."""
    variables = {"KF_PIPELINES_ENDPOINT": "http://a", "KF_PIPELINES_UI_ENDPOINT": "https://page"}

    assert address(KubeflowConfig(), variables).api == "http://a"
    assert address(KubeflowConfig(host="http://b"), variables).api == "http://b"
    assert address(KubeflowConfig(), variables).page == "https://page"
    with pytest.raises(ConfigError, match="has no address"):
        address(KubeflowConfig(), {})


def test_login_is_not_in_the_repr() -> None:
    """Whatever prints the address prints no token."""
    found = address(KubeflowConfig(host="http://a"), {"KF_PIPELINES_TOKEN": "Bearer secret"})

    assert found.login.token == "secret"
    assert "secret" not in repr(found)


def test_hosts_of_this_machine() -> None:
    """By name or by number."""
    assert all(map(is_local, ("localhost", "a.localhost", "127.0.0.1", "127.9.9.9", "::1", None)))
    assert not any(map(is_local, ("example.com", "10.0.0.1", "localhost.example.com")))


def test_hash_of_argos_nodes() -> None:
    """The algorithm's published test vectors."""
    assert [fnv1a(text) for text in ("", "a", "foobar")] == [0x811C9DC5, 0xE40C292C, 0xBF9CF968]
