"""Parts of a set: origins, lengths, strengths."""

from __future__ import annotations

import numpy as np
import pytest

from dpo_train.evaluate.slices import MAX_ORIGINS, Parts, by_length, by_origin, by_strength


def members(parts: Parts) -> dict[str, list[int]]:
    return {name: np.flatnonzero(inside).tolist() for name, inside in parts}


def test_lengths_are_halved_on_each_side() -> None:
    """Differences -9 -4 -3 0 2 2 8: shorter from 4 on (the median), longer from 2 on, of which nothing is less."""
    found = by_length(np.array([-9.0, 2, -3, 0, -4, 2, 8]))

    assert members(found) == {
        "chosen shorter by 4 or more": [0, 4],
        "chosen shorter by less than 4": [2],
        "equally long": [3],
        "chosen longer": [1, 5, 6],
    }


def test_order_of_lengths_goes_from_shorter_to_longer() -> None:
    """As an axis would."""
    found = by_length(np.array([-5.0, -1, 1, 5]))

    assert [name for name, _ in found] == [
        "chosen shorter by 5 or more",
        "chosen shorter by less than 5",
        "chosen longer by less than 5",
        "chosen longer by 5 or more",
    ]


@pytest.mark.parametrize("found", [by_length(np.zeros(3)), by_origin(["a", "a"]), by_strength(np.array([2.0, 2.0]))])
def test_one_part_is_none(found: Parts) -> None:
    """It would repeat the whole."""
    assert found == []


def test_origins_largest_first() -> None:
    """Equal ones by name; what does not say is "(unknown)"."""
    assert members(by_origin(["b", "", "a", "b", "c"])) == {"b": [0, 3], "(unknown)": [1], "a": [2], "c": [4]}


def test_only_the_largest_origins() -> None:
    """25 origins, the last with two pairs: twenty, that one first."""
    found = by_origin([f"{i:02}" for i in range(25)] + ["24"])

    assert len(found) == MAX_ORIGINS
    assert found[0][0] == "24"


def test_strengths_in_quarters() -> None:
    """Of those that are known; nine values of which one is unknown."""
    found = by_strength(np.array([0.1, 0.2, 0.3, 0.4, np.nan, 0.5, 0.6, 0.7, 0.8]))

    assert members(found) == {"0.1 to 0.2": [0, 1], "0.3 to 0.4": [2, 3], "0.5 to 0.6": [5, 6], "0.7 to 0.8": [7, 8]}


def test_few_strengths_are_parts_by_themselves() -> None:
    """Ratings of 1 and 3."""
    assert members(by_strength(np.array([1.0, 3, 1, 1]))) == {"1": [0, 2, 3], "3": [1]}


def test_unknown_strengths_make_no_parts() -> None:
    """A source without ratings."""
    assert by_strength(np.full(3, np.nan)) == []
