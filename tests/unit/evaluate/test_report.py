"""The report: complete JSON, and a page that shows hostile text as text."""

from __future__ import annotations

import json
from html.parser import HTMLParser
from pathlib import Path

import numpy as np

from dpo_train.config import GateConfig
from dpo_train.evaluate.gate import judge
from dpo_train.evaluate.preference import measure
from dpo_train.evaluate.report import Report, Sample, write_report

HOSTILE = "<script>alert('x')</script> \u202e <img src=http://evil.example/x onerror=1> & \"quoted\""


class Tags(HTMLParser):
    """Collects tags and text."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data


def report() -> Report:
    generator = np.random.default_rng(0)
    reference = (generator.normal(size=50), generator.normal(size=50))
    policy = (reference[0] + 1, reference[1])
    preferences = measure(policy, reference, [str(i) for i in range(50)], beta=0.1, seed=0)
    return Report(
        beta=0.1,
        preferences=preferences,
        verdict=judge(preferences.accuracy, preferences.margin, GateConfig()),
        samples=[Sample(prompt=HOSTILE, reference=HOSTILE, policy="fine")],
        history=[
            {"step": 0, "loss": 0.69, "rewards/margin": 0.0, "rewards/chosen": 0.0, "rewards/rejected": 0.0},
            {
                "step": 1,
                "loss": 0.6,
                "rewards/margin": 0.1,
                "rewards/chosen": -0.1,
                "rewards/rejected": -0.2,
                "validation/loss": 0.65,
            },
        ],
        identity={"policy": "abc"},
    )


def test_json_holds_every_number_with_its_interval_and_n(tmp_path: Path) -> None:
    """A machine reads the schema version, estimates, verdict and samples."""
    write_report(report(), tmp_path)

    content = json.loads((tmp_path / "report.json").read_text())

    assert content["schema_version"] == 1
    assert content["estimates"]["heldout/accuracy"].keys() == {"value", "low", "high", "n"}
    assert content["estimates"]["heldout/margin"]["value"] == 0.1
    assert content["verdict"]["passed"] is True
    assert content["samples"][0]["prompt"] == HOSTILE


def test_page_is_self_contained_and_escapes_what_models_say(tmp_path: Path) -> None:
    """No script, no address but data:, and the hostile text to read as it is."""
    write_report(report(), tmp_path)

    page = Tags()
    page.feed((tmp_path / "report.html").read_text())

    assert "script" not in {tag for tag, _ in page.tags}
    sources = [value for _, attrs in page.tags for name, value in attrs.items() if name in {"src", "href"}]
    assert len(sources) == 2
    assert all(str(source).startswith("data:image/png;base64,") for source in sources)
    assert page.text.count(HOSTILE) == 2
    assert "Passed." in page.text
