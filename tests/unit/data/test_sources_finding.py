"""What a source's path means, what is said when nothing usable is there, and the digest of what is."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import socket
import tempfile
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dpo_train.config import SourceConfig
from dpo_train.data.sources import plan, source_digest
from dpo_train.errors import DataError
from tests.unit.data.test_sources import GOOD, read


def names(path: Path | str, **options: str) -> list[str]:
    """The files that a path means, in order."""
    blocks = plan(SourceConfig(path=str(path), **options), 0)  # type: ignore[arg-type]
    return list(dict.fromkeys(block.name for block in blocks))


def fill(root: Path, *files: str) -> Path:
    """Files of one record each."""
    for file in files:
        (root / file).parent.mkdir(parents=True, exist_ok=True)
        (root / file).write_bytes(GOOD)
    return root


def test_files_of_a_folder_are_listed_by_name(tmp_path: Path) -> None:
    """At any depth, in an order that does not depend on the disk; hidden, other and describing files are left alone."""
    fill(
        tmp_path, "b.jsonl", "a.json", "sub/c.JSONL", "sub.jsonl/d.jsonl", ".hidden.jsonl", ".git/e.jsonl", "notes.txt"
    )
    fill(tmp_path, "dataset_infos.json")
    assert names(tmp_path) == ["a.json", "b.jsonl", "sub.jsonl/d.jsonl", "sub/c.JSONL"]


def test_one_file_is_named_by_its_name(tmp_path: Path) -> None:
    """Its folder says nothing about the records."""
    assert names(fill(tmp_path, "a.jsonl") / "a.jsonl") == ["a.jsonl"]


@pytest.mark.parametrize(
    ("pattern", "found"),
    [
        ("*.jsonl", ["a.jsonl", "b.jsonl"]),
        ("[!b]*.jsonl", ["a.jsonl"]),
        ("*/c.jsonl", ["sub/c.jsonl"]),
        ("**/*.jsonl", ["a.jsonl", "b.jsonl", "sub/c.jsonl", "sub/deep/d.jsonl"]),
        ("**", ["a.jsonl", "b.jsonl", "sub/c.jsonl", "sub/deep/d.jsonl"]),
        ("s?b", ["sub/c.jsonl", "sub/deep/d.jsonl"]),
        ("s?b/deep/d.jsonl", ["sub/deep/d.jsonl"]),
    ],
)
def test_globs(tmp_path: Path, pattern: str, found: list[str]) -> None:
    """Names are relative to the folder before the first sign; a folder that matches is looked into."""
    fill(tmp_path, "a.jsonl", "b.jsonl", "sub/c.jsonl", "sub/deep/d.jsonl", ".hidden.jsonl", "readme.md")
    assert names(tmp_path / pattern) == found


def test_a_file_whose_name_looks_like_a_glob_is_that_file(tmp_path: Path) -> None:
    """What exists wins."""
    fill(tmp_path, "a[1].jsonl", "a1.jsonl")
    assert names(tmp_path / "a[1].jsonl") == ["a[1].jsonl"]


def test_empty_files_beside_others_are_no_records(tmp_path: Path) -> None:
    """An empty shard is nothing lost."""
    fill(tmp_path, "a.jsonl")
    (tmp_path / "b.jsonl").touch()
    assert names(tmp_path) == ["a.jsonl"]


def test_links_to_files_and_folders_are_followed(tmp_path: Path) -> None:
    """The hub's local cache is made of them."""
    fill(tmp_path, "blobs/x.jsonl", "set/b.jsonl")
    (tmp_path / "set/a.jsonl").symlink_to("../blobs/x.jsonl")
    (tmp_path / "set/sub").symlink_to("../blobs")
    assert names(tmp_path / "set") == ["a.jsonl", "b.jsonl", "sub/x.jsonl"]


def _fifo(path: Path) -> None:
    os.mkfifo(path)


def _socket(path: Path) -> None:
    # The address of a socket is short.
    with socket.socket(socket.AF_UNIX) as server, contextlib.chdir(path.parent):
        server.bind(path.name)


def _in(name: str, make: Callable[[Path], object]) -> Callable[[Path], object]:
    """The same inside of a folder, beside a good file."""

    def made(path: Path) -> None:
        fill(path, "good.jsonl")
        make(path / name)

    return made


UNUSABLE: dict[str, tuple[str, Callable[[Path], object], str]] = {
    "nothing": ("x.jsonl", lambda path: None, "There is no data at"),
    "glob without match": ("*.jsonl", lambda path: None, "nothing that is not hidden"),
    "other file": ("x.txt", Path.touch, r"is no data file.*x\.txt"),
    "no suffix": ("jsonl", Path.touch, "is no data file"),
    "compressed table": ("x.parquet.gz", Path.touch, "is no data file"),
    "empty file": ("x.jsonl", Path.touch, "is empty"),
    "empty compressed file": ("x.csv.gz", Path.touch, "is empty"),
    "empty folder": ("x", Path.mkdir, "nothing that is not hidden"),
    "folder named like a file": ("x.jsonl", Path.mkdir, "nothing that is not hidden"),
    "folder of other files": ("x", lambda path: fill(path, "a.txt", "b.md"), r"Got: a\.txt, b\.md"),
    "folder of hidden files": ("x", lambda path: fill(path, ".a.jsonl"), "nothing that is not hidden"),
    "folder of empty files": ("x", lambda path: (fill(path, "a.jsonl") / "a.jsonl").write_bytes(b""), "is empty"),
    "bz2": ("x", lambda path: fill(path, "a.jsonl", "b.jsonl.bz2"), r"another way\. Got: b\.jsonl\.bz2"),
    "dangling link": ("x.jsonl", lambda path: path.symlink_to("nowhere"), "a link to nothing"),
    "dangling link inside": (
        "x",
        _in("y.jsonl", lambda path: path.symlink_to("nowhere")),
        r"y\.jsonl.*a link to nothing",
    ),
    "link to itself": ("x.jsonl", lambda path: path.symlink_to(path.name), "symbolic links"),
    "link to itself inside": ("x", _in("y.jsonl", lambda path: path.symlink_to(path.name)), "symbolic links"),
    "link back": ("x", _in("y", lambda path: path.symlink_to("..")), "leads back"),
    "link to its own folder": ("x", _in("y", lambda path: path.symlink_to(".")), "leads back"),
    "link back below a glob": ("x/**/*.jsonl", lambda path: (path.parents[1] / "y").symlink_to(".."), "leads back"),
    "pipe": ("x.jsonl", _fifo, "a pipe"),
    "pipe inside": ("x", _in("y.jsonl", _fifo), r"y\.jsonl cannot be read.*a pipe"),
    "socket": ("x.jsonl", _socket, "a socket"),
    "below a file": ("x.jsonl/y.jsonl", lambda path: path.parent.touch(), "There is no data at"),
    "name too long": ("y" * 300 + ".jsonl", lambda path: None, "File name too long"),
}


@pytest.mark.parametrize("case", UNUSABLE)
def test_nothing_usable_is_an_error_that_says_what_was_found(tmp_path: Path, case: str) -> None:
    """It never hangs, and the path stands in the message."""
    name, make, message = UNUSABLE[case]
    path = tmp_path / name
    if "**" in name:
        (tmp_path / "x").mkdir()
        make(tmp_path / "x" / "x" / "x")
    else:
        make(path)
    with pytest.raises(DataError, match=message) as caught:
        plan(SourceConfig(path=str(path)), 0)
    assert str(tmp_path) in str(caught.value)


def test_a_device_is_no_file(tmp_path: Path) -> None:
    """Reading it would never end."""
    (tmp_path / "x.jsonl").symlink_to("/dev/zero")
    with pytest.raises(DataError, match="a device"):
        plan(SourceConfig(path=str(tmp_path / "x.jsonl")), 0)


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("gs://bucket/x", "gs://bucket/x is no place that can be read"),
        ("https://host/x.jsonl", r"https://host/x\.jsonl is no place that can be read"),
        ("a\0b.jsonl", "cannot be read: embedded null byte"),
    ],
)
def test_places_that_cannot_be_read(path: str, message: str) -> None:
    """Other schemes, and what is no path."""
    with pytest.raises(DataError, match=message):
        plan(SourceConfig(path=path), 0)


def test_a_name_that_is_not_utf8_is_an_error(tmp_path: Path) -> None:
    """Records carry the name of their file."""
    (tmp_path / os.fsdecode(b"\xff.jsonl")).write_bytes(GOOD)
    with pytest.raises(DataError, match="is not UTF-8"):
        plan(SourceConfig(path=str(tmp_path)), 0)


def _as_another_user(work: Callable[[], object]) -> str:
    """The error of some work, done by a process that is not root; empty if there is none."""
    reader, writer = os.pipe()
    if (child := os.fork()) == 0:
        message = ""
        try:
            if os.geteuid() == 0:
                os.setuid(65534)
            work()
        except DataError as error:
            message = str(error)
        except BaseException as error:
            message = f"unexpected: {error!r}"
        os.write(writer, message.encode())
        os._exit(0)
    os.close(writer)
    os.waitpid(child, 0)
    with os.fdopen(reader, "rb") as stream:
        return stream.read().decode()


@pytest.mark.parametrize("which", ["file", "folder", "parent"])
def test_no_permission_is_an_error(which: str) -> None:
    """For the file, for a folder that should be listed, and for one on the way."""
    root = Path(tempfile.mkdtemp())
    try:
        root.chmod(0o755)
        file = fill(root, "set/sub/a.jsonl") / "set/sub/a.jsonl"
        locked = {"file": file, "folder": file.parent, "parent": file.parent}[which]
        locked.chmod(0o000)
        path = root / "set" if which == "folder" else file
        message = _as_another_user(lambda: plan(SourceConfig(path=str(path)), 0))
        locked.chmod(0o755)
    finally:
        shutil.rmtree(root)
    assert "cannot be read" in message
    assert "ermission" in message


def _save(folder: Path, texts: list[str], shards: int = 2) -> None:
    """A folder as `datasets` saves it, with the shards' names in an order that is not alphabetical."""
    folder.mkdir(parents=True)
    files = [f"data-{shards - i}.arrow" for i in range(shards)]
    step = -(-len(texts) // shards)
    for i, file in enumerate(files):
        table = pa.table({"n": texts[i * step : (i + 1) * step]})
        with pa.ipc.new_stream(str(folder / file), table.schema) as writer:
            writer.write_table(table)
    (folder / "dataset_info.json").write_text("{}")
    (folder / "state.json").write_text(json.dumps({"_data_files": [{"filename": file} for file in files]}))


def test_a_saved_data_set_is_read_in_its_own_order(tmp_path: Path) -> None:
    """By its state, which leaves out files that only lie there."""
    _save(tmp_path / "set", ["a", "b", "c"])
    shutil.copy(tmp_path / "set/data-1.arrow", tmp_path / "set/cache-1.arrow")
    assert [value["n"] for _, value in read(tmp_path / "set")] == ["a", "b", "c"]
    assert names(tmp_path / "set") == ["data-2.arrow", "data-1.arrow"]


def test_the_split_of_a_saved_data_set_is_read(tmp_path: Path) -> None:
    """`hub_split` names it; without the name, what there is is listed."""
    _save(tmp_path / "set/train", ["a"], shards=1)
    _save(tmp_path / "set/test", ["b"], shards=1)
    (tmp_path / "set/dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    assert read(tmp_path / "set") == [(1, {"n": "a"})]
    assert read(tmp_path / "set", hub_split="test") == [(1, {"n": "b"})]
    with pytest.raises(DataError, match=r"no split 'validation'.*\['train', 'test'\]"):
        read(tmp_path / "set", hub_split="validation")


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ("{", "state.json.*is broken"),
        ("[]", "is broken"),
        ('{"_data_files": [{}]}', "is broken"),
        ('{"_data_files": [{"filename": "gone.arrow"}]}', "no such file"),
        ('{"_data_files": [], "_indices_data_files": [{"filename": "i.arrow"}]}', "selection of rows"),
        ('{"_data_files": []}', "is empty"),
    ],
)
def test_a_broken_saved_data_set_is_an_error(tmp_path: Path, state: str, message: str) -> None:
    """Its description is broken, or a file is gone."""
    _save(tmp_path / "set", ["a"])
    (tmp_path / "set/state.json").write_text(state)
    with pytest.raises(DataError, match=message):
        read(tmp_path / "set")


def test_a_folder_that_datasets_saved_is_read_as_datasets_reads_it(tmp_path: Path) -> None:
    """The real package writes it; nested values and nulls included."""
    datasets = pytest.importorskip("datasets")
    records = [
        {"prompt": [{"role": "user", "content": f"q{i}"}], "score": None if i % 2 else i / 3} for i in range(2500)
    ]
    datasets.disable_progress_bars()
    datasets.DatasetDict(train=datasets.Dataset.from_list(records)).save_to_disk(
        tmp_path / "set", num_shards={"train": 2}
    )
    assert [value for _, value in read(tmp_path / "set")] == records


def test_digest_is_the_content_wherever_it_lies(tmp_path: Path) -> None:
    """A copy has the same; another byte, name or file does not."""
    first, second = (fill(tmp_path / name, "a.jsonl", "sub/b.jsonl", ".hidden") for name in ("one", "two"))

    def digest(path: Path) -> str:
        return source_digest(SourceConfig(path=str(path)))

    before = digest(first)
    assert before == digest(second)
    assert digest(first / "a.jsonl") == digest(second / "a.jsonl") != before
    (second / ".hidden").write_text("something else")
    assert before == digest(second)
    (second / "a.jsonl").write_bytes(GOOD.replace(b"1", b"2"))
    assert before != digest(second)
    (second / "a.jsonl").write_bytes(GOOD)
    (second / "sub/b.jsonl").rename(second / "sub/c.jsonl")
    assert before != digest(second)


def test_digest_of_what_is_not_there_is_an_error(tmp_path: Path) -> None:
    """In the words of the plan."""
    with pytest.raises(DataError, match="There is no data at"):
        source_digest(SourceConfig(path=str(tmp_path / "absent")))


def test_file_that_vanished_after_planning_is_an_error(tmp_path: Path) -> None:
    """A worker says which file."""
    pq.write_table(pa.table({"a": [1]}), tmp_path / "a.parquet")
    fill(tmp_path, "b.jsonl")
    blocks = plan(SourceConfig(path=str(tmp_path)), 0)
    for file in tmp_path.iterdir():
        file.unlink()
    from dpo_train.data.sources import read_block

    for block in blocks:
        with pytest.raises(DataError, match=f"{block.name}.* cannot be read: No such file"):
            list(read_block(block))


@pytest.mark.parametrize("name", ["", "a.jsonl", "*.jsonl"])
def test_split_of_plain_files_is_refused(tmp_path: Path, name: str) -> None:
    """Folder, file and glob: asked for `test`, all of them would be read."""
    (tmp_path / "a.jsonl").write_text("{}\n")
    with pytest.raises(DataError, match="hub_split has no meaning"):
        plan(SourceConfig(path=str(tmp_path / name), hub_split="test"), 0)
