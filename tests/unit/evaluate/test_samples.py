"""Statistics of sampled answers, and the KL."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from dpo_train.evaluate.samples import ANSWERS_SCHEMA, describe, divergence, turn_ends
from dpo_train.findings import SampleFindings

END = 2


def answers(*rows: tuple[str, list[int], bool], temperature: float = 1.0, text: str = "words") -> pa.Table:
    """Rows of (pair_id, answer_ids, truncated)."""
    seen: dict[str, int] = {}
    found: list[dict[str, Any]] = []
    for pair_id, ids, truncated in rows:
        seen[pair_id] = index = seen.get(pair_id, -1) + 1
        row = {"pair_id": pair_id, "temperature": temperature, "index": index, "answer_ids": ids, "answer": text}
        found.append({**row, "truncated": truncated})
    return pa.Table.from_pylist(found, schema=ANSWERS_SCHEMA)


def only(table: pa.Table, reference: pa.Table | None = None) -> SampleFindings:
    (found,) = describe(table, reference, model="policy", seed=0)
    return found


def test_length_does_not_count_the_end_token() -> None:
    """3 tokens and an end, 4 tokens cut off, an end alone: lengths 3, 4, 0."""
    found = only(answers(("a", [5, 6, 7, END], False), ("b", [5, 6, 7, 8], True), ("c", [END], False)))

    assert found.length.value == pytest.approx(7 / 3)
    assert found.length.n == 3
    assert found.truncated.value == pytest.approx(1 / 3)


def test_repetition_is_the_share_of_4_grams_that_came_before() -> None:
    """Seven times the same token: four 4-grams, three of them seen before. Three tokens have no 4-gram."""
    seven = ("a", [9] * 7, True)
    assert only(answers(seven, ("b", [9] * 7, True))).repetition.value == 3 / 4
    assert only(answers(seven, ("b", [9, 9, 9], True))).repetition.value == 3 / 8
    # 1 2 3 4 1 2 3 4: five 4-grams, the last is the first again.
    assert only(answers(seven, ("b", [1, 2, 3, 4, 1, 2, 3, 4], True))).repetition.value == pytest.approx(
        (3 / 4 + 1 / 5) / 2
    )


def test_repetition_within_an_answer_is_not_that_between_answers() -> None:
    """Two equal answers repeat nothing; together they have half as many different words as words."""
    found = only(answers(("a", [11, 12, 13, 14, 15], True), ("b", [11, 12, 13, 14, 15], True)))

    assert found.repetition.value == 0.0
    assert found.distinct_1 == 5 / 10
    assert found.distinct_2 == 4 / 8


def test_distinct_pools_all_answers_and_skips_the_end() -> None:
    """[5 5 end], [5 6] cut off: 1-grams 5 5 5 6, 2-grams 55 56."""
    found = only(answers(("a", [5, 5, END], False), ("b", [5, 6], True)))

    assert found.distinct_1 == 2 / 4
    assert found.distinct_2 == 2 / 2


def test_distinct_of_no_token_is_0() -> None:
    """Where every answer is its end token alone, nothing is divided by nothing."""
    found = only(answers(("a", [END], False), ("b", [END], False)))

    assert (found.distinct_1, found.distinct_2, found.length.value) == (0.0, 0.0, 0.0)


@pytest.mark.parametrize(
    ("text", "is_empty"),
    [("", True), (" \n\t\u00a0", True), ("\u200b\u202e\x07\ufeff", True), ("a", False), ("\u200b。", False)],
)
def test_answer_without_a_visible_character_is_empty(text: str, is_empty: bool) -> None:
    """White space, controls, zero-width and direction marks show nothing; any letter or sign does."""
    assert only(answers(("a", [5, END], False), ("b", [5, END], False), text=text)).empty.value == float(is_empty)


def test_none_out_of_many_is_not_certainty() -> None:
    """0 of 20 cut off: Wilson's upper bound z^2 / (n + z^2) = 3.84 / 23.84; and 20 of 20 from the other side."""
    none = only(answers(*((f"p{i}", [5, END], False) for i in range(20)))).truncated
    every = only(answers(*((f"p{i}", [5, 6], True) for i in range(20)))).truncated

    assert (none.value, none.low, none.n) == (0.0, 0.0, 20)
    assert none.high == pytest.approx(3.8414588 / 23.8414588)
    assert (every.value, every.high) == (1.0, 1.0)
    assert every.low == pytest.approx(20 / 23.8414588)


def test_length_ratio_is_that_of_mean_lengths_on_the_prompts_of_both() -> None:
    """Policy 2 and 4, reference 1 and 3, of prompts a and b: 6 / 4. Prompt c is the policy's alone."""
    policy = answers(("a", [5, 5], True), ("b", [5] * 4, True), ("c", [5] * 50, True))
    reference = answers(("b", [5] * 3, True), ("a", [5], True))

    ratio = only(policy, reference).length_ratio

    assert ratio is not None
    assert (ratio.value, ratio.n) == (6 / 4, 2)
    # The prompts add (2 - 1.5) / 2 and (4 - 4.5) / 2: standard error 0.25, Student's t with one degree of freedom 12.7.
    assert ratio.low == 0.0
    assert ratio.high == pytest.approx(1.5 + 0.25 * 12.7062)


def test_interval_of_the_length_ratio_resamples_prompts() -> None:
    """Ratios 1 and 3 in turn over 400 prompts of equal reference length: mean 2, standard error 1 / 20."""
    policy = answers(*((f"p{i}", [5] * (10 if i % 2 else 30), True) for i in range(400)))
    reference = answers(*((f"p{i}", [5] * 10, True) for i in range(400)))

    ratio = only(policy, reference).length_ratio

    assert ratio is not None
    assert ratio.value == 2.0
    assert (ratio.low, ratio.high) == (pytest.approx(2 - 1.96 / 20, abs=0.01), pytest.approx(2 + 1.96 / 20, abs=0.01))


def test_one_prompt_leaves_the_length_ratio_open() -> None:
    """However often it is answered, nothing passes a rule by it."""
    ratio = only(answers(("a", [5] * 4, True)), answers(("a", [5] * 4, True))).length_ratio

    assert ratio is not None
    assert (ratio.value, ratio.low) == (1.0, 0.0)
    assert ratio.high > 10


def test_length_ratio_takes_several_answers_to_a_prompt_as_their_mean() -> None:
    """Policy 4; the reference's best of three, 1, 2 and 3, are 2 on average."""
    policy, reference = answers(("a", [5] * 4, True)), answers(*(("a", [5] * n, True) for n in (1, 2, 3)))

    ratio = only(policy, reference).length_ratio

    assert ratio is not None
    assert ratio.value == 2.0


def test_same_answers_have_a_length_ratio_of_1_without_doubt() -> None:
    """Paired by prompt: however much lengths vary, the interval is a point."""
    table = answers(*((f"p{i}", [5] * (i + 1), True) for i in range(30)))

    ratio = only(table, table).length_ratio

    assert ratio is not None
    assert (ratio.low, ratio.value, ratio.high) == (1.0, 1.0, 1.0)


def test_silent_reference_gives_a_finite_length_ratio() -> None:
    """All its answers are empty: they count as one token long, and the report stays JSON."""
    policy = answers(("a", [5] * 6, True), ("b", [5] * 8, True))
    found = only(policy, answers(("a", [END], False), ("b", [END], False)))

    assert found.length_ratio is not None
    assert found.length_ratio.value == 7.0
    json.dumps(asdict(found), allow_nan=False)


def test_reference_without_that_temperature_gives_no_length_ratio() -> None:
    """Answers of another temperature are another thing."""
    assert only(answers(("a", [5], True)), answers(("a", [5], True), temperature=0.5)).length_ratio is None


def test_temperatures_are_described_apart_coldest_first() -> None:
    """Tables come in any order."""
    table = pa.concat_tables(
        [
            answers(("a", [5] * 3, True)),
            answers(("a", [5], True), temperature=0.0),
            answers(("a", [5, 6], True), temperature=0.7),
        ]
    )

    found = describe(table, table, model="champion", seed=0)

    assert [(each.temperature, each.length.value) for each in found] == [(0.0, 1.0), (0.7, 2.0), (1.0, 3.0)]
    assert {each.model for each in found} == {"champion"}
    assert [each.length_ratio and each.length_ratio.value for each in found] == [1.0, 1.0, 1.0]


def test_order_of_the_answers_does_not_matter() -> None:
    """To the bit, intervals too."""
    random = np.random.Generator(np.random.PCG64(0))
    table = answers(*((f"p{i % 7}", random.integers(3, 9, size=1 + i % 5).tolist(), bool(i % 2)) for i in range(40)))
    mixed = table.take(pa.array(random.permutation(len(table))))

    assert describe(mixed, mixed, model="m", seed=3) == describe(table, table, model="m", seed=3)


def test_intervals_resample_prompts_not_answers() -> None:
    """Four equal answers to each of 50 prompts say no more than one: the interval is as wide, and half as wide it
    would be if they were independent."""
    lengths = np.random.Generator(np.random.PCG64(1)).integers(1, 40, size=50).tolist()
    once = only(answers(*((f"p{i}", [5] * n, True) for i, n in enumerate(lengths)))).length
    four = only(answers(*((f"p{i}", [5] * n, True) for i, n in enumerate(lengths) for _ in range(4)))).length

    assert (four.value, four.n) == (once.value, 200)
    assert four.high - four.low == pytest.approx(once.high - once.low, rel=0.05)


def test_divergence_by_hand() -> None:
    """Differences 1, 3, 2, 2 of prompts a a b b with 4, 4, 2, 2 tokens: mean 2; each prompt's deviations cancel."""
    policy, reference = np.array([-5.0, -2.0, -3.0, -4.0]), np.array([-6.0, -5.0, -5.0, -6.0])
    lengths = np.array([4.0, 4.0, 2.0, 2.0])

    apart = divergence(policy - reference, lengths, ["a", "b", "c", "d"])
    paired = divergence(policy - reference, lengths, ["a", "a", "b", "b"])

    assert apart is not None
    assert paired is not None
    assert apart.kl.value == paired.kl.value == 2.0
    assert apart.per_token == pytest.approx(8 / 12)
    # Sample variance 2/3 of four values, over four.
    assert apart.standard_error == pytest.approx((2 / 3 / 4) ** 0.5)
    # Under ten prompts by Student's t, here with 3 degrees of freedom.
    half = 3.1824 * (1 / 6) ** 0.5
    assert (apart.kl.low, apart.kl.high) == pytest.approx((2 - half, 2 + half))
    assert (paired.standard_error, paired.kl.n) == (0.0, 4)


def test_interval_of_the_divergence_is_1_96_standard_errors() -> None:
    """100 prompts, differences 1 and 3 in turn: standard deviation 1.00504, standard error a tenth of it."""
    differences = np.tile([1.0, 3.0], 50)

    found = divergence(differences, np.full(100, 5.0), [str(i) for i in range(100)])

    assert found is not None
    assert found.standard_error == pytest.approx((100 / 99) ** 0.5 / 10)
    assert found.kl.low == pytest.approx(2 - 1.959964 * found.standard_error)
    assert found.kl.high == pytest.approx(2 + 1.959964 * found.standard_error)
    assert found.per_token == pytest.approx(2 / 5)


def test_divergence_of_equal_log_probs_is_exactly_0() -> None:
    """Policy = reference, by the same scorer: no rounding is left over."""
    found = divergence(np.zeros(64), np.full(64, 30.0), [str(i) for i in range(64)])

    assert found is not None
    assert (found.kl.low, found.kl.value, found.kl.high, found.standard_error) == (0.0, 0.0, 0.0, 0.0)


def test_divergence_of_one_prompt_is_not_known() -> None:
    """One prompt says nothing about the next, however often it is answered."""
    assert divergence(-np.ones(3), np.ones(3), ["a", "a", "a"]) is None


def test_intervals_of_the_divergence_hold_what_they_promise() -> None:
    """Of 1,000 simulated evaluations with prompts that differ (50 prompts, 3 answers each), 95 % hold the truth."""
    random = np.random.Generator(np.random.PCG64(7))
    prompts = [str(i // 3) for i in range(150)]
    held = 0
    for _ in range(1000):
        differences = 4.0 + np.repeat(random.normal(0, 2, 50), 3) + random.normal(0, 1, 150)
        found = divergence(differences, np.ones(150), prompts)
        assert found is not None
        held += found.kl.low <= 4.0 <= found.kl.high
    # Three standard errors of a share of 1,000 are 2 %; 50 clusters cost about 0.5 %.
    assert 0.925 <= held / 1000 <= 0.97


def test_turn_ends_are_the_last_tokens_of_whole_answers() -> None:
    """An answer that was cut ends anywhere."""
    pairs = pa.table({"chosen_ids": [[7, 2], [8, 9], [7, 3], [4, 2]], "truncated_chosen": [False, True, False, False]})

    assert turn_ends(pairs) == (2, 3)
