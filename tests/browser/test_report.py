"""The report in a real browser: it fits, loads nothing, and text from data and models stays text."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest

from dpo_train.evaluate.report import write_report
from tests.unit.evaluate.reports import report

PHONE, DESKTOP = 390, 1280


@dataclass
class Opened:
    """A page and all that happened on it."""

    page: Any
    requests: list[str] = field(default_factory=list)
    said: list[str] = field(default_factory=list)


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The whole report, hostile text and all."""
    folder = tmp_path_factory.mktemp("report")
    write_report(report(), folder)
    return (folder / "report.html").as_uri()


@pytest.fixture(params=[PHONE, DESKTOP])
def opened(browser: Any, address: str, request: pytest.FixtureRequest) -> Iterator[Opened]:
    """The report on a phone and on a desktop, without a network; every fold open."""
    context = browser.new_context(viewport={"width": request.param, "height": 800}, offline=True)
    found = Opened(page=context.new_page())
    found.page.on("request", lambda sent: found.requests.append(sent.url))
    found.page.on("console", lambda message: found.said.append(message.text))
    found.page.on("pageerror", lambda error: found.said.append(str(error)))
    found.page.on("dialog", lambda dialog: (found.said.append(dialog.message), dialog.dismiss()))
    found.page.goto(address, wait_until="load")
    found.page.evaluate("document.querySelectorAll('details').forEach(fold => fold.open = true)")
    yield found
    context.close()


def test_page_loads_without_a_request_a_script_or_a_complaint(opened: Opened, address: str) -> None:
    """Nothing but the file and its own images; the content policy finds nothing to refuse."""
    assert [url for url in opened.requests if url != address and not url.startswith("data:image/png;")] == []
    assert opened.said == []
    assert opened.page.title() == "Evaluation: Refused by the gate."
    assert opened.page.evaluate("document.scripts.length") == 0
    assert opened.page.evaluate("[...document.images].every(image => image.naturalWidth > 100 && image.alt)")


def test_page_fits_its_window(opened: Opened) -> None:
    """Nothing scrolls sideways, with 100,000 characters without a space in it; nor does any table reach out."""
    width = opened.page.viewport_size["width"]

    assert opened.page.evaluate("document.documentElement.scrollWidth") <= width
    reaching = (
        "[...document.querySelectorAll('body *')].filter(e => e.getBoundingClientRect().right > innerWidth + 0.5)"
    )
    assert opened.page.evaluate(f"{reaching}.map(e => e.outerHTML.slice(0, 80))") == []


def test_style_is_in_force_and_letters_can_be_read(opened: Opened) -> None:
    """The policy lets the page's own style through; no text is smaller than 12 pixels."""
    of_box = "getComputedStyle(document.querySelector('.box')).borderLeftWidth"
    smallest = (
        "Math.min(...[...document.querySelectorAll('body *')].map(e => parseFloat(getComputedStyle(e).fontSize)))"
    )

    assert float(opened.page.evaluate(of_box).removesuffix("px")) > 4
    assert opened.page.evaluate(smallest) >= 12


def test_hostile_text_is_visible_as_text(opened: Opened) -> None:
    """A script is read, not run; what reverses or hides text is named."""
    text = opened.page.inner_text("article:nth-of-type(2)")

    assert "</pre></style><script>document.title = 'ran'; alert('x')</script>" in text
    assert "<img src=http://evil.example/x onerror=1>" in text
    assert "[U+202E]" in text
    assert "[U+0000][U+001B][31m" in text
    assert "{{ 1 + 1 }}" in text
    assert "Cut here: 4,000 of" in text


def test_dark_mode_is_dark(browser: Any, address: str) -> None:
    """Light letters on a dark ground, where the reader's system asks for it."""
    page = browser.new_page(color_scheme="dark")
    page.goto(address)

    colors = page.evaluate("(s => [s.color, s.backgroundColor])(getComputedStyle(document.body))")
    page.close()

    letters, ground = ([int(part) for part in color.removeprefix("rgb(").rstrip(")").split(",")] for color in colors)
    assert min(letters) > 200
    assert max(ground) < 50
