"""The frontier's page in a real browser: it fits, loads nothing, answers to pointer, keys and filters."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from dpo_train.evaluate.frontier import FRONTIER_HTML, write_frontier
from dpo_train.evaluate.trials import select
from tests.browser.test_report import DESKTOP, PHONE, Opened
from tests.unit.evaluate.sweeps import CONFIG, sweep, trial

LIT = "[...document.querySelectorAll('tr.on th')].map(e => e.innerText)"
VISIBLE = "[...document.querySelectorAll('{}')].filter(e => getComputedStyle(e).display !== 'none')"
SHOWN = f"{VISIBLE.format('tbody tr')}.map(e => e.querySelector('th').innerText)"
DETAIL = f"{VISIBLE.format('.detail')}.map(e => e.innerText)"


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Every kind of trial, one of them with a hostile name."""
    folder = tmp_path_factory.mktemp("frontier")
    evil = trial(0.3, 55, 0.9, parameters={"loss": "</svg><script>document.title = 'ran'</script>" + "w" * 500})
    trials = [*sweep(), evil]
    write_frontier(trials, select(trials, CONFIG), CONFIG, folder)
    return (folder / FRONTIER_HTML).as_uri()


@pytest.fixture(params=[PHONE, DESKTOP])
def opened(browser: Any, address: str, request: pytest.FixtureRequest) -> Iterator[Opened]:
    """The page on a phone and on a desktop, without a network."""
    context = browser.new_context(viewport={"width": request.param, "height": 800}, offline=True)
    found = Opened(page=context.new_page())
    found.page.on("request", lambda sent: found.requests.append(sent.url))
    found.page.on("console", lambda message: found.said.append(message.text))
    found.page.on("pageerror", lambda error: found.said.append(str(error)))
    found.page.goto(address, wait_until="load")
    yield found
    context.close()


def test_page_loads_without_a_request_or_a_complaint(opened: Opened, address: str) -> None:
    """Its own script runs, the hostile name's does not, and the content policy finds nothing to refuse."""
    assert opened.requests == [address]
    assert opened.said == []
    assert opened.page.title() == "Sweep: beta=0.05 chosen"
    assert opened.page.evaluate("document.scripts.length") == 1
    assert opened.page.locator(".filters").is_visible()


def test_page_fits_its_window_and_can_be_read(opened: Opened) -> None:
    """Nothing reaches out to the right; the charts' letters are at least 11 pixels high on the screen."""
    width = opened.page.viewport_size["width"]

    assert opened.page.evaluate("document.documentElement.scrollWidth") <= width
    reaching = "[...document.querySelectorAll('body *')].filter(e => e.getBoundingClientRect().right > innerWidth + 1)"
    assert opened.page.evaluate(f"{reaching}.map(e => e.outerHTML.slice(0, 80))") == []
    scale = "(s => s.getBoundingClientRect().width / s.viewBox.baseVal.width)(document.querySelector('.chart'))"
    assert 13 * opened.page.evaluate(scale) >= 11


def test_pointing_at_a_mark_lights_up_its_rows_and_shows_its_numbers(opened: Opened) -> None:
    """At first the chosen setting's; then those of beta 0.1, both seeds."""
    assert opened.page.evaluate(LIT) == ["beta=0.05", "beta=0.05, seed=1"]

    opened.page.locator(".mark[aria-label^='beta=0.1:'] .shape").hover()

    assert opened.page.evaluate(LIT) == ["beta=0.1", "beta=0.1, seed=1"]
    (detail,) = opened.page.evaluate(DETAIL)
    assert "0.810" in detail
    assert "2 seeds" in detail
    assert "below the best" in detail


def test_keys_reach_every_mark(opened: Opened) -> None:
    """Focus does what the pointer does."""
    opened.page.locator(".mark[aria-label^='beta=0.5:']").focus()

    assert opened.page.evaluate(LIT) == ["beta=0.5"]


def test_row_lights_up_its_mark(opened: Opened) -> None:
    """The other way round."""
    opened.page.locator("tbody tr", has_text="over the budget of 12").hover()

    lit = "[...document.querySelectorAll('.mark.on')].map(e => e.getAttribute('aria-label').split(':')[0])"
    assert opened.page.evaluate(lit) == ["beta=0.01"]


def test_filters_hide_what_was_not_asked_for(opened: Opened) -> None:
    """By a parameter, then by how trials ended, then nothing."""
    everything = opened.page.evaluate(SHOWN)
    beta, ended = opened.page.locator("select").first, opened.page.locator("select").last

    beta.select_option(label="0.1")
    assert opened.page.evaluate(SHOWN) == ["beta=0.1", "beta=0.1, seed=1"]
    assert opened.page.evaluate(f"{VISIBLE.format('.mark')}.length") == 1

    beta.select_option(label="all")
    ended.select_option(label="failed")
    assert opened.page.evaluate(SHOWN) == ["beta=0.005"]

    ended.select_option(label="all")
    assert opened.page.evaluate(SHOWN) == everything


def test_without_scripts_everything_is_there_to_read(browser: Any, address: str) -> None:
    """Viewers that run none show the charts, the chosen setting's numbers and the table; no dead filters."""
    context = browser.new_context(java_script_enabled=False)
    page = context.new_page()
    page.goto(address)

    assert page.locator(".mark").count() == 7
    assert page.locator("tbody tr").count() == 11
    assert page.locator(".detail.on").is_visible()
    assert not page.locator(".filters").is_visible()
    context.close()


def test_dark_mode_is_dark(browser: Any, address: str) -> None:
    """The charts' letters too."""
    page = browser.new_page(color_scheme="dark")
    page.goto(address)

    letters = page.evaluate("getComputedStyle(document.querySelector('.chart text')).fill")
    ground = page.evaluate("getComputedStyle(document.body).backgroundColor")
    page.close()

    bright, dark = (
        [int(part) for part in color.removeprefix("rgb(").rstrip(")").split(",")] for color in (letters, ground)
    )
    assert min(bright) > 150
    assert max(dark) < 50
