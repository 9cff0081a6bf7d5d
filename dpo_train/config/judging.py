"""Who judges sampled answers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal, TypeAlias

from annotated_types import Ge
from pydantic import Field

from dpo_train.config.kinds import STRICT, Count, Positive, option

DEFAULT_PROMPTS = ("dialogue", "summary")


@dataclass(frozen=True, kw_only=True)
class FunctionJudge:
    """a Python function that rewards an answer"""

    __pydantic_config__ = STRICT

    kind: Literal["function"] = option(help="this kind of judge")
    function: str = option(help="package.module:name of a function (prompt: list of messages, answer: str) -> float")


@dataclass(frozen=True, kw_only=True)
class RewardModelJudge:
    """a sequence-classification model with one output"""

    __pydantic_config__ = STRICT

    kind: Literal["reward_model"] = option(help="this kind of judge")
    path: str = option(help="folder in the Hugging Face layout, here or at s3://, or a hub name")
    max_tokens: Count = option(2048, "a longer conversation loses its start")


@dataclass(frozen=True, kw_only=True)
class EndpointJudge:
    """a language model behind an OpenAI-compatible server"""

    __pydantic_config__ = STRICT

    kind: Literal["endpoint"] = option(help="this kind of judge")
    url: str = option(help="base address, e.g. https://host/v1")
    model: str = option(help="name of the model there")
    api_key_variable: str = option(
        "OPENAI_API_KEY", "environment variable with the key; where it is empty, no key is sent"
    )
    prompt: str = option(
        "dialogue", "dialogue or summary (after the DPO paper's), or a file of your own (docs/evaluation.md)"
    )
    temperature: Annotated[float, Ge(0)] = option(0.0, "of the judge")
    max_answer_tokens: Count = option(512, "longest reply of the judge")
    parallel: Count = option(4, "requests at the same time")
    requests_per_minute: Count | None = option(None, "at most this many requests a minute")
    timeout_seconds: Positive = option(60.0, "of one request")
    attempts: Count = option(5, "how often a request is tried, with growing pauses in between")
    max_requests: Count | None = option(None, "stop before this many requests are exceeded; what was judged is kept")
    max_cost: Positive | None = option(None, "stop before the prices below may add up to more than this")
    price_per_million_input: Annotated[float, Ge(0)] = option(0.0, "price of a million tokens that the judge reads")
    price_per_million_output: Annotated[float, Ge(0)] = option(0.0, "price of a million tokens that it writes")


JudgeConfig: TypeAlias = Annotated[FunctionJudge | RewardModelJudge | EndpointJudge, Field(discriminator="kind")]
