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
from dpo_train.recipes.corpora import Snippet, film_snippets
from dpo_train.recipes.flow import code_of, digest_of, write_examples, write_lines
from dpo_train.stages.common import make, model_digest

SFT_FILE, PROMPTS_FILE, HELDOUT_FILE = "sft.jsonl", "prompts.jsonl", "heldout.jsonl"
SHORTEST, LONGEST = 2, 8
"""Tokens of a prompt (the paper, section 6.1)."""

JUDGE_SHARE, HELDOUT_SHARE = 0.45, 0.15
"""Of the films, for the judge and for held-out prompts; the rest is for the policy."""
JUDGE_HELDOUT, MOST_JUDGE_HELDOUT = 0.2, 1000
"""Of the judge's snippets, kept apart to tell how good it is."""

_COUNTS = ("num_sft_snippets", "num_prompts", "num_heldout_prompts")

Item = TypeVar("Item")


class Counts(Protocol):
    """How much is wanted."""

    num_sft_snippets: int
    num_prompts: int
    num_heldout_prompts: int


def judges_snippets(config: RunConfig, number: int) -> Artifact:
    """Examples for a probe: so many snippets that praise or pan, or all that there are; ``counts`` says how many."""
    snippets = film_snippets()

    def body(out: Output) -> Summary:
        judges, _, _ = _by_film(snippets, config.seed)
        kept, examples = _cut(judges, JUDGE_HELDOUT)
        chosen = examples[:number]
        parts = ((chosen, False), (kept[:MOST_JUDGE_HELDOUT], True))
        write_examples(
            out, (((), each.text, each.is_positive, is_heldout) for part, is_heldout in parts for each in part)
        )
        return Summary(counts={"num_judge_snippets": len(chosen)}, details={"summary": f"{len(chosen)} snippets"})

    content = {"number": number, "seed": config.seed, "code": code_of("snippets")}
    return make(config, "examples", content, {"data": _digest(snippets)}, body, output=None)


def policys_snippets(config: RunConfig, counts: Counts) -> Artifact:
    """Snippets for SFT as preference records, and prompts to train on and to measure on: so many, or all that there
    are; ``counts`` says how many."""
    snippets = film_snippets()

    def body(out: Output) -> Summary:
        _, policys, heldout = _by_film(snippets, config.seed)
        chance = random.Random(config.seed)
        tokenizer = load_tokenizer(model_folder(config.model.path))
        parts = list(_begun(policys, tokenizer, chance))
        # SFT reads the chosen answer alone; a pair has two.
        records = [
            {"prompt": prompt, "chosen": rest, "rejected": other}
            for (prompt, rest), (_, other) in zip(parts, parts[1:] + parts[:1], strict=True)
        ][: counts.num_sft_snippets]
        seen = list(dict.fromkeys(prompt for prompt, _ in parts))
        # Films differ, and yet many snippets begin with "the film".
        others = dict.fromkeys(prompt for prompt, _ in _begun(heldout, tokenizer, chance) if prompt not in set(seen))
        asked, unseen = seen[: counts.num_prompts], list(others)[: counts.num_heldout_prompts]
        write_lines(out.path / SFT_FILE, records)
        for name, prompts in ((PROMPTS_FILE, asked), (HELDOUT_FILE, unseen)):
            write_lines(out.path / name, ({"prompt": prompt} for prompt in prompts))
        found = dict(zip(_COUNTS, (len(records), len(asked), len(unseen)), strict=True))
        told = f"{len(records)} snippets, {len(asked)} prompts and {len(unseen)} held-out ones"
        return Summary(counts=found, details={"summary": told})

    content = {name: getattr(counts, name) for name in _COUNTS} | {"seed": config.seed, "code": code_of("snippets")}
    inputs = {"model": model_digest(config), "data": _digest(snippets)}
    return make(config, "corpus", content, inputs, body, output=None)


def not_the_judges(snippets: Sequence[Snippet], seed: int) -> list[Snippet]:
    """Those of films of which the judge has seen nothing."""
    _, policys, heldout = _by_film(snippets, seed)
    return [*policys, *heldout]


def _digest(snippets: Sequence[Snippet]) -> str:
    return digest_of([each.text, each.is_positive, each.film] for each in snippets)


def _by_film(snippets: Sequence[Snippet], seed: int) -> tuple[list[Snippet], list[Snippet], list[Snippet]]:
    """The judge's, the policy's and the held-out snippets."""
    chance = random.Random(seed)
    films = sorted({each.film for each in snippets})
    chance.shuffle(films)
    judges, rest = _cut(films, JUDGE_SHARE)
    heldout, policys = _cut(rest, HELDOUT_SHARE / (1 - JUDGE_SHARE))
    shuffled = list(snippets)
    chance.shuffle(shuffled)
    whose = (set(part) for part in (judges, policys, heldout))
    first, second, third = ([each for each in shuffled if each.film in part] for part in whose)
    return first, second, third


def _cut(items: Sequence[Item], share: float) -> tuple[list[Item], list[Item]]:
    place = round(len(items) * share)
    return list(items[:place]), list(items[place:])


def _begun(snippets: Sequence[Snippet], tokenizer: Any, chance: random.Random) -> Iterator[tuple[str, str]]:
    """Each snippet as its first 2 to 8 tokens and the rest, but for those that are too short, or whose tokens are not
    their text."""
    for each in snippets:
        ids = tokenizer(each.text, add_special_tokens=False)["input_ids"]
        prompt = tokenizer.decode(ids[: chance.randint(SHORTEST, LONGEST)])
        rest = each.text[len(prompt) :]
        if each.text.startswith(prompt) and prompt.strip() and len(rest.split()) > 3:
            yield prompt, rest
