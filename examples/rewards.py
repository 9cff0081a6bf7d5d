"""Rewards of answers by counting words. Toys: each shows where a judge of yours goes, none knows whether it is true.

A function gets the prompt (messages {role, content}) and an answer, and returns a number; of two answers the one with
the larger number is preferred. The same function ranks the answers in `dpo sample` and compares models in `dpo run`.
What counts words is satisfied by words: read the answers too, and keep a rule on KL and length in the gate.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

Prompt = list[dict[str, str]]

COURTESY = ("thank you", "thanks", "please", "happy to help", "glad to help")
REGRET = ("sorry", "apologise", "apologize", "apologies", "i understand")
NEXT_STEP = ("i will", "i'll", "we will", "we'll", "you can", "let me", "could you")
BLAME = ("your fault", "your mistake", "you should have", "you failed", "you must", "not our", "nothing we can do")
FORM = re.compile(r"\[[^\]]*\]|\bdear (customer|sir|madam)\b|\bbest regards\b|\bsincerely\b", re.IGNORECASE)

EXAMPLE = ("for example", "for instance", "imagine", "think of", "picture", "just like")

POSITIVE = (
    *("amazing", "beautiful", "beautifully", "best", "brilliant", "captivating", "charming", "clever", "compelling"),
    *("delight", "delightful", "engaging", "enjoyable", "entertaining", "excellent", "fascinating", "fine", "fresh"),
    *("fun", "funny", "good", "great", "gripping", "heartfelt", "hilarious", "honest", "inspiring", "joy", "love"),
    *("masterpiece", "memorable", "moving", "perfect", "pleasure", "powerful", "rich", "smart", "stunning", "superb"),
    *("sweet", "terrific", "thrilling", "touching", "warm", "well", "wise", "witty", "wonderful", "worth"),
)
NEGATIVE = (
    *("annoying", "awful", "bad", "bland", "bore", "boring", "clumsy", "contrived", "disappointing", "disappointment"),
    *("dreadful", "dull", "dumb", "empty", "fails", "flat", "flawed", "forgettable", "hollow", "horrible", "lacking"),
    *("lame", "lifeless", "mediocre", "mess", "no", "nothing", "pointless", "poor", "predictable", "pretentious"),
    *("ridiculous", "shallow", "silly", "slow", "sloppy", "stale", "stupid", "tedious", "terrible", "thin", "tired"),
    *("too", "ugly", "unfortunately", "unfunny", "uninspired", "waste", "weak", "without", "worse", "worst"),
)


def courtesy(prompt: Prompt, answer: str) -> float:
    """A point each for courtesy, regret and a next step, one less for blame and for a form letter's phrases each.

    Half a point less for every 20 words beyond 60: who writes to a shop wants a short answer.
    """
    del prompt
    text = _plain(answer)
    points = sum(_has(text, words) for words in (COURTESY, REGRET, NEXT_STEP))
    faults = _has(text, BLAME) + (FORM.search(answer) is not None)
    return points - faults - max(0, len(_words(answer)) - 60) / 40


def lesson(prompt: Prompt, answer: str) -> float:
    """A point for an example and one for a question at the end; less for long sentences, long words and much text.

    A point is lost for each 10 words of a mean sentence beyond 12, for each syllable of a mean word beyond 1, for each
    40 words beyond 80, and for each 10 words that are missing to 20: saying nothing is not simple.
    """
    del prompt
    words = _words(answer)
    if not words:
        return -4.0
    sentences = [part for part in re.split(r"[.!?]+", answer) if _words(part)]
    points = _has(_plain(answer), EXAMPLE) + answer.rstrip().endswith("?")
    return (
        points
        - max(0.0, len(words) / len(sentences) - 12) / 10
        - (sum(map(syllables, words)) / len(words) - 1)
        - max(0, len(words) - 80) / 40
        - max(0, 20 - len(words)) / 10
    )


def sentiment(prompt: Prompt, answer: str) -> float:
    """Words that praise minus words that blame, each counted once: a text gains nothing by saying one again."""
    del prompt
    words = set(_words(answer))
    return float(len(words & set(POSITIVE)) - len(words & set(NEGATIVE)))


def syllables(word: str) -> int:
    """Groups of vowels, without a silent e at the end; at least one."""
    bare = re.sub(r"(?<=[^aeiouyl])e$", "", word)
    return max(1, len(re.findall(r"[aeiouy]+", bare)))


def _words(text: str) -> list[str]:
    return re.findall(r"[a-z]+(?:'[a-z]+)?", _plain(text))


def _plain(text: str) -> str:
    return text.lower().replace("\u2019", "'")


def _has(text: str, phrases: Iterable[str]) -> int:
    return int(any(re.search(rf"\b{re.escape(phrase)}\b", text) for phrase in phrases))
