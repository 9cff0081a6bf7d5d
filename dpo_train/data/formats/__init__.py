"""One raw record to candidate pairs, for every format in which preference data is published.

    sample of records --resolve--> format name
    record --FORMATS[name].read--> PreferencePair or Rejection, at least one

A reader takes a record apart (plain, transcripts, ranked, votes), `messages` reads its turns, `assemble` makes the pair
and holds it to the rules. docs/data.md has the tables for users.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dpo_train.config import SourceConfig
from dpo_train.data.formats.detect import FORMATS, detect, resolve
from dpo_train.data.formats.reasons import REASONS, RejectedError, reject
from dpo_train.data.formats.values import Columns, kind
from dpo_train.data.pairs import PreferencePair, Rejection

__all__ = ["FORMATS", "REASONS", "candidates", "detect", "resolve"]


def candidates(record: Any, source: SourceConfig, format: str) -> list[PreferencePair | Rejection]:
    """The candidate pairs of one record, in a fixed order; at least one. Never raises, whatever the record is.

    A record that gives no pair is one rejection. One with ranked answers gives a candidate for each pair of them or one
    for their whole ranking, by ``pairing``, and a rejection for each answer that cannot be used.

    Args:
        record: a decoded record, or the Rejection of the reader, which passes through.
        source: its fields, pairing, min_strength and group_key.
        format: a name in FORMATS, from ``resolve``.
    """
    if isinstance(record, Rejection):
        return [record]
    if not isinstance(record, Mapping):
        return [reject("not_an_object", f"got {kind(record)}, expected an object with named fields")]
    try:
        return FORMATS[format].read(Columns(record, source.fields or {}), source)
    except RejectedError as error:
        return [error.rejection]
