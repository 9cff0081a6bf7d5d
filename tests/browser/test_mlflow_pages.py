"""MLflow's own pages over a pipeline with a sweep: what people see of our runs, without our code at hand.

With DPO_PICTURES=FOLDER the pages are saved there too.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("mlflow")

from dpo_train import launch
from dpo_train.tracking import Tracking
from tests.mlflow.server import serving
from tests.tiny import tiny_config

pytestmark = pytest.mark.slow

BETAS = (0.05, 0.1, 0.3, 1.0)
SECONDS = 60


@dataclass(frozen=True)
class Site:
    """The server, and by name the ids of the runs that it shows."""

    url: str
    experiment: str
    runs: dict[str, str]
    stages = ("prepare", "sft", "score_reference", "sweep", "train", "evaluate", "register")

    def run(self, name: str, page: str = "") -> str:
        return f"{self.url}/#/experiments/{self.experiment}/runs/{self.runs[name]}{page}"


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    """A whole run of the tiny model, told to a real server."""
    folder = tmp_path_factory.mktemp("pages")
    with serving(folder) as url:
        config = tiny_config(
            folder,
            tracking__uri=url,
            tracking__experiment="support chats",
            sweep__betas=BETAS,
            sweep__num_prompts=4,
            register__model_name="tiny-policy",
        )
        launch.run(config)
        tracking = Tracking(config)
        experiment = tracking.experiment_id()
        runs = {run.info.run_name: run.info.run_id for run in tracking.client.search_runs([experiment])}
        yield Site(url=url, experiment=experiment, runs=runs)


@pytest.fixture
def page(browser: Any, site: Site) -> Iterator[Any]:
    """A browser that is asked about nothing: MLflow's assistant is closed, its menu is that of trainings."""
    context = browser.new_context(viewport={"width": 1200, "height": 750})
    context.set_default_timeout(1000 * SECONDS)
    page = context.new_page()
    page.goto(f"{site.url}/#/experiments/{site.experiment}/runs", wait_until="domcontentloaded")
    page.get_by_text("Model training").first.click()
    page.get_by_role("button", name="Close").first.click()
    yield page
    context.close()


def opened(page: Any, address: str, *texts: str) -> str:
    """The page's visible text, once these texts are in it."""
    page.goto(address, wait_until="domcontentloaded")
    for _ in range(SECONDS * 2):
        body = str(page.inner_text("body")).replace("\xa0", " ")
        if all(text in body for text in texts):
            return body
        page.wait_for_timeout(500)  # the page has no event for "nothing more will come"
    raise AssertionError(f"not on the page: {[text for text in texts if text not in body]}\n{body}")


def picture(page: Any, name: str) -> None:
    if folder := os.environ.get("DPO_PICTURES"):
        page.screenshot(path=str(Path(folder) / f"{name}.png"))


def test_pipeline_page_says_what_it_is_and_what_it_found(page: Any, site: Site) -> None:
    """Stages as children, data with its digest, tags, units in the description, the main numbers."""
    text = opened(page, site.run("store"), "heldout/accuracy", "samples/kl", "chosen/beta", "pairs.jsonl", *site.stages)

    assert "held-out pairs whose chosen answer gets the larger reward (chance: 0.5)\tshare" in text
    assert "nats per answer" in text
    for tag in ("dpo.code_version", "dpo.seed", "dpo.reference", "dpo.version.torch"):
        assert tag in text
    assert "tiny-policy/1" in text


def test_list_of_runs_opens_into_stages_and_trials(page: Any, site: Site) -> None:
    """The tree: pipeline, stages, and under the sweep its trials."""
    page.goto(f"{site.url}/#/experiments/{site.experiment}/runs", wait_until="domcontentloaded")
    for name in ("store", "sweep"):
        row = page.locator(".ag-row", has=page.get_by_text(name, exact=True)).first
        row.get_by_role("button").first.click()
    for name in ("train", "evaluate", *(f"beta={beta:g}" for beta in BETAS)):
        page.get_by_text(name, exact=True).first.wait_for()
    picture(page, "mlflow-runs")


def test_metrics_of_a_training_stand_in_groups(page: Any, site: Site) -> None:
    """By what comes before the last slash."""
    opened(page, site.run("train", "/model-metrics"), "rewards", "logps", "drift", "validation/rewards", "rejected")
    picture(page, "mlflow-training")


def test_machine_has_a_page_of_its_own(page: Any, site: Site) -> None:
    """With units in the names."""
    opened(page, site.run("train", "/system-metrics"), "cpu_utilization_percentage", "system_memory_usage_megabytes")


def test_trials_are_compared_by_beta(page: Any, site: Site) -> None:
    """Parallel coordinates from what was tried to what came of it."""
    trials = ",".join(f"%22{site.runs[f'beta={beta:g}']}%22" for beta in BETAS)
    address = f"{site.url}/#/compare-runs?runs=[{trials}]&experiments=[%22{site.experiment}%22]"
    text = opened(page, address, "Parallel Coordinates Plot", "train.beta", "rewards/margin", "samples/kl")
    assert all(f"beta={beta:g}" in text for beta in BETAS)
    metrics = page.get_by_role("combobox").nth(1)
    for name in ("validation/margin", "samples/kl"):
        metrics.click()
        metrics.type(name)
        page.keyboard.press("Enter")
    page.keyboard.press("Escape")
    page.locator("svg text", has_text="samples/kl").first.wait_for()
    picture(page, "mlflow-trials")


def test_frontier_is_seen_beside_the_sweep(page: Any, site: Site) -> None:
    """The picture itself, not its name alone."""
    page.goto(site.run("sweep", "/artifacts/frontier.png"), wait_until="domcontentloaded")
    page.get_by_text("trials.json", exact=True).first.wait_for()
    page.wait_for_function("[...document.images].some(image => image.naturalWidth > 500)")
    picture(page, "mlflow-frontier")


def test_version_page_says_how_good_the_model_is(page: Any, site: Site) -> None:
    """Accuracy with its interval, alias, and the stage that registered it."""
    text = opened(page, f"{site.url}/#/models/tiny-policy/versions/1", "register", "@ challenger", "dpo.beta")
    assert re.search(r"held-out accuracy \d\.\d{3} \(\d\.\d{3} to \d\.\d{3}, n = \d+\)", text)
    assert "dpo.accuracy_low" in text
