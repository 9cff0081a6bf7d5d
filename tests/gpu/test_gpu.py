"""What only a GPU can show: bf16 compute over fp32 masters, and the whole flow without being told of the GPU."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
import torch.distributed as dist

from dpo_train import launch
from dpo_train.config import ModelConfig
from dpo_train.core.logprobs import token_logprobs
from dpo_train.evaluate.generate import AnswerPrompts
from dpo_train.evaluate.samples import PROMPTS_SCHEMA
from dpo_train.model.load import load_policy
from dpo_train.model.rows import build_row
from dpo_train.model.score import row_logps
from dpo_train.model.shard import shard
from dpo_train.stages import evaluate, prepare, score_reference, train
from dpo_train.stages.executor import InProcess
from tests.tiny import random_pairs, tiny_config, tiny_model, tiny_tokenizer

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU to be seen: GPU tests need one"),
]


def test_gpu_is_found_without_being_told(tmp_path: Path) -> None:
    """compute.device=auto becomes cuda."""
    assert launch.resolve_device(tiny_config(tmp_path)).compute.device == "cuda"


@pytest.mark.parametrize("lora", [{"rank": 4, "alpha": 8.0}, None], ids=["adapters", "all weights"])
def test_first_loss_in_bf16_is_ln_2_and_training_learns(tmp_path: Path, lora: dict[str, float] | None) -> None:
    """To 1e-2, and the loss falls."""
    config = tiny_config(tmp_path, train__lora=lora, train__learning_rate=5e-3 if lora else 1e-3)
    local = InProcess()

    made = train(config, score_reference(config, prepare(config, local), local), local)

    assert made.record.metrics["first_loss"] == pytest.approx(math.log(2), abs=1e-2)
    assert made.record.metrics["loss"] < 0.9 * made.record.metrics["first_loss"]


def test_compiled_log_probs_equal_fp64() -> None:
    """The kernel that GPUs run, in fp32, for tokens that do and do not fill a chunk: 1e-5 forward and backward."""
    generator = torch.Generator().manual_seed(0)
    hidden_AD, weight_VD = (torch.randn(n, 64, generator=generator) for n in (700, 5000))
    targets_A = torch.randint(0, 5000, (700,), generator=generator)
    exact = [t.double().requires_grad_() for t in (hidden_AD, weight_VD)]
    wanted_A = torch.log_softmax(exact[0] @ exact[1].T, dim=-1).gather(1, targets_A[:, None]).squeeze(1)
    wanted_A.sum().backward()
    leaves = [t.cuda().requires_grad_() for t in (hidden_AD, weight_VD)]
    got_A = token_logprobs(leaves[0], leaves[1], targets_A.cuda())
    got_A.sum().backward()
    for got, wanted in zip(
        (got_A.detach(), *(t.grad for t in leaves)), (wanted_A, *(t.grad for t in exact)), strict=True
    ):
        assert (got.cpu().double() - wanted).abs().max() <= 1e-5 * wanted.abs().max()


def test_sharded_log_probs_are_those_of_whole_weights(tmp_path: Path) -> None:
    """FSDP2 on one rank, with autocast: no dtype of its own comes in, so the first step's log-ratios are zero."""
    config = ModelConfig(path=str(tiny_model(tmp_path / "model")))
    row = build_row(random_pairs(5)).to(torch.device("cuda"))
    policies = [load_policy(config, device=torch.device("cuda"), trainable=True) for _ in range(2)]
    dist.init_process_group("nccl", init_method=f"file://{tmp_path / 'meeting'}", rank=0, world_size=1)
    try:
        shard(policies[1])
        logps = [row_logps(policy, row).token_logps_A.detach() for policy in policies]
    finally:
        dist.destroy_process_group()
    assert torch.equal(logps[0], logps[1])


def test_sampled_first_tokens_have_the_frequencies_of_the_softmax(tmp_path: Path) -> None:
    """The GPU's random numbers: 4,000 samples, chi-square over the 20 likeliest tokens and the rest within 99.9 %; and
    a second time the same answers."""
    from scipy.stats import chi2

    policy = load_policy(ModelConfig(path=str(tiny_model(tmp_path))), device=torch.device("cuda"))
    prompt, count = [5, 17, 40], 4000
    rows = [{"pair_id": "p", "prompt_ids": prompt, "temperature": 1.0, "index": i} for i in range(count)]
    table = pa.Table.from_pylist(rows, schema=PROMPTS_SCHEMA)
    ask = AnswerPrompts(policy, tiny_tokenizer(), max_tokens=1, seed=3, batch=1000)
    first = ask(table)["answer_ids"].to_pylist()
    assert ask(table)["answer_ids"].to_pylist() == first

    with torch.no_grad(), torch.autocast("cuda", dtype=torch.bfloat16):
        logits = policy.model(torch.tensor([prompt], device="cuda")).logits[0, -1].double()
    chances = torch.softmax(logits, -1).cpu().numpy()
    likely = np.argsort(-chances)[:20]
    counts = np.bincount([ids[0] for ids in first], minlength=len(chances))
    cells = np.append(counts[likely], count - counts[likely].sum())
    expected = count * np.append(chances[likely], 1 - chances[likely].sum())
    # bf16 logits of a left-padded batch differ by 2**-8 relative, which adds a little to the statistic.
    assert ((cells - expected) ** 2 / expected).sum() < chi2.ppf(0.999, 20)


def test_policy_that_is_its_reference_is_evaluated_to_no_divergence(tmp_path: Path) -> None:
    """The whole evaluation in bf16: both models score the same tables, so that a step of next to nothing leaves a KL of
    rounding alone, where other neighbours in a row would move a sum by 0.4 nats."""
    config = tiny_config(tmp_path, train__learning_rate=1e-30, train__max_steps=1, evaluate__num_prompts=16)
    local = InProcess()
    scored = score_reference(config, prepare(config, local), local)

    made = evaluate(config, scored, train(config, scored, local), local)

    assert abs(made.record.metrics["samples/kl"]) < 1e-3
