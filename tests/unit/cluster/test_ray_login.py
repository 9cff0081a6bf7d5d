"""The way to a Ray cluster: its address, and the token that is shown to it alone."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from dpo_train.cluster import ray_rest
from dpo_train.errors import ConfigError, DpoError, UserError
from tests.unit.cluster.fake_ray import Answer, FakeRay, call

TOKEN = "a-token-that-nobody-may-see"


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (Answer(200, "<html>nginx</html>"), "is not Ray's dashboard.*nginx"),
        (Answer(404, "not found"), "is not Ray's dashboard.*status 404"),
        (Answer(302, "", {"Location": "https://login"}), "points elsewhere.*302 to https://login"),
        (Answer(401, "Unauthorized"), "asks for a token.*set RAY_AUTH_TOKEN"),
        (Answer(502, "bad gateway"), "does not answer.*status 502.*check cluster.address"),
    ],
)
def test_address_of_something_else_is_the_users_mistake(
    ray: FakeRay, tmp_path: Path, fault: Answer, message: str
) -> None:
    """Said within seconds, and before anything is started."""
    ray.fault = lambda method, path, n: fault
    one = call(tmp_path, ray)

    with pytest.raises(UserError, match=message):
        one.run()
    assert one.waited_s <= 20
    assert ray.count("POST") == 0


def test_address_where_nobody_listens_is_the_users_mistake(ray: FakeRay, tmp_path: Path) -> None:
    """A port that was free a moment ago."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        ray.url = f"http://127.0.0.1:{free.getsockname()[1]}"

    with pytest.raises(UserError, match=r"does not answer.*ConnectError"):
        call(tmp_path, ray).run()


@pytest.mark.parametrize(
    "address", ["head:8265", "ray://head:10001", "http://", "http://head:8265/?x=1", "http://[::1"]
)
def test_address_that_is_none_is_refused(tmp_path: Path, address: str) -> None:
    """Before anything is asked."""
    with pytest.raises(ConfigError, match="not the address of Ray's dashboard"):
        call(tmp_path, FakeRay(url=address)).run()


def test_login_in_the_address_is_refused_without_showing_it(tmp_path: Path) -> None:
    """It would lie in the store, in the job's config."""
    with pytest.raises(ConfigError, match="holds a login") as caught:
        call(tmp_path, FakeRay(url="http://me:hunter2@head:8265")).run()
    assert "hunter2" not in str(caught.value)


def test_token_is_sent_and_never_told(ray: FakeRay, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not even where a server's error shows it."""
    monkeypatch.setenv(ray_rest.TOKEN, f" {TOKEN}\n")
    ray.fault = lambda method, path, n: Answer(500, f"bad header: {TOKEN}") if method == "POST" else None
    one = call(tmp_path, ray)

    with pytest.raises(DpoError) as caught:
        one.run()

    assert {headers.get("authorization") for headers in ray.headers} == {f"Bearer {TOKEN}"}
    assert TOKEN not in " ".join([str(caught.value), *one.told, *one.lines])


def test_refused_token_is_told_apart_from_a_missing_one(
    ray: FakeRay, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ray says 403 to a token that it does not know."""
    monkeypatch.setenv(ray_rest.TOKEN, TOKEN)
    ray.fault = lambda method, path, n: Answer(403, "Forbidden")

    with pytest.raises(UserError, match=r"refuses the token.*status 403"):
        call(tmp_path, ray).run()


def test_token_comes_from_the_file_that_is_named(ray: FakeRay, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As Ray's own tools find it; a file that is not there is a mistake."""
    (tmp_path / "token").write_text(TOKEN + "\n")
    monkeypatch.setenv(ray_rest.TOKEN_PATH, str(tmp_path / "token"))
    call(tmp_path, ray).run()
    assert ray.headers[0]["authorization"] == f"Bearer {TOKEN}"

    monkeypatch.setenv(ray_rest.TOKEN_PATH, str(tmp_path / "absent"))
    with pytest.raises(UserError, match="RAY_AUTH_TOKEN_PATH names cannot be read"):
        call(tmp_path, ray).run()


def test_token_of_this_machines_ray_stays_on_this_machine(
    ray: FakeRay, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """``ray start`` leaves one in the home directory; another cluster has no use for it."""
    (tmp_path / "auth_token").write_text(TOKEN)
    monkeypatch.setattr(ray_rest, "DEFAULT_TOKEN_PATH", tmp_path / "auth_token")

    assert ray_rest.token_for(ray.url) == TOKEN
    assert ray_rest.token_for("http://head.example:8265") == ""
