"""The evaluation in this process: whom it asks, what it compares, and when it asks again."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dpo_train.artifacts import Artifact
from dpo_train.config import EndpointJudge, FunctionJudge, RunConfig
from dpo_train.data.shards import Split
from dpo_train.errors import ConfigError, RunError
from dpo_train.findings import Champion
from dpo_train.model.load import merged_model
from dpo_train.stages import evaluate, prepare, score_reference, train
from dpo_train.stages.evaluate import ChampionModel
from dpo_train.stages.evaluate_samples import distinct_prompts
from dpo_train.stages.executor import InProcess, TableFunction
from tests.tiny import tiny_config, tiny_model, tiny_tokenizer, write_pairs

LOCAL = InProcess()

Made = tuple[RunConfig, Artifact, Artifact]


class Counting(InProcess):
    """Counts the tasks that models were given; may die after so many calls."""

    def __init__(self, *, calls_to_live: int = 1000) -> None:
        self.calls, self._calls_to_live = 0, calls_to_live

    def map_tables(
        self, make: Callable[[], TableFunction], tables: Sequence[pa.Table], *, uses_model: bool
    ) -> Iterator[pa.Table]:
        if self.calls == self._calls_to_live:
            raise KeyboardInterrupt
        self.calls += 1
        return super().map_tables(make, tables, uses_model=uses_model)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """A policy, with sets of two names: the pairs it is trained on, and others that are all held out."""
    root = tmp_path_factory.mktemp("evaluate")
    write_pairs(root / "far.jsonl", 60, seed=7)
    text = (root / "far.jsonl").read_text().replace("tell me", "please tell me")
    (root / "far.jsonl").write_text(text)
    config = tiny_config(root)
    one = {"group_key": "conversation"}
    sources = [{"path": str(root / "pairs.jsonl"), "name": "near", **one}]
    sources.append({"path": str(root / "far.jsonl"), "name": "far", "split": "heldout", **one})
    config = tiny_config(root, prepare__path=None, prepare__group_key=None, prepare__sources=sources)
    scored = score_reference(config, prepare(config, LOCAL), LOCAL)
    return config, scored, train(config, scored, LOCAL)


def with_(config: RunConfig, **changes: Any) -> RunConfig:
    return replace(config, evaluate=replace(config.evaluate, **changes))


def gated(config: RunConfig, **rules: Any) -> RunConfig:
    return with_(config, gate=replace(config.evaluate.gate, **rules))


def report_of(artifact: Artifact) -> dict[str, Any]:
    report: dict[str, Any] = json.loads(artifact.file("report.json").read_text())
    return report


def champion_of(folder: Path, digest: str = "d") -> ChampionModel:
    return ChampionModel(about=Champion(name="tiny", version="3", digest=digest), fetch=lambda: folder)


def test_sets_by_name_and_the_drop_outside_the_training_distribution(made: Made) -> None:
    """The set of which no pair is trained on is known as such; the headline's n is that of the other alone."""
    findings = report_of(evaluate(*made, LOCAL))["findings"]

    near, far = sorted(findings["sets"], key=lambda each: str(each["name"]), reverse=True)
    assert (near["name"], near["is_trained_on"], far["name"], far["is_trained_on"]) == ("near", True, "far", False)
    assert far["accuracy"]["n"] == 60
    assert findings["heldout"]["accuracy"] == near["accuracy"]
    assert far["drop"]["value"] == pytest.approx(far["accuracy"]["value"] - near["accuracy"]["value"])
    assert near["drop"] is None


def test_answers_of_policy_and_reference_are_kept_with_the_output(made: Made) -> None:
    """4 prompts by 2 models; the KL and the lengths rest on them."""
    output = evaluate(*made, LOCAL)

    answers = pq.read_table(output.file("answers.parquet")).to_pylist()
    assert sorted({row["model"] for row in answers}) == ["policy", "reference"]
    assert len(answers) == 8
    findings = report_of(output)["findings"]
    assert findings["divergence"]["kl"]["n"] == 4
    assert [each["model"] for each in findings["samples"]] == ["policy", "reference"]
    assert "work" not in {path.name for path in output.path.iterdir()}


def test_policy_that_is_its_reference_has_no_divergence(made: Made) -> None:
    """One step at a learning rate of next to nothing: ratios, KL and the gain in likelihood are 0."""
    config, scored, _ = made
    same = replace(config, train=replace(config.train, learning_rate=1e-30, max_steps=1))

    findings = report_of(evaluate(same, scored, train(same, scored, LOCAL), LOCAL))["findings"]

    assert findings["divergence"]["kl"]["value"] == pytest.approx(0, abs=1e-5)
    assert findings["heldout"]["likelihood"]["difference"]["value"] == 0
    assert len({each["length"]["value"] for each in findings["samples"]}) == 1


def test_champion_that_is_the_policy_is_neither_better_nor_worse(made: Made, tmp_path: Path) -> None:
    """The merged policy as its own champion: not one pair decides between them, and no set has lost anything."""
    config, scored, policy = made
    merged_model(config.model, policy.path).save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)

    output = evaluate(gated(config, max_set_loss=0.3), scored, policy, LOCAL, champion=champion_of(tmp_path))

    report = report_of(output)
    paired = report["findings"]["heldout"]["champion"]
    assert (paired["difference"]["value"], paired["better"], paired["worse"], paired["p_value"]) == (0, 0, 0, 1)
    assert report["findings"]["champion"]["version"] == "3"
    rules = [rule for rule in report["verdict"]["rules"] if "far" in rule["rule"] or "near" in rule["rule"]]
    assert [rule["outcome"] for rule in rules] == ["passed", "passed"]
    assert output.record.inputs["champion"] == "d"


def test_champion_of_other_tokens_is_compared_by_its_answers_alone(made: Made, tmp_path: Path) -> None:
    """Its chat template differs, so its log-probs are those of other tokens: a note says so."""
    config, scored, policy = made
    tiny_model(tmp_path, seed=5)
    template = tiny_tokenizer().chat_template.replace("<|im_start|>", "<|im_start|>==")
    tiny_tokenizer(chat_template=template).save_pretrained(tmp_path)
    (tmp_path / "chat_template.jinja").write_text(template)

    report = report_of(evaluate(config, scored, policy, LOCAL, champion=champion_of(tmp_path)))

    assert report["findings"]["heldout"]["champion"] is None
    assert "champion" in {each["model"] for each in report["findings"]["samples"]}
    assert "reads other tokens" in report["findings"]["notes"][0]


def test_champion_that_cannot_read_the_pairs_is_asked_nothing(made: Made, tmp_path: Path) -> None:
    """Without a chat template: a note says so, and it takes part in no comparison, which a rule might pass by."""
    config, scored, policy = made
    tiny_model(tmp_path, seed=5)
    (tmp_path / "chat_template.jinja").unlink(missing_ok=True)
    tiny_tokenizer(chat_template=None).save_pretrained(tmp_path)
    counting = Counting()

    report = report_of(evaluate(config, scored, policy, counting, champion=champion_of(tmp_path, "no template")))

    assert counting.calls == 2
    assert {each["model"] for each in report["findings"]["samples"]} == {"policy", "reference"}
    assert report["findings"]["notes"][0].startswith("The champion is not compared")


def test_champion_of_another_template_stops_at_the_end_of_its_own_turns(made: Made, tmp_path: Path) -> None:
    """Its turns end in a token of their own, which is neither its tokenizer's end of sequence nor the policy's."""
    config, scored, policy = made
    tiny_model(tmp_path, seed=5)
    template = tiny_tokenizer().chat_template.replace("<|im_end|>", "<|pad|>")
    tiny_tokenizer(chat_template=template).save_pretrained(tmp_path)
    (tmp_path / "chat_template.jinja").write_text(template)
    found: list[tuple[int, ...]] = []

    class Listening(InProcess):
        def map_tables(self, make: Any, tables: Any, *, uses_model: bool) -> Iterator[pa.Table]:
            if make.args[1].name == "champion":
                found.append(make.args[1].end_ids)
            return super().map_tables(make, tables, uses_model=uses_model)

    evaluate(config, scored, policy, Listening(), champion=champion_of(tmp_path, "other end"))

    assert found == [(tiny_tokenizer().pad_token_id,)]


def test_pairs_that_another_model_scored_are_refused(made: Made, tmp_path: Path) -> None:
    """Its log-probs would be measured against those of another reference."""
    config, scored, policy = made
    other = replace(config, model=replace(config.model, path=str(tiny_model(tmp_path / "other", seed=9))))

    with pytest.raises(ConfigError, match="scored by another model"):
        evaluate(other, scored, policy, LOCAL)


def test_pairs_that_were_scored_in_another_dtype_are_refused(made: Made) -> None:
    """As on a GPU: a policy in fp32 would differ from such a reference by rounding alone."""
    config, scored, policy = made
    record = replace(scored.record, config={**scored.record.config, "compute_dtype": "bfloat16"})

    with pytest.raises(ConfigError, match="another dtype"):
        evaluate(config, replace(scored, record=record), policy, LOCAL)


def test_answers_are_of_different_groups(made: Made) -> None:
    """Two pairs of one conversation are not independent, and one prompt of each is asked."""
    _, scored, _ = made
    heldout = Split(scored, "heldout").table()

    asked = distinct_prompts(heldout, 1000)

    groups = asked["group"].to_pylist()
    assert len(set(groups)) == len(groups) == len(set(heldout["group"].to_pylist()))


def test_without_a_champion_its_rules_do_not_apply(made: Made) -> None:
    """The gate passes, and says which rules it left out."""
    config, scored, policy = made

    report = report_of(evaluate(gated(config, max_set_loss=0.02), scored, policy, LOCAL))

    assert report["verdict"]["passed"]
    assert {rule["outcome"] for rule in report["verdict"]["rules"]} == {"passed", "not_applied"}


def test_interrupted_evaluation_asks_only_what_it_has_no_answer_to(made: Made, tmp_path: Path) -> None:
    """Cut short between policy and reference: the policy is not asked again, and the report is that of an unbroken
    one."""
    config, scored, policy = made
    broken, going_on, unbroken = Counting(calls_to_live=1), Counting(), Counting()
    with pytest.raises(KeyboardInterrupt):
        evaluate(config, scored, policy, broken, output=tmp_path / "out")

    resumed = evaluate(config, scored, policy, going_on, output=tmp_path / "out")

    whole = evaluate(config, scored, policy, unbroken, output=tmp_path / "whole")
    assert (broken.calls, going_on.calls, unbroken.calls) == (1, 1, 2)
    assert report_of(resumed)["findings"] == report_of(whole)["findings"]
    np.testing.assert_array_equal(*(pq.read_table(each.file("margins.parquet"))["margin"] for each in (resumed, whole)))


def test_judge_compares_with_reference_data_and_best_of_several(
    made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A function that rewards length, over 4 prompts: wins, ties and losses add up against each opponent, and the best
    of 3 wins no less often than the first of them."""
    (tmp_path / "length_judge.py").write_text("def reward(prompt, answer):\n    return len(answer)\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])  # on which the judge puts the folder
    config, scored, policy = made
    judge = FunctionJudge(kind="function", function="length_judge:reward")

    output = evaluate(with_(config, judge=judge, best_of=3), scored, policy, LOCAL)

    found = {each["opponent"]: each for each in report_of(output)["findings"]["comparisons"]}
    assert set(found) == {"reference", "chosen", "best of 3"}
    assert all(each["wins"] + each["ties"] + each["losses"] == 4 for each in found.values())
    assert found["best of 3"]["win_rate"]["value"] <= found["reference"]["win_rate"]["value"]
    # Answers that only best-of-N wants are no part of what the reference's answers look like.
    assert {each["length"]["n"] for each in report_of(output)["findings"]["samples"]} == {4}


def test_how_fast_a_judge_is_asked_changes_no_identity(made: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    """Limits and prices are not what the verdict hangs on; the judge's model is."""
    monkeypatch.setenv("OPENAI_API_KEY", "no key")
    config, scored, policy = made
    judge = EndpointJudge(kind="endpoint", url="http://127.0.0.1:9/v1", model="m", attempts=1)
    addresses = set()
    for changes in ({}, {"parallel": 1, "max_requests": 3, "price_per_million_input": 2.0}, {"model": "other"}):
        with pytest.raises(RunError, match="judge") as caught:
            evaluate(with_(config, judge=replace(judge, **changes)), scored, policy, LOCAL)
        assert "127.0.0.1:9" in str(caught.value)
    for claim in (Path(config.store) / "evaluate").glob("*/claim.json"):
        content = json.loads(claim.read_text())["config"]
        if content["judge"] is not None and content["judge"].get("kind") == "endpoint":
            addresses.add(claim.parent.name)

    assert len(addresses) == 2


def test_safety_set_that_does_not_exist_is_refused_before_a_model_is_asked(made: Made) -> None:
    """A rule over nothing would always pass."""
    config, scored, policy = made
    counting = Counting()

    with pytest.raises(ConfigError, match=r"safety_sets.*Got: safe.*far, near"):
        evaluate(gated(config, safety_sets=("safe",)), scored, policy, counting)

    assert counting.calls == 0


def test_answer_that_may_not_fit_a_row_is_refused(made: Made) -> None:
    """The message says which number to raise."""
    config, scored, policy = made

    with pytest.raises(ConfigError, match=r"evaluate.row_tokens to \d+"):
        evaluate(with_(config, max_sample_tokens=250), scored, policy, LOCAL)
