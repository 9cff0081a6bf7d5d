"""Outputs at s3:// as such: copies that are out of date, machines at work on the same output, names of every kind."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pytest

from dpo_train import storage
from dpo_train.artifacts import Artifact, Output, Summary, discard, local_copy, open_artifact, produce, void
from dpo_train.data import shards
from dpo_train.errors import StoreError
from tests.s3.proxy import Proxy
from tests.s3.server import Server


def on(machine: Path) -> None:
    """This process is that machine from now on: it has its own disk."""
    storage.use(storage.Options(cache=str(machine)))


def writing(text: str, **more: str) -> Callable[[Output], Summary]:
    """A body that writes ``content`` and other files."""

    def body(out: Output) -> Summary:
        for name, content in {"content": text, **more}.items():
            (out.path / name).parent.mkdir(parents=True, exist_ok=True)
            (out.path / name).write_text(content)
        return Summary()

    return body


def make(home: str, body: Callable[[Output], Summary], **more: bool) -> Artifact:
    return produce("train", {"a": 1}, {}, home, body, scratch=("scratch",), **more)


def test_an_output_made_again_elsewhere_is_fetched_again(direct: Server, tmp_path: Path) -> None:
    """Names and sizes are the same, the content is not: neither its maker nor its reader keeps the old copy."""
    home = direct.bucket("again") + "/store/out"
    on(tmp_path / "maker")
    assert make(home, writing("old")).file("content").read_text() == "old"
    on(tmp_path / "reader")
    assert open_artifact(home).file("content").read_text() == "old"
    storage.delete([entry.path for entry in storage.list_files(home)])
    on(tmp_path / "other")
    make(home, writing("new"))

    for machine in ("maker", "reader", "other"):
        on(tmp_path / machine)
        assert open_artifact(home).file("content").read_text() == "new"
        assert (open_artifact(home).path / "content").read_text() == "new"


def test_pairs_laid_out_for_training_are_of_the_making_that_is_read(
    direct: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same identity made twice: what was mapped into memory of the first is not taken for the second."""
    monkeypatch.setattr(shards, "HELD_BYTES", 0)
    home = direct.bucket("pairs") + "/store/out"
    on(tmp_path)

    def pairs_with(token: int) -> Callable[[Output], Summary]:
        def body(out: Output) -> Summary:
            ids = pa.array([[token]], pa.list_(pa.int32()))
            table = pa.table({"pair_id": ["0"], "prompt_ids": ids, "chosen_ids": ids, "rejected_ids": ids})
            shard = shards.write_shard(table, out.path / "train-00000.parquet")
            out.write_json(shards.SHARDS_FILE, shards.manifest({"train": [shard]}))
            return Summary()

        return body

    for token in (5, 6):
        made = make(home, pairs_with(token))
        assert shards.Split(made, "train").pairs()[0].prompt_ids.tolist() == [token]
        void(made)


def test_what_was_removed_from_the_bucket_is_not_gone_on_from(direct: Server, tmp_path: Path) -> None:
    """The copy of an interrupted output is no start for the next one once somebody has removed the output."""
    home = direct.bucket("removed") + "/store/out"
    on(tmp_path)

    def cut(out: Output) -> Summary:
        writing("half")(out)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        make(home, cut, resumable=True)
    seen = []

    def look(out: Output) -> Summary:
        seen.append((out.path / "content").exists())
        return Summary()

    storage.delete([entry.path for entry in storage.list_files(home)])
    make(home, look, resumable=True)
    assert seen == [False]


def test_of_two_machines_at_once_the_first_to_complete_has_made_it(direct: Server, tmp_path: Path) -> None:
    """The slower one drops its own, and what its record would have said; both see the same files."""
    home = direct.bucket("both") + "/store/out"

    def overtaken(out: Output) -> Summary:
        on(tmp_path / "quick")
        make(home, writing("quick", extra="more"))
        on(tmp_path / "slow")
        return writing("slow!")(out)

    on(tmp_path / "slow")
    made = make(home, overtaken)

    assert made.reused
    assert made.record.files == {"content": 5, "extra": 4}
    for machine in ("slow", "quick"):
        on(tmp_path / machine)
        assert open_artifact(home).file("content").read_text() == "quick"
    assert direct.objects("both")["store/out/content"] == b"quick"


def test_names_of_every_kind_survive(direct: Server, tmp_path: Path) -> None:
    """What means something in an address, in a shell or in a pattern is only a name."""
    names = ["a b+c", "100%2F", "q?x=1&y", "#1", "[0-9]*", "naïve/日本", "a&b<c>", "quote'\"", "~tilde", "semi;colon"]
    home = direct.bucket("names") + "/st%20ore +/out"
    on(tmp_path / "one")
    make(home, writing("", **{name: name for name in names}))

    on(tmp_path / "two")
    artifact = open_artifact(home)
    assert {name: artifact.file(name).read_text() for name in names} == {name: name for name in names}
    assert sorted(direct.objects("names")) == sorted(
        f"st%20ore +/out/{name}" for name in [*names, "content", "claim.json", "record.json"]
    )


def test_scratch_is_removed_also_where_a_listing_lags(s3_server: Server, proxied: Proxy, tmp_path: Path) -> None:
    """What this machine knows to have published needs no listing; what it learns by one is removed as well."""
    home = s3_server.bucket("scratch") + "/store/out"
    on(tmp_path)
    for name in ("scratch/here", "scratch/elsewhere"):
        (local_copy(home) / name).parent.mkdir(parents=True, exist_ok=True)
        (local_copy(home) / name).write_text("x")
        storage.upload(local_copy(home) / name, f"{home}/{name}")
    (local_copy(home) / "scratch/elsewhere").unlink()
    proxied.fault("GET", "list-type", "empty_listing", 1)

    discard(home, "scratch")
    assert list(s3_server.objects("scratch")) == ["store/out/scratch/elsewhere"]
    discard(home, "scratch")
    assert s3_server.objects("scratch") == {}


def test_an_address_with_other_things_is_refused(direct: Server, tmp_path: Path) -> None:
    """A folder of somebody's files, and an output of another config: neither is touched."""
    home = direct.bucket("others") + "/store/out"
    on(tmp_path)
    direct.client().put_object(Bucket="others", Key="store/out/thesis.txt", Body=b"x")
    with pytest.raises(StoreError, match="is not empty and not an output of ours"):
        make(home, writing("x"))
    direct.client().delete_object(Bucket="others", Key="store/out/thesis.txt")
    make(home, writing("x"))
    with pytest.raises(StoreError, match=r"belongs to another run of `train`.*a was 1, is now 2"):
        produce("train", {"a": 2}, {}, home, writing("y"))
    assert direct.objects("others")["store/out/content"] == b"x"


def test_looking_whether_an_output_is_complete_costs_one_request(
    s3_server: Server, proxied: Proxy, tmp_path: Path
) -> None:
    """And so does a small file; a reader's second look at a file costs none."""
    home = s3_server.bucket("few") + "/store/out"
    on(tmp_path / "one")
    make(home, writing("x"))
    on(tmp_path / "two")
    proxied.clear()

    artifact = make(home, writing("y"))

    assert artifact.reused
    assert len(proxied.seen) == 1
    artifact.file("content")
    artifact.file("content")
    assert len(proxied.seen) == 2
