"""What a source's path means: the data files behind a file, a folder, a glob, a bucket's prefix or a saved data set."""

from __future__ import annotations

import fnmatch
import json
import os
import re
import stat
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from dpo_train import storage
from dpo_train.config import SourceConfig
from dpo_train.errors import DataError, DpoError, first_line

TEXT_KINDS = {".jsonl": "jsonl", ".ndjson": "jsonl", ".json": "json", ".csv": "csv", ".tsv": "tsv"}
TABLE_KINDS = {".parquet": "parquet", ".arrow": "arrow"}
COMPRESSIONS = {".gz": "gz", ".zst": "zst"}
EXPECTED = ".jsonl .ndjson .json .csv .tsv (also .gz .zst), .parquet or .arrow"
_NAME_IT = "name the file by what is in it, or write it as one of these"

# Data that would be left out without a word.
_OTHER_COMPRESSIONS = (".bz2", ".xz", ".zip", ".lz4", ".7z", ".snappy", ".br")
# Descriptions that stand beside the data of published data sets.
_DESCRIPTIONS = ("dataset_info.json", "dataset_infos.json")
_MAGIC = re.compile(r"[*?\[]")


@dataclass(frozen=True, slots=True)
class DataFile:
    """One file of a source; ``etag`` is the content's tag that a bucket gives."""

    name: str
    path: str
    size_bytes: int
    etag: str = ""

    @property
    def kind(self) -> tuple[str, str]:
        """Kind and compression, by the name."""
        kind = kind_of(self.name)
        assert kind is not None
        return kind


def kind_of(name: str) -> tuple[str, str] | None:
    """Kind and compression of a data file by its name; None for other files."""
    stem, suffix = os.path.splitext(name.lower())  # noqa: PTH122 # a name, not a path
    if suffix in TABLE_KINDS:
        return TABLE_KINDS[suffix], ""
    if suffix not in COMPRESSIONS:
        return (TEXT_KINDS[suffix], "") if suffix in TEXT_KINDS else None
    inner = os.path.splitext(stem)[1]  # noqa: PTH122
    return (TEXT_KINDS[inner], COMPRESSIONS[suffix]) if inner in TEXT_KINDS else None


def find_files(source: SourceConfig) -> list[DataFile]:
    """The data files of a source, in the order of their names (a saved data set: in its own order).

    Raises:
        DataError: there is nothing, or nothing that we can read.
    """
    path = source.path
    if storage.is_remote(path):
        return _find_remote(path, source.hub_split)
    if "://" in path:
        raise DataError(
            f"{path} is no place that can be read",
            expected="a path here, or an address that begins with s3:// or hf://",
            fix="copy the data to one of these places",
        )
    try:
        return _find_local(Path(path), source.hub_split)
    except DpoError:
        raise
    except (OSError, ValueError) as error:
        at, words = getattr(error, "filename", None), getattr(error, "strerror", None) or first_line(error)
        raise DataError(f"{at or path} cannot be read: {words}", fix="check the path and its permissions") from None


def _find_local(root: Path, split: str) -> list[DataFile]:
    if not _exists(root) and _MAGIC.search(str(root)):
        _check_no_split(split, f"{root}")
        parts = root.parts
        fixed = next(i for i, part in enumerate(parts) if _MAGIC.search(part))
        base = Path(*parts[:fixed])
        return _choose(_below(_matches(base, list(parts[fixed:]), ())), base, f"{root}")
    if not _exists(root):
        raise DataError(
            f"There is no data at {root}",
            expected="a file, a folder or a glob that matches one",
            fix="check the path (prepare.path, or the path of one of prepare.sources)",
        )
    if not root.is_dir():
        if not kind_of(root.name):
            raise DataError(f"{root} is no data file", got=_what_it_is(root), expected=EXPECTED, fix=_NAME_IT)
        _check_no_split(split, f"{root}")
        return [_data_file(root, root.parent)]
    saved = saved_files(str(root), lambda name: _read_or_none(root / name), split)
    if saved is not None:
        return [_data_file(root / name, root) for name in saved]
    _check_no_split(split, f"{root}")
    return _choose(_walk(root, ()), root, f"{root}")


def _check_no_split(split: str, where: str) -> None:
    """Files have no splits to choose from: all of them would be read, whatever was asked for."""
    if split != SourceConfig.hub_split:
        raise DataError(
            f"hub_split has no meaning for the files at {where}",
            got=split,
            expected="a data set of the hub, or one that `datasets` saved",
            fix="leave hub_split out, and name the files of that split (a glob such as data/test-*.parquet)",
        )


def _exists(path: Path) -> bool:
    """Whether something is there, be it a link to nothing; an OSError if that cannot be told."""
    try:
        path.lstat()
    except (FileNotFoundError, NotADirectoryError):
        return False
    return True


def _choose(files: Iterator[Path], root: Path, where: str) -> list[DataFile]:
    found = sorted((file.relative_to(root).as_posix(), file) for file in files)
    chosen = set(choose_names([name for name, _ in found], where))
    return [_data_file(file, root) for name, file in found if name in chosen]


def choose_names(names: list[str], where: str) -> list[str]:
    """The names of data files among all that were found.

    Raises:
        DataError: none is, or data is compressed in a way that we cannot read.
    """
    packed = [
        name for name in names if name.lower().endswith(_OTHER_COMPRESSIONS) and kind_of(PurePosixPath(name).stem)
    ]
    if packed:
        raise DataError(
            f"Data at {where} is compressed in another way",
            got=_some(packed),
            expected=EXPECTED,
            fix="compress it with gzip or zstd, or move it elsewhere",
        )
    chosen = [name for name in names if kind_of(name) and PurePosixPath(name).name not in _DESCRIPTIONS]
    if not chosen:
        got = _some(names) if names else "nothing that is not hidden"
        raise DataError(f"No data file at {where}", got=got, expected=EXPECTED, fix=f"check the path; {_NAME_IT}")
    return chosen


def _some(names: list[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def _walk(folder: Path, parents: tuple[tuple[int, int], ...]) -> Iterator[Path]:
    """Files below a folder; hidden ones are skipped, links followed, unless they lead back."""
    parents = _entered(folder, parents)
    for child in sorted(folder.iterdir()):
        if child.name.startswith("."):
            continue
        if child.is_dir():
            yield from _walk(child, parents)
        else:
            yield child


def _entered(folder: Path, parents: tuple[tuple[int, int], ...]) -> tuple[tuple[int, int], ...]:
    status = folder.stat()
    key = status.st_dev, status.st_ino
    if key in parents:
        raise DataError(f"{folder} is a link that leads back to a folder above it", fix="remove the link")
    return (*parents, key)


def _matches(folder: Path, parts: list[str], parents: tuple[tuple[int, int], ...]) -> Iterator[Path]:
    """Paths below a folder that match a glob's parts; hidden ones only where the pattern says so."""
    if not parts:
        yield folder
        return
    if not folder.is_dir():
        return
    part, rest = parts[0], parts[1:]
    if not _MAGIC.search(part):
        yield from _matches(folder / part, rest, ()) if _exists(folder / part) else ()
        return
    deep = part == "**"
    if deep:
        parents = _entered(folder, parents)
        yield from _matches(folder, rest, ())
    for child in sorted(folder.iterdir()):
        if child.name.startswith(".") and not part.startswith("."):
            continue
        if deep and rest and child.is_dir():
            yield from _matches(child, parts, parents)
        elif not deep and fnmatch.fnmatchcase(child.name, part):
            yield from _matches(child, rest, ())


def _below(matches: Iterator[Path]) -> Iterator[Path]:
    """Each match once; of a folder, the files in it."""
    for match in dict.fromkeys(matches):
        if match.is_dir():
            yield from _walk(match, ())
        else:
            yield match


def _data_file(file: Path, root: Path) -> DataFile:
    """A file that can be opened.

    Raises:
        DataError: it is a dangling link, no regular file, or not ours to read.
    """
    try:
        status = file.stat()
    except OSError:
        raise DataError(
            f"{file} cannot be read", got=_what_it_is(file), fix="mend it, remove it or copy the data again"
        ) from None
    if not stat.S_ISREG(status.st_mode):
        raise DataError(
            f"{file} cannot be read", got=_what_it_is(file), expected="a file", fix="write its data to a file"
        )
    if not os.access(file, os.R_OK):
        raise DataError(f"{file} cannot be read", got="no permission", fix="make it readable")
    try:
        str(file).encode()
    except UnicodeEncodeError:
        raise DataError(f"The name {os.fsencode(file)!r} is not UTF-8", fix="rename the file or folder") from None
    return DataFile(file.relative_to(root).as_posix(), str(file), status.st_size)


def _what_it_is(file: Path) -> str:
    try:
        mode = file.stat().st_mode
    except FileNotFoundError:
        return "a link to nothing" if file.is_symlink() else "no such file"
    except OSError as error:
        return error.strerror or first_line(error)
    kinds = {"a pipe": stat.S_ISFIFO, "a device": stat.S_ISCHR, "a disk": stat.S_ISBLK, "a socket": stat.S_ISSOCK}
    return next((kind for kind, is_it in kinds.items() if is_it(mode)), f"a file {file.name}")


def _read_or_none(file: Path) -> bytes | None:
    return file.read_bytes() if file.is_file() else None


def saved_files(where: str, read: Callable[[str], bytes | None], split: str) -> list[str] | None:
    """The Arrow files, in their order, of a folder that `datasets` saved; None if it is not such a folder.

    Raises:
        DataError: it has no such split, or its description is broken.
    """
    content, folder = read("dataset_dict.json"), ""
    if content is not None:
        splits = _described(where, "dataset_dict.json", content, "splits")
        if split not in splits:
            raise DataError(
                f"The data set at {where} has no split {split!r}",
                got=splits,
                fix="set prepare.hub_split to one of them",
            )
        folder = f"{split}/"
    state = read(f"{folder}state.json") if read(f"{folder}dataset_info.json") is not None else None
    if state is None:
        if folder:
            raise DataError(f"The data set at {where} is not whole", got=f"no {folder}state.json", fix="save it again")
        return None
    return [f"{folder}{file}" for file in _described(where, f"{folder}state.json", state, "_data_files")]


def _described(where: str, name: str, content: bytes, key: str) -> list[str]:
    try:
        described = json.loads(content)
    except (ValueError, RecursionError):
        described = None
    found = described.get(key) if isinstance(described, dict) else None
    entries = found if isinstance(found, list) else [None]
    names = [item.get("filename") if isinstance(item, dict) else item for item in entries]
    if not all(isinstance(name, str) for name in names):
        raise DataError(
            f"{name} at {where} is broken",
            got=repr(content[:80].decode(errors="replace")),
            expected=f"JSON as `datasets` saves it, with a list {key}",
            fix="copy or save the data set again",
        )
    if described.get("_indices_files") or described.get("_indices_data_files"):
        raise DataError(
            f"The data set at {where} is a selection of rows that an old `datasets` saved", fix="save it again"
        )
    return [str(name) for name in names]


def _find_remote(path: str, split: str) -> list[DataFile]:
    if _MAGIC.search(path):
        entries = [entry for entry in storage.glob(path) if not entry.path.endswith("/")]
        parts = path.split("/")
        root = "/".join(parts[: next(i for i, part in enumerate(parts) if _MAGIC.search(part))])
    else:
        entry = None if path.endswith("/") else storage.info(path)
        if entry is not None:
            entries, root = [entry], path.rpartition("/")[0]
        else:
            entries, root = storage.list_files(path), path.rstrip("/")
    if not entries:
        raise DataError(f"There is no data at {path}", fix="check the bucket and the prefix; a prefix ends at a /")
    by_name = {entry.path.removeprefix(f"{root}/"): entry for entry in entries}
    names = [name for name in sorted(by_name) if not any(part.startswith(".") for part in name.split("/"))]
    saved = saved_files(path, lambda name: storage.read_bytes(by_name[name].path) if name in by_name else None, split)
    if saved is None:
        _check_no_split(split, path)
    chosen = saved if saved is not None else choose_names([name for name in names if not name.endswith("/")], path)
    absent = [name for name in chosen if name not in by_name]
    if absent:
        raise DataError(f"The data set at {path} is not whole", got=f"no {_some(absent)}", fix="copy it again")
    return [DataFile(name, by_name[name].path, by_name[name].size, by_name[name].etag) for name in chosen]
