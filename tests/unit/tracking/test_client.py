"""What is shown and recorded of addresses."""

from __future__ import annotations

import pytest

from dpo_train.tracking.client import redacted, redacted_addresses


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("postgresql://user:secret@host/db", "postgresql://***@host/db"),
        ("http://user:se@cret@host:5000", "http://***@host:5000"),
        ("postgresql+psycopg2://user:se/cret@host/db", "postgresql+psycopg2://***@host/db"),
        ("postgresql://host/db?user=me&password=secret", "postgresql://host/db?user=me&password=***"),
        ("https://host/v1?api_key=secret&x=1", "https://host/v1?api_key=***&x=1"),
        ("API request to http://u:secret@h/api failed: see http://v:secret@h2/x", None),
        ("http://host:5000", "http://host:5000"),
        ("sqlite:////home/me@work/b.db", "sqlite:////home/me@work/b.db"),
        ("s3://bucket/a?b", "s3://bucket/a?b"),
    ],
)
def test_logins_and_keys_of_addresses_are_shown_nowhere(text: str, shown: str | None) -> None:
    """A password may hold an @, or a slash where SQLAlchemy reads it, or stand in the query."""
    assert "secret" not in redacted(text)
    assert "cret" not in redacted(text)
    assert shown is None or redacted(text) == shown


def test_only_what_is_an_address_as_a_whole_is_redacted() -> None:
    """A system prompt with an @ is the user's text; a config is recorded so that it can be run again."""
    prompt = "Answer as //you@ would, see http://u:p@h ."
    tree = {"judge": {"url": "https://u:p@host/v1", "prompt": prompt}, "list": ["ftp://u:p@h", 1, None]}
    assert redacted_addresses(tree) == {
        "judge": {"url": "https://***@host/v1", "prompt": prompt},
        "list": ["ftp://***@h", 1, None],
    }
