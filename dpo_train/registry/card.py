"""The model card: README.md beside the weights, with front matter as the Hugging Face hub reads it."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from dpo_train.data.folder import LICENCE_FILES

_SPDX = {"apache license": "apache-2.0", "mit license": "mit"}
"""First lines of licence files that say no more than which one they are."""


@dataclass(frozen=True, kw_only=True)
class Card:
    """What the card says."""

    name: str
    base_model: str
    licence: str
    data: Mapping[str, str]
    """Digest by name of the source."""
    counts: Mapping[str, int]
    """Of the data's preparation."""
    training: Mapping[str, Any]
    """The training's section of the config."""
    beta: float
    report: Mapping[str, Any]
    """``findings`` and ``verdict`` as report.json has them."""
    chat: bool
    identity: Mapping[str, str] = field(default_factory=dict)


def card_text(card: Card) -> str:
    """The whole README.md."""
    return "\n".join(
        line for part in (_head, _data, _training, _evaluation, _limits, _use) for line in (*part(card), "")
    )


def accuracy_line(report: Mapping[str, Any]) -> str:
    """The one number that matters most, for a line of text."""
    return f"held-out accuracy {_interval(report['findings']['heldout']['accuracy'])}"


def licence_files(base: Path) -> list[Path]:
    """What the base model's folder says of its licence, to be handed on with the weights."""
    return sorted(file for file in base.glob("*") if file.name.upper().startswith(LICENCE_FILES) and file.is_file())


def find_licence(base: Path, given: str | None = None) -> str:
    """The licence of the base model: as given, else as its folder says, else "unknown"."""
    if given is not None:
        return given
    for said in (_front_matter(base).get("license"), _json(base / "config.json").get("license")):
        if isinstance(said, str) and said:
            return said
    for file in licence_files(base):
        if file.name.upper().startswith(("LICEN", "COPYING")):
            lines = (line.strip() for line in file.read_text(encoding="utf-8", errors="replace").splitlines())
            first = next(filter(None, lines), "")
            return _SPDX.get(first.lower(), first) or "unknown"
    return "unknown"


def _front_matter(base: Path) -> Mapping[str, Any]:
    readme = base / "README.md"
    text = readme.read_text(encoding="utf-8", errors="replace") if readme.is_file() else ""
    found = re.match(r"---\r?\n(.*?)\n---", text, re.DOTALL)
    try:
        content = yaml.safe_load(found[1]) if found else None
    except yaml.YAMLError:
        content = None
    return content if isinstance(content, dict) else {}


def _json(file: Path) -> Mapping[str, Any]:
    content = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    return content if isinstance(content, dict) else {}


def _head(card: Card) -> Iterator[str]:
    licence = card.licence if re.fullmatch(r"[a-z0-9.-]+", card.licence) else "other"
    front: dict[str, Any] = {"license": licence, "tags": ["dpo"], "library_name": "transformers"}
    if re.fullmatch(r"[\w.-]+/[\w.-]+", card.base_model):
        front["base_model"] = card.base_model
    front["pipeline_tag"] = "text-generation"
    yield f"---\n{yaml.safe_dump(front, sort_keys=False).rstrip()}\n---"
    yield f"# {card.name}\n"
    yield f"{_text(card.base_model)}, aligned by Direct Preference Optimization (arXiv 2305.18290).\n"
    yield f"- Base model: {_text(card.base_model)}"
    yield f"- Licence of the base model: {_text(card.licence)}"
    yield from (f"- Digest of the {name}: `{digest}`" for name, digest in card.identity.items())


def _data(card: Card) -> Iterator[str]:
    yield "## Data\n"
    if not card.data:
        yield "Where the pairs were prepared is not known here, and so neither are they."
        return
    yield from _table(("source", "digest of its content"), [(_text(n), f"`{d}`") for n, d in card.data.items()])
    if card.counts:
        yield ""
        yield from _table(("count", "n"), [(_text(name), str(count)) for name, count in sorted(card.counts.items())])


def _training(card: Card) -> Iterator[str]:
    yield "## Training\n"
    shown = {"beta": card.beta, **{key: value for key, value in card.training.items() if key != "beta"}}
    # Also inside of code a bar ends a table's cell.
    rows = [(key, f"`{json.dumps(value)}`".replace("|", r"\|")) for key, value in shown.items()]
    yield from _table(("option", "value"), rows)


def _evaluation(card: Card) -> Iterator[str]:
    yield "## Evaluation\n"
    yield "On pairs that the training did not see; 95 % intervals.\n"
    findings = card.report["findings"]
    rows = [*_set_rows("held-out", findings["heldout"])]
    for one in findings["sets"]:
        where = "" if one["is_trained_on"] else ", outside the training distribution"
        rows += _set_rows(f"{one['name']}{where}", one)
    if findings["divergence"]:
        rows.append(("KL(policy || reference), nats per answer", _interval(findings["divergence"]["kl"])))
    for one in findings["samples"]:
        if one["model"] == "policy" and one["length_ratio"]:
            name = f"length over the reference's, temperature {one['temperature']:g}"
            rows.append((name, _interval(one["length_ratio"])))
    for one in findings["comparisons"]:
        name = f"win rate against {one['opponent']}, temperature {one['temperature']:g} ({one['judge']})"
        rows.append((name, _interval(one["win_rate"]) + (f"; {one['problem']}" if one["problem"] else "")))
    yield from _table(("measure", "value"), [(_text(name), _text(value)) for name, value in rows])
    yield "\nThe gate:\n"
    rules = card.report["verdict"]["rules"]
    yield from _table(
        ("rule", "limit", "outcome"), [tuple(_text(r[k]) for k in ("rule", "limit", "outcome")) for r in rules]
    )


def _set_rows(name: str, found: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    yield f"accuracy, {name}", _interval(found["accuracy"])
    yield f"reward margin, {name}", _interval(found["margin"])
    if found["champion"]:
        yield f"accuracy minus the champion's, {name}", _interval(found["champion"]["difference"])
    if found["drop"]:
        yield f"accuracy minus that inside the training distribution, {name}", _interval(found["drop"])


def _limits(card: Card) -> Iterator[str]:
    yield "## Limits\n"
    yield "- The numbers hold for data like that above; what else the base model does wrong, this one may do as well."
    yield "- Preferences were measured by log-probs of given answers; what the model writes itself is another matter."
    if not card.report["findings"]["comparisons"]:
        yield "- No judge has compared its answers."
    yield from (f"- {_text(note)}" for note in card.report["findings"]["notes"])


def _use(card: Card) -> Iterator[str]:
    yield "## Use\n"
    yield "This folder is a Hugging Face model folder: safetensors, with tokenizer and chat template beside them.\n"
    yield "```python"
    yield "from transformers import AutoModelForCausalLM, AutoTokenizer\n"
    yield 'tokenizer, model = AutoTokenizer.from_pretrained("."), AutoModelForCausalLM.from_pretrained(".")'
    yield "```\n"
    yield "`vllm serve .` serves it as well, and so does `mlflow models serve` on the registered version"
    yield f"({'messages in, a message out' if card.chat else 'a text in, its continuation out'})."


def _interval(found: Mapping[str, Any]) -> str:
    value, low, high = (("not measurable" if found[k] is None else f"{found[k]:.3f}") for k in ("value", "low", "high"))
    return f"{value} ({low} to {high}, n = {found['n']})"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> Iterator[str]:
    for cells in (head, ["---"] * len(head), *rows):
        yield f"| {' | '.join(cells)} |"


def _text(words: object) -> str:
    """Names from data as text: no mark-up, no second line."""
    return re.sub(r"([\\`*_\[\]<>|#])", r"\\\1", " ".join(str(words).split()))
