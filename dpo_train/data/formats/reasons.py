"""Every reason for which a record or a candidate pair is not used."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from dpo_train.data.pairs import Rejection

REASONS: Mapping[str, str] = MappingProxyType(
    {
        # reading
        "undecodable": "bytes that are no record of the file's format, or text that UTF-8 cannot hold",
        "record_too_large": "the record is larger than the reader takes",
        "not_an_object": "the record is a list, a text or a number, not an object with fields",
        # fields
        "missing_field": "a field that the format needs is absent or null",
        "wrong_type": "a field holds another kind of value than the format says",
        "not_text": "a message has an image or another part that is not text",
        # content
        "empty_prompt": "there is no prompt, or the turn to be answered has no visible character",
        "empty_answer": "an answer has no visible character and no tool call",
        "identical_answers": "chosen and rejected are the same",
        "prompt_differs": "chosen and rejected do not answer the same prompt",
        "roles_out_of_order": "turns stand in an order that no conversation has, or an answer is more than one turn",
        "last_turn_not_assistant": "the answer's last turn is not the assistant's",
        # preference
        "tie": "neither answer is preferred",
        "too_few_answers": "fewer than two answers with a score or rank can be used",
        "below_min_strength": "the preference is weaker than min_strength",
        "chosen_scored_lower": "the record's own scores contradict its preference",
        # tokens
        "end_token_in_answer": "an answer spells the end-of-sequence token",
        "template_refused": "the chat template raised an error, or changes the prompt once an answer follows",
        "prompt_too_long": "the prompt has more tokens than max_prompt_tokens, and prompt_truncation is drop",
        "answer_too_long": "an answer has more tokens than max_answer_tokens, and answer_truncation is drop",
        "identical_after_truncation": "chosen and rejected differ only in what was cut off, or not at all as tokens",
        # selection
        "evaluation_overlap": "the prompt shares an n-gram with an evaluation prompt",
        "duplicate": "the same pair came before",
        "contradiction": "the same two answers to the same prompt are preferred the other way round elsewhere",
        "prompt_in_heldout": "the prompt is also in the held-out split",
        "prompt_in_validation": "the prompt is also in the validation split",
        "over_limit": "the split already has max_train_pairs (or validation, held-out) pairs",
        "over_weight": "the source already has its share of the training pairs",
    }
)
"""Reason code -> what it means. Codes are counted in records and reports, and never change their meaning."""

MAX_DETAIL = 200
"""Characters of a rejection's detail: enough to find the fault, too few to copy a record into a report."""


class RejectedError(Exception):
    """Ends the reading of one candidate; never leaves this package."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(reason, detail)
        self.rejection = reject(reason, detail)


def reject(reason: str, detail: str = "") -> Rejection:
    """A rejection whose detail is short and can be stored: it may quote a field that UTF-8 cannot hold."""
    return Rejection(reason, detail[:MAX_DETAIL].encode(errors="backslashreplace").decode())
