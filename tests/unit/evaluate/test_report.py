"""The report: complete JSON, flat metrics, and a page that shows every number and hostile text as text."""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import TypeAdapter

from dpo_train.errors import StoreError
from dpo_train.evaluate.report import Report, Sample, _metric_name, metrics, to_dict, write_report
from dpo_train.evaluate.report_rows import number
from dpo_train.findings import Estimate, Findings, Verdict
from dpo_train.report_file import SCHEMA_VERSION, read_report
from tests.unit.data.test_prepare_report import Page
from tests.unit.evaluate.reports import HOSTILE, findings, report, set_findings, verdict

ESTIMATE = "high low n value"
PAIRED = "better difference p_value worse"
KEYS = {
    "": "findings identity samples schema_version verdict",
    "findings": "beta champion comparisons divergence heldout notes samples sets",
    "findings.champion": "digest name version",
    "findings.comparisons": "agreement first_wins judge losses opponent problem temperature ties unjudged "
    "win_rate wins",
    "findings.divergence": "kl per_token standard_error",
    "findings.heldout": (
        "accuracy by_length by_origin by_strength calibration_error champion chosen_reward drop is_trained_on "
        "length_bias likelihood margin name rejected_reward reliability"
    ),
    "findings.heldout.accuracy": ESTIMATE,
    "findings.heldout.by_length": "accuracy margin name",
    "findings.heldout.champion": PAIRED,
    "findings.heldout.length_bias": "chosen_longer chosen_shorter correlation data_prefers_longer prefers_longer",
    "findings.heldout.likelihood": PAIRED,
    "findings.heldout.reliability": "accuracy confidence high low n",
    "findings.samples": "distinct_1 distinct_2 empty length length_ratio model repetition temperature truncated",
    "samples": "answers notes prompt",
    "verdict": "learned passed rules",
    "verdict.rules": "found limit outcome reason rule",
}


def written(folder: Path, whole: Report) -> tuple[dict[str, Any], Page]:
    """Both files, read back; a bare NaN or Infinity in the JSON fails."""
    write_report(whole, folder)
    text = (folder / "report.json").read_text(encoding="utf-8")
    json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    return read_report(folder), Page((folder / "report.html").read_text(encoding="utf-8"))


def bare(value: float = 0.6) -> Report:
    """The least that an evaluation finds."""
    part = dataclasses.replace(
        set_findings("held-out pairs", value), champion=None, by_origin=(), by_length=(), by_strength=(), reliability=()
    )
    return report(
        findings=Findings(beta=0.1, heldout=part),
        samples=[],
        history=[],
        margins_P=np.empty(0),
        length_differences_P=np.empty(0),
        verdict=Verdict(learned=True, passed=True),
    )


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Page:
    """The page of the whole report."""
    return written(tmp_path_factory.mktemp("report"), report())[1]


def test_json_gives_the_findings_back(tmp_path: Path) -> None:
    """What is read is what was found, texts that UTF-8 cannot hold included."""
    whole = report()

    content, _ = written(tmp_path, whole)

    assert TypeAdapter(Findings).validate_python(content["findings"]) == whole.findings
    assert TypeAdapter(Verdict).validate_python(content["verdict"]) == whole.verdict
    assert content["samples"][1]["prompt"] == HOSTILE
    assert list(content["samples"][0]["answers"]) == ["chosen (data)", "reference", "policy", "champion"]
    assert content["identity"] == whole.identity


def test_keys_belong_to_the_schema_version() -> None:
    """Whoever changes a key has to change SCHEMA_VERSION, and this list with it."""

    def keys(path: str) -> str:
        node: Any = content
        for name in path.split(".") if path else ():
            node = node[name][0] if isinstance(node[name], list) else node[name]
        return " ".join(sorted(node))

    content = to_dict(report())

    assert SCHEMA_VERSION == 2
    assert {path: keys(path) for path in KEYS} == KEYS


def test_what_is_not_finite_is_null_in_json_and_a_dash_on_the_page(tmp_path: Path) -> None:
    """NaN is no JSON, and no metric."""
    lost = Estimate(value=math.nan, low=-math.inf, high=math.inf, n=300)
    part = dataclasses.replace(set_findings("held-out pairs", 0.6), margin=lost)
    whole = dataclasses.replace(findings(), heldout=part)

    content, page = written(
        tmp_path, report(findings=whole, margins_P=np.full(3, np.nan), length_differences_P=np.ones(3))
    )

    assert content["findings"]["heldout"]["margin"] == {"value": None, "low": None, "high": None, "n": 300}
    assert (
        "mean margin reward of the chosen answer minus that of the rejected one \N{EN DASH} \N{EN DASH} 300"
        in page.words
    )
    assert "heldout/margin" not in metrics(whole)
    assert not any("Histogram" in str(attrs.get("alt")) for _, attrs in page.tags)


def test_metrics_have_flat_names_with_bounds() -> None:
    """Records, MLflow and Kubeflow get the same names; samples and judge at the first temperature."""
    found = metrics(findings())

    assert (found["heldout/accuracy_low"], found["heldout/accuracy"]) == (0.59, 0.64)
    assert found["heldout/reward_chosen"] == -0.31
    assert found["heldout/champion_gain"] == 0.02
    assert found["set/helpful/accuracy"] == 0.66
    assert found["set/summaries/drop"] == -0.09
    assert "set/helpful/drop" not in found
    assert (found["samples/kl"], found["samples/kl_per_token"]) == (3.2, 0.041)
    assert found["samples/length_ratio"] == 1.19
    assert found["samples/reference/length"] == 81
    assert found["judge/reference/win_rate"] == 0.645
    assert found["judge/best of 4/unjudged"] == 2
    assert "judge/best of 4/win_rate" not in found  # no rule may rest on it, so neither may a chart
    assert all(re.fullmatch(r"[A-Za-z0-9_. :/-]{1,250}", name) for name in found)


@given(st.lists(st.text(max_size=80) | st.sampled_from(["a/b", "a b", "a.b", "..", ".", "", "a ", "ü"]), unique=True))
def test_names_become_safe_without_colliding(names: list[str]) -> None:
    """MLflow refuses most characters, and paths such as ``..``; two sets never share a metric."""
    safe = [_metric_name(name) for name in names]

    assert len(set(safe)) == len(names)
    assert all(re.fullmatch(r"[A-Za-z0-9_. :-]{1,60}", name) for name in safe)
    assert not any(name.startswith(".") for name in safe)
    # A name that looks like another's replacement is replaced itself.
    assert not {_metric_name(name) for name in safe if ":" in name} & set(safe)


def test_page_loads_nothing_and_runs_nothing(tmp_path: Path) -> None:
    """No script, no address but data:, and a policy that allows no more than that: its digest is the style's."""
    _, page = written(tmp_path, report())

    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    style = re.search("<style>(.*?)</style>", text, re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(style[1].encode()).digest()).decode() if style else ""
    policy = next(attrs["content"] for _, attrs in page.tags if "http-equiv" in attrs)
    assert {tag for tag, _ in page.tags} & {"script", "link", "iframe", "object", "a", "form"} == set()
    assert not [name for _, attrs in page.tags for name in attrs if name.startswith("on") or name in {"style", "href"}]
    sources = [str(attrs["src"]) for _, attrs in page.tags if "src" in attrs]
    assert len(sources) == 4
    assert all(source.startswith("data:image/png;base64,") for source in sources)
    assert all(attrs["alt"] for tag, attrs in page.tags if tag == "img")
    assert (
        str(policy).split()
        == (
            f"default-src 'none'; img-src data:; style-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'"
        ).split()
    )


def test_hostile_text_is_text(tmp_path: Path) -> None:
    """Markup is escaped, what cannot be seen is named, long text is cut and says so; names and notes too."""
    lean = bare()
    named = dataclasses.replace(lean.findings, notes=(HOSTILE[:200],), sets=(set_findings(HOSTILE, 0.6),) * 2)
    hostile = {"findings": named, "samples": report().samples, "identity": {HOSTILE: HOSTILE[:200]}}

    _, page = written(tmp_path, dataclasses.replace(lean, **hostile))

    # A note, rows and folded numbers of two sets, a prompt, an answer, both sides of the identity.
    assert page.words.count("</pre></style><script>document.title = 'ran'; alert('x')</script> [U+202E]") == 9
    assert "[U+0000][U+001B][31m [U+200B][U+FEFF] [U+D800]" in page.words
    assert page.words.count("Cut here: 4,000 of 100,15") == 2
    assert "{{ 1 + 1 }}" in page.words
    assert [char for char in page.text if 0xD800 <= ord(char) <= 0xDFFF or char in "\0\x1b\u200b\u202e\ufeff"] == []
    assert all(attrs["dir"] == "auto" for tag, attrs in page.tags if tag == "pre")


def test_every_number_stands_with_its_interval_and_n(page: Page) -> None:
    """Of the pairs, the sets, the samples, the comparisons and the rules."""
    for expected in (
        "accuracy ✓ passed 0.640 0.590 to 0.690 300 above 0.5",
        "the whole interval lies above the limit ✗ failed 3.200 2.800 to 3.600 64 below 2.5",
        "there is no champion \N{EN DASH} does not apply nothing to judge by above 0.5",
        "only the policy is right on 22 pairs, only the champion on 16; p = 0.210 0.020 -0.010 to 0.050 300",
        "summaries outside the training distribution 0.550 0.500 to 0.600 300 -0.090 (-0.160 to -0.020, n = 300)",
        "chat $x^$ logs 0.600 0.510 to 0.690 75 0.150 (0.090 to 0.210, n = 75)",
        "accuracy where the chosen answer is shorter not to be told from these pairs",
        "standard error 0.200; 0.041 nats per token 3.200 2.800 to 3.600 64",
        "policy, temperature 1 1.190 1.090 to 1.290 64",
        "policy, temperature 0.7 0.410 \N{EN DASH} 64",
        "takes the answer it sees first: 0.540 (0.480 to 0.600, n = 120)",
        "policy won against reference; 19 tokens Give it a bright sill",
        "What could not be measured The endpoint reports no token counts",
        "version 3 of the registry (digest 9f2c44aa01b7)",
    ):
        assert expected in page.words


def test_a_problem_stands_where_the_win_rate_would(page: Page) -> None:
    """No one reads a number that no rule may rest on."""
    start = page.words.index("against best of 4 of the reference")
    row = page.words[start : page.words.index("against the champion", start)]
    assert "No rule rests on this comparison: the judge takes the first answer in 97 % of the cases" in row
    assert "0.390 to 0.610" not in row


@pytest.mark.parametrize(
    ("said", "verdict_found"),
    [
        ("Passed. Every rule that applies holds", verdict("passed")),
        ("Refused by the gate. The policy learned, but not every rule holds: 1 rule failed.", verdict("failed")),
        ("Refused by the gate. The policy learned, but not every rule holds: 1 rule undecided.", verdict("undecided")),
        ("Not learned. On held-out pairs the policy is not better", Verdict(learned=False, passed=False)),
    ],
)
def test_verdict_comes_first(said: str, verdict_found: Verdict, tmp_path: Path) -> None:
    """In words, with what follows from it."""
    _, page = written(tmp_path, dataclasses.replace(bare(), verdict=verdict_found))

    assert page.words.index(said) < page.words.index("The gate, rule by rule")


def test_what_was_not_measured_is_said(tmp_path: Path) -> None:
    """Without champion, samples, judge, other sets and history, the page says so instead of leaving gaps."""
    _, page = written(tmp_path, bare())

    for expected in (
        "there was none to compare with",
        "There is one set only",
        "No held-out set lies outside the training distribution",
        "was not measured",
        "No answers were sampled",
        "No judge compared the answers",
        "No samples were asked for",
    ):
        assert expected in page.words
    assert "Training" not in page.words.replace("Training distribution", "")


def test_interval_is_drawn_to_scale(tmp_path: Path) -> None:
    """0.6 (0.55 to 0.65) on a scale of 0 to 1: from 55 to 65 of 100, the line of chance at 50."""
    written(tmp_path, bare(0.6))

    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    drawn = text[text.index('aria-label="0.600, 95 % interval 0.550 to 0.650"') :]
    drawn = drawn[: drawn.index("</svg>")]
    assert 'class="at" x1="50.0"' in drawn
    assert re.search(r'class="range" y="3" height="6" x="55.0"\s+width="10.0"', drawn)


def test_many_long_samples_stay_small(tmp_path: Path) -> None:
    """200 prompts with three answers of 100,000 characters: 4,000 of each are shown, and all but 20 are folded away."""
    long = Sample(prompt="p " * 50_000, answers=dict.fromkeys(("reference", "policy", "champion"), "a<" * 50_000))

    write_report(dataclasses.replace(bare(), samples=[long] * 200), tmp_path)

    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert len(text) < 10e6
    assert text.index("<summary>180 more</summary>") > text.index("Prompt 20<")
    assert text.count("<article>") == 200


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (None, "\N{EN DASH}"),
        (0.0, "0.000"),
        (0.61249, "0.612"),
        (-0.00042, "-0.0004"),
        (182.34, "182.3"),
        (12345.6, "12,346"),
        (7, "7"),
    ],
)
def test_numbers_read_well(value: float | None, shown: str) -> None:
    """Three decimals, fewer of large numbers, one digit of tiny ones."""
    assert number(value) == shown


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot be read: No such file"),
        (b"{", "is damaged"),
        (b"\xff\xfe", "is damaged"),
        (b"[]", "another schema version. Got: none. Expected: 2"),
        (b'{"schema_version": 1}', "another schema version. Got: 1. Expected: 2"),
        (b'{"schema_version": 2, "findings": {}, "samples": []}', "it lacks identity, verdict"),
    ],
)
def test_report_that_cannot_be_trusted_is_refused(content: bytes | None, message: str, tmp_path: Path) -> None:
    """Missing, damaged or of another version: one line that says what to do, never half a report."""
    if content is not None:
        (tmp_path / "report.json").write_bytes(content)

    with pytest.raises(StoreError, match=re.escape(message)) as refused:
        read_report(tmp_path)

    assert "What to do: evaluate the policy again" in str(refused.value)
