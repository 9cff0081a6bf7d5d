"""Preferences between texts that were written for something."""

from __future__ import annotations

import pytest

from dpo_train.recipes.winrates import couples

TEXTS = [(f"package-{place:03}", f"about {place}", f"text {place}") for place in range(101)]


@pytest.mark.parametrize("neighbours", [False, True])
def test_each_text_is_in_one_couple_and_as_likely_chosen_as_rejected(neighbours: bool) -> None:
    found = list(couples(TEXTS, 0, neighbours=neighbours))

    texts = [pair[side] for pair in found for side in ("chosen", "rejected")]
    assert len(found) == 50
    assert len(set(texts)) == 100
    assert all(pair["prompt"].split()[1] == pair["chosen"].split()[1] for pair in found)
    first = sum(pair["group"].split("+")[0] < pair["group"].split("+")[1] for pair in found)
    assert 15 <= first <= 35
    assert found == list(couples(TEXTS, 0, neighbours=neighbours))
    assert found != list(couples(TEXTS, 1, neighbours=neighbours))


def test_neighbours_stand_side_by_side() -> None:
    def apart(neighbours: bool) -> list[int]:
        numbers = [
            [int(pair[side].split()[1]) for side in ("chosen", "rejected")]
            for pair in couples(TEXTS, 0, neighbours=neighbours)
        ]
        return [abs(one - other) for one, other in numbers]

    assert set(apart(True)) == {1}
    assert max(apart(False)) > 20


def test_equal_texts_are_no_preference() -> None:
    assert list(couples([("a", "x", "same"), ("b", "y", "same")], 0, neighbours=True)) == []
