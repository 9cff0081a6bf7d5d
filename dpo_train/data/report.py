"""The report of the data: report.json for machines, report.html for people (one file, plots inside)."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from dpo_train.data.packing import pack
from dpo_train.data.pairs import SPLITS
from dpo_train.data.profile import KEPT, NAME_CHARS, PARTS, UNKNOWN_SOURCE, Example, Profile
from dpo_train.data.report_page import to_html
from dpo_train.disk import write_atomically
from dpo_train.findings import Estimate

REPORT_JSON = "report.json"
REPORT_HTML = "report.html"
SCHEMA_VERSION = 1

TOP_ORIGINS = 50
ROW_TOKENS = (1024, 2048, 4096, 8192, 16384)
BATCH_PAIRS = 64
SAMPLED_PAIRS = 4096
# Left out on the user's own word, so that they say nothing about the data.
ASKED_FOR = {"over_limit", "over_weight", "below_min_strength"}

MAX_REJECTED = 0.05
MAX_CHOSEN_LONGER = 0.60
MAX_TRUNCATED = 0.10
MAX_ONE_SOURCE = 0.90
MIN_HELDOUT_PAIRS = 100

_BINS = 60
_Z_95 = 1.959963984540054


def write_report(
    profile: Profile, folder: Path, *, title: str = "Preference data", reasons: Mapping[str, str] | None = None
) -> None:
    """Writes both files.

    Args:
        profile: of all candidate pairs.
        folder: must exist.
        title: heading of the page.
        reasons: what each reason code means.
    """
    content = to_dict(profile, title=title, reasons=reasons or {})
    write_atomically(folder / REPORT_JSON, json.dumps(content, indent=1) + "\n")
    write_atomically(folder / REPORT_HTML, to_html(content))


def to_dict(profile: Profile, *, title: str, reasons: Mapping[str, str]) -> dict[str, Any]:
    """The report as JSON types; lengths are in tokens, shares from 0 to 1."""
    records, used, kept = sum(profile.records.values()), sum(profile.used.values()), _kept(profile)
    candidates = sum(profile.cells.values())
    prompt_tokens, pair_tokens = (_total(profile.lengths[f"train_{name}"]) for name in ("prompt", "pair"))
    return {
        "schema": SCHEMA_VERSION,
        "title": title,
        "redacted": profile.redact,
        "warnings": warnings(profile),
        "records": {"total": records, "used": used, "rejected": records - used},
        "pairs": {"candidates": candidates, "kept": kept, "rejected": candidates - kept},
        "reasons": _reasons(profile, reasons),
        "sources": _sources(profile),
        "origins": _origins(profile),
        "splits": {split: _count(profile, reason=KEPT, split=split) for split in SPLITS},
        "truncated": {part: {"pairs": n, "share": _share(n, kept)} for part, n in profile.truncated.items()},
        "lengths": {name: _statistics(profile.lengths[name]) for name in (*PARTS, "pair")},
        "difference": difference(profile),
        "strength": {"known": sum(profile.strength.values()), **_statistics(profile.strength)},
        "agreement": {"known": sum(profile.agreement.values()), **_statistics(profile.agreement)},
        "prompts": {"different": profile.prompts, "most_pairs_of_one": profile.max_pairs_of_prompt},
        "training": {
            "pairs": _count(profile, reason=KEPT, split="train"),
            "tokens_prompt_once": pair_tokens,
            "tokens_prompt_twice": pair_tokens + prompt_tokens,
            "saving": _share(prompt_tokens, pair_tokens + prompt_tokens),
        },
        "rows": row_fill(profile),
        "examples": [_example(item, profile.sources) for item in profile.examples],
    }


def warnings(profile: Profile) -> list[str]:
    """In words what looks wrong with the data; empty where nothing does."""
    kept, candidates = _kept(profile), sum(profile.cells.values())
    asked = sum(_count(profile, reason=reason) for reason in ASKED_FOR)
    rejected = candidates - kept - asked
    found = []
    if rejected > MAX_REJECTED * candidates:
        reason, most = max(
            ((row["reason"], row["pairs"]) for row in _reasons(profile, {}) if row["reason"] not in ASKED_FOR),
            key=lambda item: item[1],
        )
        found.append(
            f"{_percent(rejected, candidates)} of the candidate pairs were rejected ({rejected:,} of {candidates:,}), "
            f"most often because of {reason} ({most:,})."
            + (" Whole files may have another format: give each a source of its own." * (reason == "missing_field"))
        )
    if not kept:
        return [*found, "No pair is left: there is nothing to train on."]
    return [*found, *_split_warnings(profile), *_length_warnings(profile, kept), *_source_warnings(profile, kept)]


def _split_warnings(profile: Profile) -> list[str]:
    train, heldout = (_count(profile, reason=KEPT, split=split) for split in ("train", "heldout"))
    found = [] if train else ["No pair is in the training split: there is nothing to train on."]
    if not heldout:
        found.append("No pair is held out, so a trained model cannot be evaluated.")
    elif heldout < MIN_HELDOUT_PAIRS:
        found.append(
            f"Only {heldout:,} held-out pairs: an evaluation on fewer than {MIN_HELDOUT_PAIRS} says little. "
            "More data or a larger prepare.heldout_fraction helps."
        )
    return found


def _length_warnings(profile: Profile, kept: int) -> list[str]:
    found = []
    longer = difference(profile)["share_chosen_longer"]
    # The second condition: three of four pairs are no finding.
    if longer is not None and longer["value"] > MAX_CHOSEN_LONGER and longer["low"] > 0.5:
        found.append(
            f"The chosen answer is the longer one in {100 * longer['value']:.1f} % of the pairs whose answers differ "
            "in length: training may teach length rather than quality (train.ld_alpha, or a loss that normalises by "
            "length, lessens this)."
        )
    cut = profile.truncated["any"]
    if cut > MAX_TRUNCATED * kept:
        found.append(
            f"In {_percent(cut, kept)} of the kept pairs the prompt or an answer was cut ({cut:,} of {kept:,}): "
            "prepare.max_prompt_tokens and prepare.max_answer_tokens say how long they may be."
        )
    return found


def _source_warnings(profile: Profile, kept: int) -> list[str]:
    if len(profile.sources) < 2:
        return []
    of_source = {label: _count(profile, dataset=place, reason=KEPT) for place, label in enumerate(profile.sources)}
    found = [
        f"{_percent(n, kept)} of the kept pairs come from one source of {len(of_source)}: {label[:NAME_CHARS]}."
        for label, n in of_source.items()
        if n > MAX_ONE_SOURCE * kept
    ]
    return [
        *found,
        *(f"No pair of the source {label[:NAME_CHARS]} was kept." for label, n in of_source.items() if not n),
        *(
            f"The weights leave {train:,} of {train + over:,} training pairs of the source {label[:NAME_CHARS]}."
            for place, label in enumerate(profile.sources)
            if (over := _count(profile, dataset=place, reason="over_weight"))
            > 9 * (train := _count(profile, dataset=place, reason=KEPT, split="train"))
        ),
    ]


def difference(profile: Profile) -> dict[str, Any]:
    """Length of the chosen minus length of the rejected answer, in tokens, and which of them is longer how often."""
    histogram = profile.lengths["difference"]
    longer = sum(n for value, n in histogram.items() if value > 0)
    shorter = sum(n for value, n in histogram.items() if value < 0)
    return {
        "chosen_longer": longer,
        "rejected_longer": shorter,
        "equal": histogram.get(0, 0),
        # Pairs of one prompt are not independent, so that a prompt counts once for the interval.
        "share_chosen_longer": _wilson(longer, longer + shorter, trials=min(longer + shorter, profile.prompts)),
        **_statistics(histogram),
    }


def row_fill(profile: Profile) -> dict[str, Any]:
    """How full rows would be at batches of BATCH_PAIRS training pairs, on at most SAMPLED_PAIRS of them."""
    values, counts = _arrays(profile.lengths["train_pair"])
    generator = np.random.Generator(np.random.PCG64(profile.seed))
    if counts.sum() > SAMPLED_PAIRS:
        sample = generator.choice(values, size=SAMPLED_PAIRS, p=counts / counts.sum())
    else:
        sample = generator.permutation(np.repeat(values, counts))
    lengths = [int(value) for value in sample]
    batches = [lengths[start : start + BATCH_PAIRS] for start in range(0, len(lengths), BATCH_PAIRS)]
    by_row_tokens = [{"row_tokens": row_tokens, **_packed(batches, row_tokens)} for row_tokens in ROW_TOKENS]
    return {
        "batch_pairs": BATCH_PAIRS,
        "sampled_pairs": len(lengths),
        "by_row_tokens": by_row_tokens if lengths else [],
    }


def _packed(batches: Sequence[Sequence[int]], row_tokens: int) -> dict[str, float]:
    rows = [sum(batch[i] for i in row) for batch in batches for row in pack(batch, row_tokens)]
    # A pair that is longer than a row has a longer one of its own.
    room = sum(max(row_tokens, length) for length in rows)
    lengths = [length for batch in batches for length in batch]
    return {
        "rows_per_batch": len(rows) / max(1, len(batches)),
        "fill": _share(sum(rows), room),
        "share_too_long": _share(sum(length > row_tokens for length in lengths), len(lengths)),
    }


def _reasons(profile: Profile, meanings: Mapping[str, str]) -> list[dict[str, Any]]:
    """Reasons, the commonest first."""
    counts: dict[str, int] = {}
    for (_, reason, _), n in profile.cells.items():
        counts[reason] = counts.get(reason, 0) + n
    candidates = sum(counts.values())
    return [
        {"reason": reason, "meaning": meanings.get(reason, ""), "pairs": n, "share": _share(n, candidates)}
        for reason, n in sorted(counts.items(), key=lambda item: (-item[1], item[0]))
        if reason != KEPT
    ]


def _sources(profile: Profile) -> list[dict[str, Any]]:
    places = [
        *range(len(profile.sources)),
        *sorted({place for place, _, _ in profile.cells} - {*range(len(profile.sources))}),
    ]
    return [
        {
            "place": place,
            "label": _label(place, profile.sources),
            "records": profile.records.get(place, 0),
            "used": profile.used.get(place, 0),
            "kept": _count(profile, dataset=place, reason=KEPT),
            "rejected": _count(profile, dataset=place) - _count(profile, dataset=place, reason=KEPT),
            "splits": {split: _count(profile, dataset=place, reason=KEPT, split=split) for split in SPLITS},
            "reasons": {
                row["reason"]: n
                for row in _reasons(profile, {})
                if (n := _count(profile, dataset=place, reason=row["reason"]))
            },
        }
        for place in places
    ]


def _origins(profile: Profile) -> dict[str, Any]:
    """The commonest origins; the rest is summed up, and so is what a profile of very many origins left out."""
    ranked = sorted(profile.origins.items(), key=lambda item: (-sum(item[1]), item[0]))
    top = ranked[:TOP_ORIGINS]
    kept, candidates = _kept(profile), sum(profile.cells.values())
    other_kept = kept - sum(counts[0] for _, counts in top)
    return {
        "named": sum(name != "" for name, _ in ranked),
        "complete": sum(sum(counts) for _, counts in ranked) == candidates,
        "top": [
            {
                # The name is the data's own text.
                "origin": f"origin {rank} (name withheld)" if profile.redact and name else name,
                "kept": counts[0],
                "rejected": counts[1],
            }
            for rank, (name, counts) in enumerate(top, 1)
        ],
        "other": {"kept": other_kept, "rejected": candidates - sum(sum(counts) for _, counts in top) - other_kept},
    }


def _example(item: Example, sources: Sequence[str]) -> dict[str, Any]:
    content = dataclasses.asdict(item)
    del content["order"]
    lengths = dict(zip(PARTS, item.tokens, strict=True)) if item.tokens else None
    return {**content, "label": _label(item.dataset, sources), "tokens": lengths}


def _statistics(histogram: Mapping[Any, int]) -> dict[str, Any]:
    """Mean, quantiles (values that occur) and bins; nulls where there is nothing."""
    if not histogram:
        return {**dict.fromkeys(("mean", "min", "median", "p90", "p99", "max")), "histogram": None}
    values, counts = _arrays(histogram)
    until = np.cumsum(counts)
    at = {"min": 0.0, "median": 0.5, "p90": 0.9, "p99": 0.99, "max": 1.0}
    quantiles = {name: values[np.searchsorted(until, share * until[-1])].item() for name, share in at.items()}
    mean = float((values * counts).sum() / until[-1])
    return {"mean": mean, **quantiles, "histogram": _binned(values, counts)}


def _binned(values: npt.NDArray[Any], counts: npt.NDArray[np.int64]) -> dict[str, list[float]]:
    """At most about _BINS bins, of a round width and with an edge at zero."""
    span = float(values[-1] - values[0]) or max(1.0, abs(float(values[0])))
    width = 1.0
    if span >= _BINS or values.dtype.kind == "f":
        power = 10.0 ** math.floor(math.log10(span / _BINS))
        width = next(power * step for step in (1, 2, 5, 10) if power * step * _BINS >= span)
    # Scores such as 0.3 / 0.1 come out just below the edge that they mean.
    places = np.floor(values / width + 1e-6).astype(np.int64)
    totals = np.bincount(places - places[0], weights=counts)
    edges = (np.arange(len(totals) + 1) + places[0]) * width
    return {"edges": [float(f"{edge:.6g}") for edge in edges], "counts": [int(n) for n in totals]}


def _wilson(successes: int, n: int, *, trials: int) -> dict[str, Any] | None:
    """Wilson's score interval (1927) of a proportion over ``trials`` independent observations."""
    if not trials:
        return None
    share = successes / n
    centre = (share + _Z_95**2 / (2 * trials)) / (1 + _Z_95**2 / trials)
    half = _Z_95 * math.sqrt(share * (1 - share) / trials + _Z_95**2 / (4 * trials**2)) / (1 + _Z_95**2 / trials)
    return dataclasses.asdict(Estimate(value=share, low=max(0.0, centre - half), high=min(1.0, centre + half), n=n))


def _arrays(histogram: Mapping[Any, int]) -> tuple[npt.NDArray[Any], npt.NDArray[np.int64]]:
    values = np.array(sorted(histogram))
    return values, np.array([histogram[value] for value in values.tolist()], dtype=np.int64)


def _count(profile: Profile, *, dataset: int | None = None, reason: str | None = None, split: str | None = None) -> int:
    wanted = (dataset, reason, split)
    return sum(n for key, n in profile.cells.items() if all(w in (None, k) for w, k in zip(wanted, key, strict=True)))


def _kept(profile: Profile) -> int:
    return _count(profile, reason=KEPT)


def _total(histogram: Mapping[int, int]) -> int:
    return sum(value * n for value, n in histogram.items())


def _share(part: float, whole: float) -> float:
    return part / whole if whole else 0.0


def _percent(part: int, whole: int) -> str:
    return f"{100 * _share(part, whole):.1f} %"


def _label(place: int, sources: Sequence[str]) -> str:
    if 0 <= place < len(sources):
        return sources[place]
    return "(source not known)" if place == UNKNOWN_SOURCE else f"source {place}"
