"""A judge made from a model: its first layers, frozen, and a logistic regression on what they say of the last token.

The judge is a model for sequence classification in the Hugging Face layout, with one output, the log-odds that an
answer is good; ``RewardModel`` loads it like any other. How a conversation becomes text is the tokenizer's template.
It may end with a cue: words after the answer that ask the model what the judge is to know.

    model -> first layers -> features of the last token -> regression -> head's weights -> folder

N examples, D features (the hidden size).
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from dpo_train.errors import ConfigError, DataError, ModelError, StoreError, first_line

BATCH_TOKENS = 4096
"""Of a batch, padding included."""

PENALTIES = tuple(10 ** (-power / 2) for power in range(8))
"""Strengths of the L2 penalty that are tried, the strongest first: 1 to 3e-4, where the loss is a mean."""

HELD_BACK = 5
"""One example in so many chooses the penalty."""

PLAIN = "{{ messages[:-1] | map(attribute='content') | join('\\n\\n') }}{{ messages[-1]['content'] }}"
"""A template of plain continuation: the answer stands directly after the prompt."""

Example = tuple[Sequence[Mapping[str, str]], str, bool]
"""Messages {role, content}, the answer, and whether it is good."""


@dataclass(frozen=True, kw_only=True)
class ProbeQuality:
    """How well a judge tells good answers from others, on examples that it has not seen.

    ``accuracy`` counts log-odds above 0 as good; ``auc`` is the chance that a good answer has higher log-odds than
    another, ties counted half, so that no threshold matters; ``n`` is the number of examples.
    """

    accuracy: float
    auc: float
    n: int


def train_probe(
    model: Path,
    examples: Sequence[Example],
    target: Path,
    *,
    heldout: Sequence[Example],
    layers: int,
    device: torch.device,
    seed: int,
    chat: bool = False,
    cue: str = "",
) -> ProbeQuality:
    """Writes a judge into the target folder, which appears whole or not at all.

    Args:
        model: folder of a causal language model and its tokenizer.
        heldout: for the quality. They share nothing with the examples: the caller's groups see to that.
        layers: how many of the model's are kept; later ones know more of the next word and less of the text.
        seed: of the split by which the penalty is chosen.
        chat: conversations are written by the model's chat template; else the answer directly after the prompt.
        cue: text after every conversation; the last token of it all is the one that is read.

    Raises:
        ConfigError: the model has fewer layers, or ``chat`` is asked for and it has no template.
        DataError: an example is empty, too long for the model or refused by its template, or all are of one kind.
        ModelError: the model cannot be loaded, or its family has no plain head.
        StoreError: the target is there already.
    """
    if target.exists():
        raise StoreError(f"{target} is there already", expected="a folder to make", fix="remove it, or name another")
    for name, some in (("train on", examples), ("measure on", heldout)):
        if len({is_good for _, _, is_good in some}) < 2:
            raise DataError(f"There is nothing to {name}", got=f"{len(some)} examples", expected="good and bad ones")
    tokenizer, classifier = _tokenizer(model, chat, cue), _first_layers(model, layers).to(device)
    features_ND = _features(classifier, tokenizer, [*examples, *heldout])
    labels_N = torch.tensor([float(is_good) for _, _, is_good in [*examples, *heldout]], dtype=torch.float64)
    count = len(examples)
    weights_D = fit(features_ND[:count], labels_N[:count], seed=seed)
    with torch.no_grad():
        classifier.score.weight.copy_(weights_D[None])
    _save(classifier, tokenizer, target)
    return quality(features_ND[count:] @ weights_D, labels_N[count:])


def fit(features_ND: torch.Tensor, labels_N: torch.Tensor, *, seed: int) -> torch.Tensor:
    """Weights [D] of the log-odds of label 1, float64: logistic regression, with the L2 penalty that predicts best.

    The penalty is chosen on one example in five, drawn with the seed; the weights are then those of all examples.
    """
    order = torch.randperm(len(labels_N), generator=torch.Generator().manual_seed(seed))
    back, rest = order[: max(1, len(order) // HELD_BACK)], order[len(order) // HELD_BACK :]
    losses = []
    for penalty in PENALTIES:
        weights_D = _regression(features_ND[rest], labels_N[rest], penalty)
        losses.append(float(F.binary_cross_entropy_with_logits(features_ND[back] @ weights_D, labels_N[back])))
    return _regression(features_ND, labels_N, PENALTIES[losses.index(min(losses))])


def _regression(features_ND: torch.Tensor, labels_N: torch.Tensor, penalty: float) -> torch.Tensor:
    """Minimises mean log-loss + penalty / 2 x |weights of the standardised features|^2.

    Heads for sequence classification have no bias. Hidden states lie far from zero in one common direction, that of
    their mean, and the weight along it acts as the bias: for features in units of their deviation, with mean m, a
    bias b is the weights b m / |m|^2, whose penalty b^2 / |m|^2 is next to nothing. So the regression is one without
    a bias, and what it fits is exactly what the head computes. The direction is rescaled while it is looked for: it
    is |m| times as steep as the others.
    """
    deviation_D = features_ND.std(dim=0)
    deviation_D = deviation_D.clamp(min=1e-6 * float(deviation_D.max()))
    scaled_ND = features_ND / deviation_D
    mean_D = scaled_ND.mean(dim=0)
    direction_D = F.normalize(mean_D, dim=0)
    shrink = (1 + mean_D.square().sum()).rsqrt() - 1
    unknown_D = torch.zeros_like(mean_D, requires_grad=True)
    optimizer = torch.optim.LBFGS([unknown_D], max_iter=500, tolerance_grad=1e-6, line_search_fn="strong_wolfe")

    def weights_D() -> torch.Tensor:
        return unknown_D + shrink * (direction_D @ unknown_D) * direction_D

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        weights = weights_D()
        loss = F.binary_cross_entropy_with_logits(scaled_ND @ weights, labels_N) + penalty / 2 * weights @ weights
        loss.backward()  # type: ignore[no-untyped-call]
        return loss

    optimizer.step(closure)  # type: ignore[no-untyped-call]
    return (weights_D() / deviation_D).detach()


def quality(log_odds_N: torch.Tensor, labels_N: torch.Tensor) -> ProbeQuality:
    """Accuracy and AUC of log-odds; both labels (0 and 1) are there."""
    good_N = labels_N > 0.5
    good, bad = log_odds_N[good_N], log_odds_N[~good_N].sort().values
    below = (torch.searchsorted(bad, good) + torch.searchsorted(bad, good, right=True)).double() / 2
    accuracy = ((log_odds_N > 0) == good_N).double().mean()
    return ProbeQuality(accuracy=float(accuracy), auc=float(below.mean()) / len(bad), n=len(labels_N))


def _first_layers(model: Path, layers: int) -> Any:
    """A sequence classifier of the first layers, its head at zero."""
    from transformers import AutoConfig, AutoModelForSequenceClassification
    from transformers.utils import logging

    try:
        config = AutoConfig.from_pretrained(model, trust_remote_code=False)
        depth = config.num_hidden_layers
    except (OSError, ValueError, AttributeError) as error:
        raise ModelError(f"The model in {model} cannot be loaded: {first_line(error)}") from error
    if not 1 <= layers <= depth:
        raise ConfigError(f"A judge cannot have {layers} layers of the model in {model}", expected=f"1 to {depth}")
    config.num_hidden_layers, config.num_labels = layers, 1
    if getattr(config, "layer_types", None):  # sliding or full attention, one a layer
        config.layer_types = config.layer_types[:layers]
    verbosity = logging.get_verbosity()
    try:
        # It would warn of the layers that are left out and of the head, both meant; what is missing is checked below.
        logging.set_verbosity_error()
        classifier, found = AutoModelForSequenceClassification.from_pretrained(
            model,
            config=config,
            dtype=torch.float32,
            trust_remote_code=False,
            use_safetensors=True,
            output_loading_info=True,
        )
    except (OSError, ValueError) as error:
        raise ModelError(f"The model in {model} makes no judge: {first_line(error)}") from error
    finally:
        logging.set_verbosity(verbosity)
    head = getattr(classifier, "score", None)
    if not isinstance(head, nn.Linear) or head.out_features != 1:
        raise ModelError(
            f"The model in {model} makes no judge",
            got=type(classifier).__name__,
            expected="a decoder whose classifier reads the last token by one linear layer, `score`",
        )
    missing = {name for name in found["missing_keys"] if not name.startswith("score.")}
    if missing:
        raise ModelError(f"The model in {model} lacks weights", got=", ".join(sorted(missing)[:5]))
    for parameter in head.parameters():
        nn.init.zeros_(parameter)
    # The token that is read may be the padding of the model; RewardModel then takes one that occurs nowhere.
    classifier.config.pad_token_id = None
    return classifier.eval().requires_grad_(False)


def _tokenizer(model: Path, chat: bool, cue: str) -> Any:
    """The model's tokenizer with the judge's template."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(model, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise ModelError(f"The tokenizer in {model} cannot be loaded: {first_line(error)}") from error
    template = tokenizer.chat_template if chat else PLAIN
    if not template:
        raise ConfigError(f"The tokenizer in {model} has no chat template", fix="make the judge with chat=False")
    if not chat and tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id]:
        template = "{{ bos_token }}" + template
    tokenizer.chat_template = template + "{{ " + json.dumps(cue, ensure_ascii=False) + " }}"
    return tokenizer


def _features(classifier: Any, tokenizer: Any, examples: Sequence[Example]) -> torch.Tensor:
    """[N, D] in float64 on the CPU: the last tokens' hidden states, as the head sees them."""
    encoded = []
    for messages, answer, _ in examples:
        turns = [*map(dict, messages), {"role": "assistant", "content": answer}]
        try:
            text = tokenizer.apply_chat_template(turns, tokenize=False)
        except Exception as error:  # a template may raise anything
            raise DataError(
                f"The model's chat template refuses an example: {first_line(error)}",
                got=f"roles {', '.join(turn['role'] for turn in turns)}",
            ) from None
        encoded.append(tokenizer(text, add_special_tokens=False)["input_ids"])
    sizes = [len(ids) for ids in encoded]
    if min(sizes) == 0:
        raise DataError("An example has no token, so that there is nothing to judge")
    limit = getattr(classifier.config.get_text_config(), "max_position_embeddings", None)
    if limit is not None and max(sizes) > limit:
        raise DataError("An example is too long for the judge", got=f"{max(sizes)} tokens", expected=f"{limit} at most")
    features_ND = torch.empty(len(encoded), classifier.score.in_features, dtype=torch.float64)
    order = sorted(range(len(encoded)), key=sizes.__getitem__, reverse=True)
    while order:
        count = max(1, BATCH_TOKENS // sizes[order[0]])
        batch, order = order[:count], order[count:]
        features_ND[batch] = _last_states(classifier, [encoded[index] for index in batch])
    return features_ND


@torch.no_grad()
def _last_states(classifier: Any, encoded: Sequence[Sequence[int]]) -> torch.Tensor:
    """[B, D] in float64 on the CPU, of sequences that are padded on the right."""
    sizes_B = torch.tensor([len(ids) for ids in encoded])
    longest = int(sizes_B.max())
    ids_BT = torch.tensor([[*ids, *[0] * (longest - len(ids))] for ids in encoded])
    mask_BT = (torch.arange(longest) < sizes_B[:, None]).long()
    inputs = {"input_ids": ids_BT.to(classifier.device), "attention_mask": mask_BT.to(classifier.device)}
    states_BTD: torch.Tensor = classifier.base_model(**inputs).last_hidden_state.cpu()
    return states_BTD[torch.arange(len(encoded)), sizes_B - 1].double()


def _save(classifier: Any, tokenizer: Any, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.partial")
    shutil.rmtree(temporary, ignore_errors=True)
    classifier.save_pretrained(temporary, safe_serialization=True)
    tokenizer.save_pretrained(temporary)
    temporary.rename(target)
