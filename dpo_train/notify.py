"""A pipeline's last task: tells a webhook how the run ended, also where it ended before it had begun.

Kubeflow's state, the run's tags in MLflow --notice_of--> Notice --payload--> JSON or Slack's form --post--> webhook

The webhook's address is a secret (who has it may write to the channel): it comes from DPO_WEBHOOK_URL, and stands in no
config, log, message or MLflow run. Nothing that goes wrong here fails a run; it is said in the task's log.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
import logging
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast, get_args
from urllib.parse import urlsplit, urlunsplit

from dpo_train.config import RetrainConfig, RunConfig, parse_config
from dpo_train.config.cluster import Outcome
from dpo_train.errors import DpoError
from dpo_train.preflight import use_storage
from dpo_train.progress import ENVIRONMENT_KEY, Follower, Reporter

if TYPE_CHECKING:
    import httpx2

    from dpo_train.tracking import Tracking

URL_VARIABLE = "DPO_WEBHOOK_URL"
SCHEMA_VERSION = 1
"""Of the JSON. A new key does not raise it; a key that is gone or means something else does."""

PAUSES_SECONDS = (1.0, 4.0)
"""Between attempts; one more attempt than pauses."""
REQUEST_SECONDS = 10.0
"""For one attempt as a whole, however slowly the server sends."""
MESSAGE_CHARACTERS = 2000
_PASSING = {408, 425, 429}
_GOOD, _BAD = {"SUCCEEDED", "COMPLETE", "CACHED"}, {"FAILED", "CANCELED", "CANCELLED"}
"""Kubeflow's server has other words than the SDK. It may also say RUNNING: where a task was killed, and where nothing
but the first task ran, because a branch that is skipped does not end what holds it."""


@dataclass(frozen=True, kw_only=True)
class Notice:
    """What is told."""

    outcome: Outcome
    run_name: str
    message: str
    kubeflow_run: str | None = None
    mlflow_run: str | None = None
    mlflow_url: str | None = None
    """Its page; None where MLflow is a file, or was not reached."""
    model_version: str | None = None
    """``<name>/<number>`` of what was registered."""
    metrics: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Found:
    """The pipeline's run in MLflow."""

    run_id: str
    url: str | None
    is_running: bool
    tags: Mapping[str, str]
    metrics: Mapping[str, float]


def notify(
    text: str,
    name: str,
    *,
    overrides: Sequence[str] = (),
    kubeflow_run: str | None = None,
    state: str,
    error: str | None = None,
) -> None:
    """Posts how a pipeline's run ended, if ``retrain.notify`` has that outcome. Never raises.

    Args:
        text: the pipeline's config, as it was given; one that cannot be read is told by the defaults.
        name: of the run.
        overrides: ``section.key=value``.
        kubeflow_run: id of the pipeline's run in Kubeflow, by which its run in MLflow is found.
        state: what Kubeflow says of all tasks before this one, e.g. COMPLETE or FAILED.
        error: what Kubeflow says of the error.
    """
    url = os.environ.get(URL_VARIABLE, "").strip()
    if not url and state in _GOOD:
        print(f"{state}; {URL_VARIABLE} is not set: nobody is told")
        return
    try:
        said, is_problem = _notify(url, text, name, overrides, kubeflow_run, state, error)
    except Exception as unexpected:  # whatever it is, a run that went well has gone well
        said, is_problem = f"nobody was told how this run ended: {type(unexpected).__name__}: {unexpected}", True
    said = said.replace(url, "***") if url else said
    print(said)
    if is_problem:
        _show(said, state)


def _notify(
    url: str, text: str, name: str, overrides: Sequence[str], kubeflow_run: str | None, state: str, error: str | None
) -> tuple[str, bool]:
    """What to say of it, and whether that is a problem."""
    config: RunConfig | None = None
    try:
        config = parse_config(text, overrides)
        use_storage(config)
    except DpoError as mistake:
        error = str(mistake)
    options = config.retrain if config else RetrainConfig()
    found, problem = (None, None) if config is None else look(config, kubeflow_run)
    if problem and state in _GOOD:
        return f"what came of this run is not known, and nobody is told: {problem}", True
    notice = notice_of(name, state, found, kubeflow_run=kubeflow_run, error=_last_error() or problem or error)
    if config and found and found.is_running and notice.outcome == "failed":
        _end(config, found.run_id, notice.message)
    if not url:
        return f"{notice.outcome}: {URL_VARIABLE} is not set, nobody is told", False
    if notice.outcome not in options.notify:
        return f"{notice.outcome}: not among retrain.notify, nobody is told", False
    if problem := post(url, payload(notice, options.webhook)):
        return f"{notice.outcome}, and nobody was told: {problem}", True
    return f"{notice.outcome}: the webhook was told", False


def _end(config: RunConfig, run_id: str, message: str) -> None:
    """A task that was killed could not say in MLflow that nothing runs any more."""
    from dpo_train.tracking import Tracking, patience

    with patience(), contextlib.suppress(DpoError):
        Tracking(config).end(run_id, "FAILED", message)


def look(config: RunConfig, kubeflow_run: str | None) -> tuple[Found | None, str | None]:
    """The pipeline's run in MLflow; None: it has none, or MLflow does not answer, which is said."""
    from dpo_train.tracking import Tracking, patience

    try:
        with patience():
            tracking = Tracking(config)
            run_id = tracking.find_child(None, "dpo.kubeflow_run", kubeflow_run) if kubeflow_run else None
            run_id = run_id or tracking.plugin_run()
            if run_id is None:
                return None, None
            with tracking.errors():
                run = tracking.client.get_run(run_id)
    except DpoError as away:
        return None, str(away)
    metrics = {key: value for key, value in run.data.metrics.items() if math.isfinite(value)}
    url = _page(tracking, run.info.experiment_id, run_id)
    is_running = str(run.info.status) == "RUNNING"
    return Found(run_id=run_id, url=url, is_running=is_running, tags=run.data.tags, metrics=metrics), None


def _page(tracking: Tracking, experiment: str, run_id: str) -> str | None:
    """The run's page, without the login that the server's address may hold."""
    parts = urlsplit(tracking.uri)
    if parts.scheme not in {"http", "https"}:
        return None
    place = urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path.rstrip("/"), "", ""))
    return f"{place}/#/experiments/{experiment}/runs/{run_id}"


def notice_of(
    name: str, state: str, found: Found | None, *, kubeflow_run: str | None = None, error: str | None = None
) -> Notice:
    """The outcome, in words. Pure.

    It is what the run itself has left in MLflow, unless Kubeflow says that it failed. A run that left none has failed,
    whatever Kubeflow says: no run that went through leaves none.

    Args:
        error: why it failed, by whom but MLflow it may be known.
    """
    tags = {} if found is None else found.tags
    outcome: Outcome = "failed"
    if state not in _BAD and (said := tags.get("dpo.outcome")) in get_args(Outcome):
        outcome, message = cast(Outcome, said), tags.get("dpo.why", "")
    elif state not in _BAD and (version := tags.get("dpo.version")):
        # The registration is told before what follows from it; MLflow may have gone in between.
        outcome, message = "registered", f"{version}; whether it was promoted is not known"
    else:
        unknown = f"it left no outcome, and Kubeflow says {state}; the log of its tasks says why"
        message = tags.get("dpo.error") or error or unknown
    return Notice(
        outcome=outcome,
        run_name=name,
        message=message[:MESSAGE_CHARACTERS],
        kubeflow_run=kubeflow_run,
        mlflow_run=None if found is None else found.run_id,
        mlflow_url=None if found is None else found.url,
        model_version=tags.get("dpo.version"),
        metrics={} if found is None else found.metrics,
    )


def payload(notice: Notice, form: Literal["json", "slack"]) -> dict[str, Any]:
    """What is posted."""
    if form == "json":
        return {"schema_version": SCHEMA_VERSION, **dataclasses.asdict(notice)}
    lines = [f"*dpo: {notice.outcome}* ({_slack(notice.run_name)})", _slack(notice.message)]
    names = [f"heldout/accuracy{end}" for end in ("", "_low", "_high")]
    if notice.metrics.keys() >= set(names):
        value, low, high = (notice.metrics[name] for name in names)
        lines.append(f"held-out accuracy {value:.3f} ({low:.3f} to {high:.3f})")
    places = [f"<{notice.mlflow_url}|MLflow run>" if notice.mlflow_url else None]
    places.append(f"Kubeflow run {notice.kubeflow_run}" if notice.kubeflow_run else None)
    lines.append(", ".join(place for place in places if place))
    return {"text": "\n".join(line for line in lines if line)}


def _slack(text: str) -> str:
    """Slack's three signs that mean something."""
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def post(
    url: str,
    content: Mapping[str, Any],
    *,
    pauses_seconds: Sequence[float] = PAUSES_SECONDS,
    request_seconds: float = REQUEST_SECONDS,
) -> str | None:
    """Sends JSON, again where that may help; what went wrong in the end, without the address, or None."""
    # httpx2 writes every request's address into the log.
    logging.getLogger("httpx2").setLevel(logging.WARNING)
    return asyncio.run(_post(url, json.dumps(content).encode(), pauses_seconds, request_seconds))


async def _post(url: str, body: bytes, pauses_seconds: Sequence[float], request_seconds: float) -> str | None:
    import httpx2

    async with httpx2.AsyncClient(timeout=None, follow_redirects=False) as http:
        for pause in (*pauses_seconds, None):
            problem, may_pass = await _attempt(http, url, body, request_seconds)
            if problem is None or not may_pass or pause is None:
                return problem
            await asyncio.sleep(pause)
    raise AssertionError("the last attempt returns")


async def _attempt(http: httpx2.AsyncClient, url: str, body: bytes, seconds: float) -> tuple[str | None, bool]:
    """What went wrong, and whether it may go well another time."""
    import httpx2

    headers = {"Content-Type": "application/json"}
    try:
        # A stream: what the answer says is of no interest, and might have no end.
        async with asyncio.timeout(seconds), http.stream("POST", url, content=body, headers=headers) as answer:
            status = answer.status_code
    except TimeoutError:
        return f"the webhook did not answer within {seconds:g} s", True
    except (httpx2.InvalidURL, httpx2.UnsupportedProtocol):
        return f"{URL_VARIABLE} holds no address of http:// or https://", False
    except httpx2.HTTPError as error:  # its words hold the address
        return f"the webhook cannot be reached ({type(error).__name__})", True
    if status < 300:
        return None, False
    return f"the webhook answers {status}", status >= 500 or status in _PASSING


def _last_error() -> str | None:
    """On a laptop the failed task's own words, from the command's events."""
    path = os.environ.get(ENVIRONMENT_KEY)
    errors = [event for event in Follower(Path(path)).new() if event["kind"] == "error"] if path else []
    return f"{errors[-1]['stage']}: {errors[-1]['message']}" if errors else None


def _show(problem: str, state: str) -> None:
    """On the terminal too; but after a task that was killed without a word, the last event must stay that task's."""
    if state in _GOOD or _last_error():
        Reporter.from_environment("notify").message(f"note: {problem}")
