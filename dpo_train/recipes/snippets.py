"""Film-review snippets for the sentiment recipe: the judge's, and the policy's as beginnings and how they go on.

No film is in two parts, so that the judge has seen nothing of what it rewards, and the policy nothing of what it is
measured on.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from typing import Any, Protocol, TypeVar

from dpo_train.artifacts import Artifact, Output, Summary
from dpo_train.config import RunConfig
from dpo_train.data.folder import model_folder
from dpo_train.data.tokens import load_tokenizer
from dpo_train.errors import DataError
from dpo_train.recipes.corpora import Snippet, film_snippets
from dpo_train.recipes.flow import code_of, write_examples, write_lines
from dpo_train.stages.common import make, model_digest

SFT_FILE, PROMPTS_FILE, HELDOUT_FILE = "sft.jsonl", "prompts.jsonl", "heldout.jsonl"
SHORTEST, LONGEST = 2, 8
"""Tokens of a prompt (the paper, section 6.1)."""

JUDGE_SHARE, HELDOUT_SHARE = 0.45, 0.15
"""Of the films, for the judge and for held-out prompts; the rest is for the policy."""
JUDGE_HELDOUT, MOST_JUDGE_HELDOUT = 0.2, 1000
"""Of the judge's snippets, kept apart to tell how good it is."""

Item = TypeVar("Item")


class Counts(Protocol):
    """How much is wanted."""

    num_sft_snippets: int
    num_prompts: int
    num_heldout_prompts: int


def judges_snippets(config: RunConfig, number: int) -> Artifact:
    """Examples for a probe: snippets that praise or pan.

    Raises:
        DataError: there are not so many.
    """

    def body(out: Output) -> Summary:
        judges, _, _ = _by_film(config.seed)
        kept, examples = _cut(judges, JUDGE_HELDOUT)
        chosen = _first(examples, number, "num_judge_snippets")
        parts = ((chosen, False), (kept[:MOST_JUDGE_HELDOUT], True))
        write_examples(
            out, (((), each.text, each.is_positive, is_heldout) for part, is_heldout in parts for each in part)
        )
        return Summary(details={"summary": f"{number} snippets"})

    content = {"number": number, "seed": config.seed, "code": code_of("corpora", "snippets")}
    return make(config, "examples", content, {}, body, output=None)


def policys_snippets(config: RunConfig, counts: Counts) -> Artifact:
    """Snippets for SFT as preference records, and prompts to train on and to measure on.

    Raises:
        DataError: there are not so many.
    """

    def body(out: Output) -> Summary:
        _, policys, heldout = _by_film(config.seed)
        chance = random.Random(config.seed)
        tokenizer = load_tokenizer(model_folder(config.model.path))
        parts = list(_begun(policys, tokenizer, chance))
        # SFT reads the chosen answer alone; a pair has two.
        records = [
            {"prompt": prompt, "chosen": rest, "rejected": other}
            for (prompt, rest), (_, other) in zip(parts, parts[1:] + parts[:1], strict=True)
        ]
        write_lines(out.path / SFT_FILE, _first(records, counts.num_sft_snippets, "num_sft_snippets"))
        seen = list(dict.fromkeys(prompt for prompt, _ in parts))
        asked = _first(seen, counts.num_prompts, "num_prompts")
        # Films differ, and yet many snippets begin with "the film".
        others = dict.fromkeys(prompt for prompt, _ in _begun(heldout, tokenizer, chance) if prompt not in set(seen))
        unseen = _first(list(others), counts.num_heldout_prompts, "num_heldout_prompts")
        for name, prompts in ((PROMPTS_FILE, asked), (HELDOUT_FILE, unseen)):
            write_lines(out.path / name, ({"prompt": prompt} for prompt in prompts))
        return Summary(details={"summary": f"{counts.num_sft_snippets} snippets, {len(asked)} + {len(unseen)} prompts"})

    names = ("num_sft_snippets", "num_prompts", "num_heldout_prompts")
    content = {name: getattr(counts, name) for name in names}
    content |= {"seed": config.seed, "code": code_of("corpora", "snippets")}
    return make(config, "corpus", content, {"model": model_digest(config)}, body, output=None)


def _by_film(seed: int) -> tuple[list[Snippet], list[Snippet], list[Snippet]]:
    """The judge's, the policy's and the held-out snippets."""
    snippets, chance = film_snippets(), random.Random(seed)
    films = sorted({each.film for each in snippets})
    chance.shuffle(films)
    judges, rest = _cut(films, JUDGE_SHARE)
    heldout, policys = _cut(rest, HELDOUT_SHARE / (1 - JUDGE_SHARE))
    chance.shuffle(snippets)
    whose = (set(part) for part in (judges, policys, heldout))
    first, second, third = ([each for each in snippets if each.film in part] for part in whose)
    return first, second, third


def _cut(items: Sequence[Item], share: float) -> tuple[list[Item], list[Item]]:
    place = round(len(items) * share)
    return list(items[:place]), list(items[place:])


def _first(found: Sequence[Item], number: int, key: str) -> list[Item]:
    if len(found) < number:
        raise DataError(
            f"There are not so many film snippets as recipe.{key} asks for",
            got=f"{len(found)} of {number}",
            fix="lower it, or --scale",
        )
    return list(found[:number])


def _begun(snippets: Sequence[Snippet], tokenizer: Any, chance: random.Random) -> Iterator[tuple[str, str]]:
    """Each snippet as its first 2 to 8 tokens and the rest, but for those that are too short, or whose tokens are not
    their text."""
    for each in snippets:
        ids = tokenizer(each.text, add_special_tokens=False)["input_ids"]
        prompt = tokenizer.decode(ids[: chance.randint(SHORTEST, LONGEST)])
        rest = each.text[len(prompt) :]
        if each.text.startswith(prompt) and prompt.strip() and len(rest.split()) > 3:
            yield prompt, rest
