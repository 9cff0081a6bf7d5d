"""The prepare stage: many sources and buckets, nothing lost, and what people see of it."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dpo_train.artifacts import Artifact
from dpo_train.config import RunConfig, SourceConfig
from dpo_train.data import work
from dpo_train.data.pairs import SPLITS
from dpo_train.data.shards import Split
from dpo_train.errors import ConfigError, DataError, DpoError
from dpo_train.progress import ENVIRONMENT_KEY
from dpo_train.stages import prepare
from dpo_train.stages.executor import InProcess, TableFunction
from tests.tiny import tiny_config
from tests.unit.data.records import RECORD

LOCAL = InProcess()


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    return tiny_config(tmp_path_factory.mktemp("prepare"))


def with_data(config: RunConfig, folder: Path, **changes: Any) -> RunConfig:
    """The config over other data, with a store of its own and splits by prompt."""
    section = replace(config.prepare, **{"group_key": None, **changes})
    return replace(config, store=str(folder / "store"), prepare=section)


def write_lines(path: Path, records: list[Any]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def pair(index: int, **changes: Any) -> dict[str, Any]:
    return {"prompt": f"tell me about cat {index}", "chosen": "kind", "rejected": "rude", **changes}


def used_ids(made: Artifact) -> dict[str, list[str]]:
    return {split: sorted(Split(made, split).table(["pair_id"])["pair_id"].to_pylist()) for split in SPLITS}


def rejections(made: Artifact) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (made.path / "rejections.jsonl").read_text().splitlines()]


def test_many_blocks_and_buckets_give_what_one_gives(
    config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Blocks of 300 bytes, three to a task, parts of 7 records and buckets of 4 kB: the same pairs, rejections with the
    same line numbers, the same counts and the same report."""
    records = [pair(i) for i in range(60)]
    records += [pair(5), pair(7, chosen="rude", rejected="kind"), pair(9, chosen="same", rejected="same"), {"x": 1}]
    data = write_lines(tmp_path / "pairs.jsonl", records)
    data.write_text(data.read_text() + "\n{broken\n")
    one = prepare(with_data(config, tmp_path / "one", path=str(data)), LOCAL)
    monkeypatch.setattr("dpo_train.data.sources.base.BLOCK_BYTES", 300)
    monkeypatch.setattr(work, "CANDIDATES_AT_ONCE", 7)
    stage = sys.modules[prepare.__module__]
    monkeypatch.setattr(stage, "BLOCK_BYTES", 700)
    monkeypatch.setattr(stage, "MOST_OPEN_FILES", 3)
    monkeypatch.setattr(work, "PART_BYTES", 1)
    monkeypatch.setattr(work, "BUCKET_BYTES", 4000)

    many = prepare(with_data(config, tmp_path / "many", path=str(data)), LOCAL)

    assert len(Split(many, "train").shards) > 5
    assert used_ids(many) == used_ids(one)
    assert rejections(many) == rejections(one)
    assert [(r["line"], r["reason"]) for r in rejections(one)] == [
        (8, "contradiction"),
        (61, "duplicate"),
        (62, "contradiction"),
        (63, "identical_answers"),
        (64, "missing_field"),
        (66, "undecodable"),
    ]
    assert many.record.counts == one.record.counts
    reports = [json.loads((made.path / "report.json").read_text()) for made in (one, many)]
    assert reports[0] == reports[1]
    assert not (many.path / "work").exists()


class Counting(InProcess):
    """Counts how often workers are asked for."""

    asked = 0

    def map_tables(
        self, make: Callable[[], TableFunction], tables: Sequence[pa.Table], *, uses_model: bool
    ) -> Iterator[pa.Table]:
        self.asked += 1
        return super().map_tables(make, tables, uses_model=uses_model)


def test_workers_decide_buckets_only_where_there_are_many(
    config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They take seconds to start; who decides makes no difference to the output."""
    data = write_lines(tmp_path / "pairs.jsonl", [pair(i) for i in range(60)])
    monkeypatch.setattr(work, "BUCKET_BYTES", 4000)
    few, many = Counting(), Counting()
    near = prepare(with_data(config, tmp_path / "near", path=str(data)), few)
    monkeypatch.setattr(sys.modules[prepare.__module__], "MOST_BUCKETS_NEAR", 1)
    far = prepare(with_data(config, tmp_path / "far", path=str(data)), many)
    assert 1 < len(Split(near, "train").shards) <= 16
    assert (few.asked, many.asked) == (1, 2)
    assert used_ids(near) == used_ids(far)
    assert near.record.counts == far.record.counts


def test_order_of_pairs_in_a_shard_is_that_of_their_ids(config: RunConfig, tmp_path: Path) -> None:
    """So that the bytes of an output do not depend on which worker was faster."""
    made = prepare(
        with_data(config, tmp_path, path=str(write_lines(tmp_path / "a.jsonl", [pair(i) for i in range(50)]))), LOCAL
    )
    ids = Split(made, "train").table()["pair_id"].to_pylist()
    assert ids == sorted(ids)


def test_sources_have_their_own_format_split_and_weight(config: RunConfig, tmp_path: Path) -> None:
    """80 plain pairs and 30 votes at 2 to 1 in training, and a set that is held out whatever its prompts."""
    plain = write_lines(tmp_path / "plain.jsonl", [pair(i) for i in range(80)])
    votes = write_lines(
        tmp_path / "votes.jsonl",
        [
            {"question": f"dog {i}", "conversation_a": _talk(f"dog {i}", "calm"), "winner": "model_a",
             "conversation_b": _talk(f"dog {i}", "mean")}
            for i in range(30)
        ],
    )  # fmt: skip
    own = write_lines(tmp_path / "own.jsonl", [{"q": f"sea {i}", "a": "fair", "b": "dull"} for i in range(10)])
    sources = (
        SourceConfig(path=str(plain), weight=2.0),
        SourceConfig(path=str(votes), weight=1.0),
        SourceConfig(path=str(own), fields={"prompt": "q", "chosen": "a", "rejected": "b"}, split="heldout"),
    )

    made = prepare(with_data(config, tmp_path, path=None, sources=sources), LOCAL)

    assert made.record.details["formats"] == ["pairs", "arena", "pairs"]
    train = Split(made, "train").table()["dataset"].to_pylist()
    assert (train.count(0), train.count(2)) == (2 * train.count(1), 0)
    heldout = Split(made, "heldout").table()
    assert heldout["dataset"].to_pylist().count(2) == 10
    counts = made.record.counts
    assert counts["records"] == 120 == counts["used"] + counts["rejected"]
    assert counts["rejected"] == counts["rejected/over_weight"] > 0
    assert set(made.record.inputs) == {"data/0", "data/1", "data/2", "tokenizer"}


def _talk(question: str, answer: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def test_ranked_record_counts_once_and_its_pairs_each(config: RunConfig, tmp_path: Path) -> None:
    """Three answers of ranks 1, 2, 2: two pairs and a tie. records = used + rejected, candidates = kept + rejected."""
    answers = [{"answer": "kind", "rank": 1.0}, {"answer": "rude", "rank": 2.0}, {"answer": "cold", "rank": 2.0}]
    data = write_lines(
        tmp_path / "ranked.jsonl",
        [{"prompt": f"\n\nHuman: cat {i}\n\nAssistant: ", "answers": answers} for i in range(20)]
        + [{"prompt": "\n\nHuman: dog\n\nAssistant: ", "answers": answers[:1]}],
    )

    counts = prepare(with_data(config, tmp_path, path=str(data), pairing="all"), LOCAL).record.counts

    assert (counts["records"], counts["used"], counts["rejected"]) == (21, 20, 1)
    assert counts["candidate_pairs"] == counts["kept_pairs"] + counts["rejected_pairs"]
    assert counts["kept_pairs"] == 40
    assert counts["rejected/too_few_answers"] == 1


LINE = st.one_of(
    RECORD.map(lambda record: json.dumps(record).encode()),
    st.binary(max_size=40),
    st.sampled_from(
        [b"", b"{", b"\xef\xbb\xbf{}", b"[]", b"\x00", b"null", b'{"prompt": "a", "chosen": "b", "rejected": "c"}']
    ),
)


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(lines=st.lists(LINE, max_size=25), newline=st.sampled_from([b"\n", b"\r\n"]), end=st.booleans())
def test_arbitrary_bytes_are_used_or_rejected(
    config: RunConfig, tmp_path_factory: pytest.TempPathFactory, lines: list[bytes], newline: bytes, end: bool
) -> None:
    """Whatever a file holds: every line that is not blank is a record, which is used or rejected with a reason; every
    candidate pair is kept or rejected; every rejection is written down."""
    folder = tmp_path_factory.mktemp("bytes")
    good = [json.dumps(pair(i)).encode() for i in range(12)]  # so that something is left to train on
    content = newline.join([*good, *lines]) + (newline if end else b"")
    (folder / "data.jsonl").write_bytes(content)
    made = prepare(with_data(config, folder, path=str(folder / "data.jsonl"), format="pairs"), LOCAL)
    counts = made.record.counts
    blank = sum(not line.strip() for line in content.split(b"\n"))
    assert counts["records"] == len(content.split(b"\n")) - blank == counts["used"] + counts["rejected"]
    assert counts["candidate_pairs"] == counts["kept_pairs"] + counts["rejected_pairs"]
    assert counts["kept_pairs"] == sum(counts[f"pairs/{split}"] for split in SPLITS)
    assert counts["rejected_pairs"] == len(rejections(made))
    assert counts["rejected_pairs"] == sum(n for name, n in counts.items() if name.startswith("rejected/"))


def test_appended_records_move_nothing(config: RunConfig, tmp_path: Path) -> None:
    """Yesterday's held-out pairs are held out today."""
    before = prepare(
        with_data(config, tmp_path, path=str(write_lines(tmp_path / "a.jsonl", [pair(i) for i in range(60)]))), LOCAL
    )
    after = prepare(
        with_data(config, tmp_path, path=str(write_lines(tmp_path / "a.jsonl", [pair(i) for i in range(90)]))), LOCAL
    )
    old, new = used_ids(before), used_ids(after)
    assert before.record.digest != after.record.digest
    assert all(set(old[split]) <= set(new[split]) for split in SPLITS)
    assert sum(map(len, new.values())) == 90


def test_evaluation_prompts_are_kept_out(config: RunConfig, tmp_path: Path) -> None:
    """A pair that shares four words in a row with a benchmark's prompt is rejected, and says which."""
    (tmp_path / "benchmark.txt").write_text("please explain why the sky is so blue today\n")
    records = [pair(i) for i in range(30)] + [pair(0, prompt="I ask you why the sky is grey")]
    data = write_lines(tmp_path / "a.jsonl", records)
    changes = {"evaluation_prompts": str(tmp_path / "benchmark.txt"), "evaluation_ngram": 4}
    made = prepare(with_data(config, tmp_path, path=str(data), **changes), LOCAL)
    assert [(r["line"], r["reason"], r["detail"]) for r in rejections(made)] == [
        (31, "evaluation_overlap", "why the sky is")
    ]
    assert "evaluation_prompts" in made.record.inputs


def test_users_chat_template_is_part_of_the_identity_by_its_text(config: RunConfig, tmp_path: Path) -> None:
    """The same text elsewhere is the same; another text gives other tokens."""
    data = str(write_lines(tmp_path / "a.jsonl", [pair(i) for i in range(30)]))
    turns = "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}<|im_end|>{% endfor %}"
    text = turns + "{% if add_generation_prompt %}[assistant]{% endif %}"
    for name, content in (("one", text), ("two", text), ("three", "Z" + text)):
        (tmp_path / name).write_text(content)
    made = {
        name: prepare(with_data(config, tmp_path, path=data, chat_template=str(tmp_path / name)), LOCAL)
        for name in ("one", "two", "three")
    }
    assert made["one"].record.digest == made["two"].record.digest != made["three"].record.digest
    ids = {name: Split(artifact, "train").table()["prompt_ids"].to_pylist() for name, artifact in made.items()}
    assert ids["one"] != ids["three"]


def test_redacted_output_quotes_nobody(config: RunConfig, tmp_path: Path) -> None:
    """With prepare.redact neither the report nor the rejections hold a word of a record; the pairs themselves do."""
    records = [pair(i) for i in range(30)] + [{"prompt": "xyzzy", "chosen": "xyzzy", "rejected": "xyzzy", "xyzzy": 1}]
    records += [pair(99, chosen="xyzzy"), pair(99, chosen="xyzzy"), {"xyzzy": 1}]
    made = prepare(
        with_data(config, tmp_path, path=str(write_lines(tmp_path / "a.jsonl", records)), redact=True), LOCAL
    )
    for name in ("report.html", "report.json", "rejections.jsonl"):
        assert "xyzzy" not in (made.path / name).read_text()
    assert {r["reason"] for r in rejections(made)} == {"identical_answers", "duplicate", "missing_field"}


def test_unreadable_option_files_are_named(config: RunConfig, tmp_path: Path) -> None:
    """Before anything is read."""
    data = str(write_lines(tmp_path / "a.jsonl", [pair(1)]))
    for option in ("chat_template", "evaluation_prompts"):
        with pytest.raises(ConfigError, match=f"prepare.{option}"):
            prepare(with_data(config, tmp_path, path=data, **{option: str(tmp_path / "nowhere")}), LOCAL)


def test_data_that_change_meanwhile_are_noticed(config: RunConfig, tmp_path: Path) -> None:
    """A writer that appends while we read: the output would not be what its digest says."""
    data = write_lines(tmp_path / "a.jsonl", [pair(i) for i in range(20)])

    class Meddler(InProcess):
        def map_tables(self, make: Any, tables: Any, *, uses_model: bool) -> Any:
            yield from super().map_tables(make, tables, uses_model=uses_model)
            with data.open("a") as stream:
                stream.write(json.dumps(pair(21)) + "\n")

    with pytest.raises(DataError, match="changed while"):
        prepare(with_data(config, tmp_path, path=str(data)), Meddler())


def test_nothing_to_train_on_says_why(config: RunConfig, tmp_path: Path) -> None:
    """Counts by reason and the first example."""
    data = write_lines(tmp_path / "a.jsonl", [pair(i, chosen="same", rejected="same") for i in range(3)])
    with pytest.raises(DpoError, match=r"rejections: 3 identical_answers; .*a.jsonl") as caught:
        prepare(with_data(config, tmp_path, path=str(data)), LOCAL)
    assert caught.value.exit_code == 2


def test_store_in_the_data_folder_is_refused(config: RunConfig, tmp_path: Path) -> None:
    """Our own outputs would be read as data."""
    write_lines(tmp_path / "a.jsonl", [pair(1)])
    with pytest.raises(ConfigError, match="lies in the data folder"):
        prepare(with_data(config, tmp_path, path=str(tmp_path)), LOCAL)


@pytest.fixture
def zone() -> Iterator[Callable[[str], None]]:
    """Sets this process's time zone; the machine's own is back after the test."""
    with pytest.MonkeyPatch.context() as patch:

        def use(name: str) -> None:
            patch.setenv("TZ", name)
            time.tzset()

        yield use
    time.tzset()


def test_template_that_writes_the_day_makes_another_output_each_day(
    config: RunConfig, tmp_path: Path, zone: Callable[[str], None]
) -> None:
    """Yesterday's pairs have yesterday's date in their tokens; an option that fixes the date makes them last."""
    turns = "{% for m in messages %}{{ m['role'] }}{{ m['content'] }}<|im_end|>{% endfor %}"
    dated = (
        "{{ date_string or strftime_now('%d %b %Y') }}" + turns + "{% if add_generation_prompt %}assistant{% endif %}"
    )
    (tmp_path / "dated").write_text(dated)
    data = str(write_lines(tmp_path / "a.jsonl", [pair(i) for i in range(30)]))
    outputs: dict[str, list[Artifact]] = {"today's": [], "fixed": []}
    for name_of_zone in ("EAST-14", "WEST12"):  # 26 hours apart: at no time is it the same day in both
        zone(name_of_zone)
        for name, options in (("today's", None), ("fixed", {"date_string": "1 Jan 2026"})):
            changes = {"chat_template": str(tmp_path / "dated"), "template_options": options}
            outputs[name].append(prepare(with_data(config, tmp_path, path=data, **changes), LOCAL))
    east, west = outputs["today's"]
    assert east.record.digest != west.record.digest
    assert Split(east, "train").table(["prompt_ids"]) != Split(west, "train").table(["prompt_ids"])
    east, west = outputs["fixed"]
    assert east.record.digest == west.record.digest


def test_limits_beyond_what_the_model_reads_are_told_at_once(
    config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not only when the pairs are scored: the tiny model reads 256 tokens."""
    monkeypatch.setenv(ENVIRONMENT_KEY, str(tmp_path / "events.jsonl"))
    data = str(write_lines(tmp_path / "a.jsonl", [pair(i) for i in range(30)]))
    for most, told in ((192, False), (193, True)):
        (tmp_path / "events.jsonl").unlink(missing_ok=True)
        prepare(with_data(config, tmp_path, path=data, max_prompt_tokens=64, max_answer_tokens=most), LOCAL)
        assert ("The model reads 256 tokens" in (tmp_path / "events.jsonl").read_text()) is told
