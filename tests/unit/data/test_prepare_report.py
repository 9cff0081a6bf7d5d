"""The report of the data: numbers worked by hand, warnings in words, and a page that shows hostile text as text."""

from __future__ import annotations

import json
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from dpo_train.data import report as module
from dpo_train.data.profile import Profile, merge
from dpo_train.data.report import row_fill, to_dict, warnings, write_report
from tests.unit.data.test_profile import ROWS, SECRET, kept, profile_of, rejected, secret_rows

HOSTILE = (
    "</pre></div><script>alert('x')</script> \u202e <img src=http://evil.example/x onerror=1> & \"quoted\" {{ 1 + 1 }} "
    "\x00\x1b[31m \ufeff" + "w" * 5000
)
# Those of our page's tags that nothing closes.
VOID = {"meta", "img"}


class Page(HTMLParser):
    """Collects tags and text, and fails where tags are not nested properly."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self._open: list[str] = []
        self.feed(text)
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self._open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag
        self.text += " " if tag in {"td", "th", "p", "summary"} else ""

    def handle_data(self, data: str) -> None:
        if self._open and self._open[-1] != "style":
            self.text += data

    @property
    def words(self) -> str:
        """The text with any run of white space as one space."""
        return " ".join(self.text.split())


def written(profile: Profile, folder: Path, **options: Any) -> tuple[dict[str, Any], Page]:
    """Both files, read back."""
    write_report(profile, folder, **options)
    page = Page((folder / "report.html").read_text(encoding="utf-8"))
    return json.loads((folder / "report.json").read_text(encoding="utf-8")), page


def content_of(profile: Profile) -> dict[str, Any]:
    """What a machine reads."""
    return to_dict(profile, title="data", reasons={})


def test_json_adds_up(tmp_path: Path) -> None:
    """records = used + rejected, candidate pairs = kept + rejected, and each count by hand."""
    content, page = written(profile_of(ROWS), tmp_path, reasons={"tie": "both are equally good"})

    assert content["schema"] == 1
    assert content["records"] == {"total": 6, "used": 4, "rejected": 2}
    assert content["pairs"] == {"candidates": 9, "kept": 5, "rejected": 4}
    assert content["splits"] == {"train": 3, "validation": 1, "heldout": 1}
    assert content["reasons"][0] == {"reason": "tie", "meaning": "both are equally good", "pairs": 2, "share": 2 / 9}
    assert [row["reason"] for row in content["reasons"]] == ["tie", "empty_answer", "undecodable"]
    assert [(row["label"], row["kept"], row["rejected"]) for row in content["sources"]] == [("a", 4, 3), ("b", 1, 1)]
    assert content["sources"][0]["reasons"] == {"tie": 2, "empty_answer": 1}
    assert "reason pairs of all what it means a b tie 2 22.2 % both are equally good 2 0" in page.words
    assert content["truncated"]["any"] == {"pairs": 2, "share": 0.4}
    assert content["warnings"] == warnings(profile_of(ROWS))


def test_lengths_have_mean_quantiles_and_bins() -> None:
    """Of 1 to 100 tokens, half are at most 50, 90 % at most 90; the bins are two tokens wide, since 60 must do."""
    lengths = content_of(profile_of([kept(i, (i, 1, 1)) for i in range(1, 101)]))["lengths"]["prompt"]

    assert lengths["mean"] == 50.5
    assert [lengths[name] for name in ("min", "median", "p90", "p99", "max")] == [1, 50, 90, 99, 100]
    assert lengths["histogram"]["edges"][:3] == [0, 2, 4]
    assert lengths["histogram"]["counts"] == [1, *[2] * 49, 1]


def test_bins_hold_every_value_once_and_break_at_zero() -> None:
    """A wide range of differences: the counts add up, and no bin holds both longer and shorter chosen answers."""
    bins = content_of(profile_of([kept(i, (1, 1 + i, 301) if i else (1, 700, 1)) for i in range(500)]))["difference"]

    assert sum(bins["histogram"]["counts"]) == 500
    assert 0 in bins["histogram"]["edges"]
    assert len(bins["histogram"]["counts"]) <= 61


def test_scores_stay_in_the_bin_that_starts_with_them() -> None:
    """0.3 / 0.1 is 2.9999999999999996 in floating point, and still 0.3 belongs to the bin from 0.3."""
    rows = [kept(i, strength=value / 10) for i, value in enumerate(range(61))]
    bins = content_of(profile_of(rows))["strength"]["histogram"]

    assert bins["counts"] == [1] * 61
    assert bins["edges"][3] == 0.3


def test_one_value_alone_has_a_bin_that_can_be_seen() -> None:
    """All strengths equal: a bin 0.02 wide around 0.75, not one of no width; 5,000 has one of 100."""
    assert content_of(profile_of([kept(1, strength=0.75)]))["strength"]["histogram"] == {
        "edges": [0.74, 0.76],
        "counts": [1],
    }
    assert content_of(profile_of([kept(1, strength=5000.0)]))["strength"]["histogram"]["edges"] == [5000, 5100]


def test_length_bias_leaves_ties_apart() -> None:
    """Chosen longer in 3 of 4, 2 equal. Wilson for 3 of 4: (0.75 + 0.4802 -+ 0.6365) / 1.9604, so 0.3006 to 0.9544."""
    rows = [kept(i, (5, chosen, 3)) for i, chosen in enumerate([4, 5, 9, 1, 3, 3])]
    found = content_of(profile_of(rows))["difference"]

    assert (found["chosen_longer"], found["rejected_longer"], found["equal"]) == (3, 1, 2)
    share = found["share_chosen_longer"]
    assert (share["value"], share["n"]) == (0.75, 4)
    assert share["low"] == pytest.approx(0.3006, abs=1e-4)
    assert share["high"] == pytest.approx(0.9544, abs=1e-4)
    assert found["mean"] == pytest.approx(7 / 6)


def test_pairs_of_one_prompt_do_not_narrow_the_interval() -> None:
    """Ten pairs of one prompt are one observation, not ten."""
    apart = content_of(profile_of([kept(i) for i in range(10)]))["difference"]["share_chosen_longer"]
    together = content_of(profile_of([kept(i, prompt_hash=0) for i in range(10)]))["difference"]["share_chosen_longer"]

    # Wilson for n of n is n / (n + 3.8415) at its lower end.
    assert apart["low"] == pytest.approx(10 / 13.8415, rel=1e-4)
    assert together["low"] == pytest.approx(1 / 4.8415, rel=1e-4)
    assert apart["n"] == together["n"] == 10


def test_tokens_of_an_epoch_with_the_prompt_once_and_twice() -> None:
    """ROWS train on 10 + 11 + 10 tokens with prompts of 5, 7 and 7: 31 against 50, 38 % saved."""
    training = content_of(profile_of(ROWS))["training"]

    assert (training["pairs"], training["tokens_prompt_once"], training["tokens_prompt_twice"]) == (3, 31, 50)
    assert training["saving"] == pytest.approx(0.38)


def test_row_fill_by_hand() -> None:
    """128 pairs of 300 tokens are two batches of 64: rows of 1,024 hold 3 each, so 22 rows, 19,200 of 22,528 tokens."""
    found = row_fill(profile_of([kept(i, (100, 100, 100)) for i in range(128)]))
    first, second = found["by_row_tokens"][:2]

    assert (found["sampled_pairs"], first["row_tokens"], first["rows_per_batch"]) == (128, 1024, 22)
    assert first["fill"] == pytest.approx(19_200 / 22_528)
    assert second["fill"] == pytest.approx(19_200 / (11 * 2048))  # six to a row: ten full ones and one with four
    assert first["share_too_long"] == 0


def test_a_pair_longer_than_a_row_fills_one_of_its_own() -> None:
    """1,200 tokens do not fit into 1,024: the row is as long as the pair, and the share is told."""
    first, second = row_fill(profile_of([kept(0, (1000, 100, 100))]))["by_row_tokens"][:2]

    assert (first["fill"], first["share_too_long"]) == (1, 1)
    assert (second["fill"], second["share_too_long"]) == (pytest.approx(1200 / 2048), 0)


def test_row_fill_of_many_pairs_is_a_seeded_sample(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same each time, near that of all pairs, and of no more pairs than asked for."""
    profile = profile_of([kept(i, (100 + i % 50, 50, 50)) for i in range(600)])
    whole = row_fill(profile)["by_row_tokens"][0]["fill"]
    monkeypatch.setattr(module, "SAMPLED_PAIRS", 256)
    sample = row_fill(profile)

    assert sample == row_fill(profile)
    assert sample["sampled_pairs"] == 256
    assert sample["by_row_tokens"][0]["fill"] == pytest.approx(whole, rel=0.05)


def test_only_the_commonest_origins_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two of three, and the rest summed up."""
    monkeypatch.setattr(module, "TOP_ORIGINS", 2)
    names = ["blog"] * 3 + ["news"] * 2 + ["rare"]
    rows = [*(kept(i, origin=name) for i, name in enumerate(names)), rejected(9, origin="rare")]
    origins = content_of(profile_of([*rows, kept(10, origin="blog")]))["origins"]

    assert origins["top"][0] == {"origin": "blog", "kept": 4, "rejected": 0}
    assert origins["top"][1]["kept"] + origins["other"]["kept"] == 3
    assert origins["top"][1]["rejected"] + origins["other"]["rejected"] == 1
    assert (origins["named"], origins["complete"]) == (3, True)


def fine(n: int = 1000) -> list[dict[str, Any]]:
    """Rows with which nothing is wrong: a tenth held out, lengths and sources balanced."""
    return [
        kept(i, (5, 2 + i % 2, 3 - i % 2), split="heldout" if i % 10 == 0 else "train", dataset=i // 2 % 2)
        for i in range(n)
    ]


def test_nothing_is_said_about_data_that_are_fine(tmp_path: Path) -> None:
    """No warning, and the page says so."""
    assert warnings(profile_of(fine())) == []
    assert "Nothing stands out." in written(profile_of(fine()), tmp_path)[1].text


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ([*fine(), *(rejected(i, "tie") for i in range(53))], "5.0 % of the candidate pairs were rejected (53"),
        ([*fine(), *(rejected(i, "tie") for i in range(53))], "most often because of tie (53)"),
        ([{**row, "chosen_ids": [1] * 9} for row in fine()], "longer one in 100.0 % of the pairs"),
        ([{**row, "truncated_prompt": i < 101} for i, row in enumerate(fine())], "10.1 % of the kept pairs the prompt"),
        (fine(900), "Only 90 held-out pairs"),
        ([{**row, "split": "train"} for row in fine()], "No pair is held out"),
        ([{**row, "split": "heldout"} for row in fine()], "No pair is in the training split"),
        ([{**row, "dataset": int(i < 95)} for i, row in enumerate(fine())], "90.5 % of the kept pairs come from one"),
        ([{**row, "dataset": 1} for row in fine()], "No pair of the source a was kept"),
        ([rejected(1)], "No pair is left"),
        ([], "No pair is left"),
    ],
)  # fmt: skip
def test_what_is_off_is_said_in_words(rows: list[dict[str, Any]], words: str) -> None:
    """Each warning just beyond its threshold."""
    assert words in " ".join(warnings(profile_of(rows)))


@pytest.mark.parametrize(
    "rows",
    [
        [*fine(950), *(rejected(i, "tie") for i in range(50)), *(kept(i, split="heldout") for i in range(2000, 2010))],
        [*fine(), *(rejected(i, reason) for i in range(300) for reason in ("over_limit", "below_min_strength"))],
        [{**row, "truncated_prompt": i < 100} for i, row in enumerate(fine())],
        [{**row, "dataset": int(i < 100)} for i, row in enumerate(fine())],
    ],
)  # fmt: skip
def test_thresholds_are_not_met_by_a_little_less(rows: list[dict[str, Any]]) -> None:
    """Just within a threshold, or left out because the user asked for it, is no finding."""
    assert warnings(profile_of(rows)) == []


def test_few_pairs_are_no_length_bias() -> None:
    """The chosen answer longer in 3 of 4 may be chance."""
    rows = [kept(i, (5, chosen, 3)) for i, chosen in enumerate([4, 5, 9, 1])]
    assert not any("longer" in text for text in warnings(profile_of(rows)))


def test_one_source_alone_dominates_nothing() -> None:
    """Where there is only one, all pairs come from it."""
    rows = [{**row, "dataset": 0} for row in fine()]
    assert warnings(profile_of(rows, sources=("a",))) == []


def test_page_says_the_numbers_in_plain_words(tmp_path: Path) -> None:
    """Thousands apart, each reason with its meaning, the saving and the examples."""
    rows = [*(kept(i, (700, 200, 100), strength=1.5) for i in range(1234)), rejected(5, "tie"), rejected(6, "tie")]
    _, page = written(profile_of(rows), tmp_path, title="Our data", reasons={"tie": "both are equally good"})

    assert "1,234 of 1,236 records are used" in page.words
    assert "tie 2 0.2 % both are equally good" in page.words
    assert "are 1,234,000 tokens" in page.words
    assert "they would be 2,097,800 even without padding: 41.2 % are saved" in page.words
    assert "strength 1,234 1.5" in page.words
    assert "rejected: tie a.jsonl, line 5" in page.words
    assert [tag for tag, _ in page.tags].count("img") == 5
    assert ("meta", {"name": "viewport", "content": "width=device-width, initial-scale=1"}) in page.tags


def test_hostile_text_is_shown_as_text(tmp_path: Path) -> None:
    """In every field, label and file name: no tag of theirs, no address but data:, and unseen characters named."""
    texts = dict.fromkeys(("chosen", "rejected", "origin", "detail", "source"), HOSTILE)
    prompt = [{"role": HOSTILE, "content": HOSTILE, "extra": HOSTILE}]
    rows = [kept(1, **texts, prompt=prompt), rejected(2, HOSTILE, **{**texts, "detail": HOSTILE})]
    sources = (HOSTILE, f"{HOSTILE}\udcff")
    _, page = written(profile_of(rows, sources=sources), tmp_path, title=HOSTILE, reasons={HOSTILE: HOSTILE})

    assert {tag for tag, _ in page.tags}.isdisjoint({"script", "link", "iframe"})
    addresses = [value for _, attrs in page.tags for name, value in attrs.items() if name in {"src", "href"}]
    assert len(addresses) == 4
    assert all(str(address).startswith("data:image/png;base64,") for address in addresses)
    assert not any(name.startswith("on") for _, attrs in page.tags for name in attrs)
    assert page.text.count("<script>alert('x')</script>") >= 12
    assert "{{ 1 + 1 }} [U+0000][U+001B][31m [U+FEFF]" in page.text
    assert "[U+202E]" in page.text
    assert not set(page.text) & set("\x00\x1b\u202e\ufeff\udcff")


def test_examples_are_excerpts(tmp_path: Path) -> None:
    """At most 300 characters of each text, in both files."""
    long = dict.fromkeys(("chosen", "rejected", "detail"), "y" * 100_000)
    prompt = [{"role": "user", "content": "y" * 100_000, "extra": ""}]
    content, page = written(profile_of([kept(1, **long, prompt=prompt), rejected(2, **long)]), tmp_path)

    assert all(len(item[name]) <= 300 for item in content["examples"] for name in ("prompt", "chosen", "detail"))
    assert page.text.count("y") < 7 * 300 + 500


def test_redacted_report_holds_no_text_of_a_record(tmp_path: Path) -> None:
    """Neither file has the secret that stands in every field; reasons, lengths and places are there."""
    content, page = written(profile_of(secret_rows(), redact=True), tmp_path)

    assert SECRET not in (tmp_path / "report.json").read_text() + (tmp_path / "report.html").read_text()
    assert content["redacted"] is True
    assert {row["reason"] for row in content["reasons"]} == {"empty_answer", "tie"}
    assert content["examples"][0]["tokens"] == {"prompt": 5, "chosen": 3, "rejected": 2}
    assert [row["origin"] for row in content["origins"]["top"]] == [
        "origin 1 (name withheld)",
        "origin 2 (name withheld)",
    ]
    assert "withheld, as the config asks" in page.words
    write_report(profile_of(secret_rows()), tmp_path)
    assert SECRET in (tmp_path / "report.html").read_text()


@pytest.mark.parametrize(
    "rows", [[], [rejected(1)], [kept(1)], [kept(1, split="heldout")], [{"reason": "undecodable"}]]
)
def test_any_outcome_has_a_page(rows: list[dict[str, Any]], tmp_path: Path) -> None:
    """Nothing at all, rejections alone, one pair, nothing to train on, no source known."""
    content, page = written(profile_of(rows, examples=len(rows)), tmp_path)

    assert content["pairs"]["candidates"] == len(rows)
    assert "Preference data" in page.text


def test_merged_parts_give_the_same_report(tmp_path: Path) -> None:
    """Workers' parts, merged the other way round and through JSON, are the whole to the last byte."""
    whole, parts = profile_of(ROWS), [profile_of(ROWS[:4]), profile_of(ROWS[4:])]
    merged = merge(*(Profile.from_json(part.to_json()) for part in reversed(parts)))

    assert content_of(merged) == content_of(whole)
