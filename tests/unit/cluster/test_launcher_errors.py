"""The API's answers in words."""

from __future__ import annotations

import pickle

import pytest

from dpo_train.cluster.kube_errors import RefusedError, refusal, retry_after_s, words_of

FORBIDDEN = (
    'rayjobs.ray.io is forbidden: User "{}" cannot create resource "rayjobs" in API group "ray.io" '
    'in the namespace "ml"'
)


def error(status: int, words: str, action: str = "POST /apis/ray.io/v1/namespaces/ml/rayjobs") -> RefusedError:
    return refusal(status, words, action=action, namespace="ml", role="dpo-launcher")


def test_a_missing_right_names_account_verb_resource_and_the_command_that_grants_it() -> None:
    """For a service account and for a person."""
    pod = error(403, FORBIDDEN.format("system:serviceaccount:kubeflow:runner"))
    person = error(403, FORBIDDEN.format("ada"))

    assert str(pod).startswith("The service account kubeflow/runner may not create rayjobs in the namespace ml.")
    assert "kubectl -n ml create rolebinding" in str(pod)
    assert "--role=dpo-launcher --serviceaccount=kubeflow:runner" in str(pod)
    assert "The user ada may not create rayjobs" in str(person)
    assert "--user=ada" in str(person)


@pytest.mark.parametrize(
    ("status", "words", "expected"),
    [
        (401, "Unauthorized", "does not accept this login"),
        (403, 'pods "x" is forbidden: exceeded quota: q, requested: pods=1', "quota of the namespace ml"),
        (
            403,
            'rayjobs.ray.io "x" is forbidden: exceeded quota: q, used: count/rayjobs.ray.io=50',
            "dpo reap --namespace",
        ),
        (403, "denied by the service mesh", "forbids"),
        (404, "404 page not found", "KubeRay is not installed"),
        (404, "the server could not find the requested resource", "KubeRay is not installed"),
        (404, 'namespaces "ml" not found', "namespace ml does not exist"),
        (404, 'rayjobs.ray.io "x" not found', "refused"),
        (400, 'strict decoding error: unknown field "spec.x"', "does not accept what was asked"),
        (422, "spec.entrypoint: Required value", "does not accept what was asked"),
        (405, "", "HTTP 405"),
    ],
)
def test_every_answer_has_words_and_is_the_users_mistake(status: int, words: str, expected: str) -> None:
    """With the API's own message, if it has one, and something to do."""
    found = error(status, words)

    assert expected in str(found)
    assert words in str(found)
    assert "What to do: " in str(found)
    assert (found.exit_code, found.status, found.words) == (2, status, words)


def test_a_refusal_travels_between_processes() -> None:
    """Its words do; a component runs in a process of its own."""
    assert str(pickle.loads(pickle.dumps(error(401, "Unauthorized")))) == str(error(401, "Unauthorized"))


def test_words_of_a_status_object_of_text_and_of_nonsense() -> None:
    """Proxies answer with pages."""
    assert words_of(b'{"kind": "Status", "message": "no"}') == "no"
    assert words_of(b"404 page not found\n") == "404 page not found"
    assert words_of(b"[1]") == "[1]"
    assert words_of(b"\xff") == "�"
    assert len(words_of(b"<html>" * 1000)) == 500


@pytest.mark.parametrize(("value", "seconds"), [("3", 3.0), ("0", 0.0), ("Wed, 21 Oct 2026 07:28:00 GMT", None)])
def test_retry_after(value: str, seconds: float | None) -> None:
    """Kubernetes writes seconds; a date, as other servers write it, is left to our own pauses."""
    assert retry_after_s({"Retry-After": value}) == seconds
    assert retry_after_s({}) is None
