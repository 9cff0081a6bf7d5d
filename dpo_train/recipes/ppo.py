"""PPO with the judge's own reward, the baseline that DPO is compared with (arXiv 2305.18290, section 6.1: PPO-GT).

    prompts --policy--> answers --judge--> rewards --TRL's PPO--> policy    target/step-N/, a model folder per point

TRL samples and trains. Ours is what it is given: the judge reads texts and not the policy's tokens, as everywhere else,
and padding is a number that is no token, so that an answer's end token is learned like every other.

B episodes of an update, T places for a prompt and its answer: prompts end at the same place, answers begin there.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import importlib
import importlib.metadata
import json
import math
import random
import tempfile
import warnings
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from dpo_train.disk import digest_path, disk_errors, empty, locked, write_atomically
from dpo_train.errors import DataError, MissingPackageError, ModelError, RunError, StoreError, first_line
from dpo_train.identity import identity
from dpo_train.metrics_file import METRICS_FILE
from dpo_train.model.load import select_device
from dpo_train.model.reward_model import RewardModel
from dpo_train.recipes.ppo_config import PpoConfig

TRL = "1.12.0"
"""The last release that has PPO."""

CLAIM_FILE, POINTS_FILE, EPISODES_FILE = "ppo.json", "points.json", "episodes.jsonl"
JUDGE_TOKENS = 2048
"""Most tokens that the judge reads; a prompt and its answer are far from it."""

_NAMES = {"reward": "objective/scores", "kl": "objective/kl", "entropy": "objective/entropy"}
_NAMES |= {"policy_loss": "loss/policy_avg", "value_loss": "loss/value_avg", "clipped": "policy/clipfrac_avg"}


@dataclass(frozen=True, kw_only=True)
class PpoPoint:
    """A policy on the way."""

    step: int
    """Updates until here."""
    episodes: int
    """Episodes until here."""
    folder: Path
    """The model with its tokenizer, in the Hugging Face layout, fp32."""


def train_ppo(
    model: Path,
    judge: Path,
    prompts: Sequence[Sequence[int]],
    target: Path,
    *,
    config: PpoConfig,
    seed: int,
    device: str,
    tell: Callable[[str], None] = lambda _: None,
) -> list[PpoPoint]:
    """Trains the model by PPO on the judge's rewards, or finds that it was done with these very inputs.

    ``target`` gets ``step-N/``, ``metrics.jsonl`` (a line per update: reward, KL in nats per answer) and
    ``episodes.jsonl`` (a line per episode: prompt, answer, reward). What was left incomplete, or made from other
    inputs, is removed and made anew.

    Args:
        model: folder of the SFT model, which is policy, reference and the value model's start.
        judge: folder of a sequence classifier with one output.
        prompts: token ids of the SFT model, at least a batch of them. Each is used once before any is used twice.
        device: see ``select_device``.
        tell: gets a line per update.

    Returns:
        the points, the last update's last.

    Raises:
        MissingPackageError: no TRL with PPO is installed.
        DataError: there are too few prompts, or empty ones.
        ModelError: model or judge cannot be used.
        StoreError: ``target`` holds something else.
        RunError: the judge gives no number.
    """
    _check(prompts, config)
    inputs = {"model": digest_path(model), "judge": digest_path(judge), "prompts": _digest(prompts)}
    claim = {"digest": identity("ppo", {**dataclasses.asdict(config), "seed": seed, "trl": TRL}, inputs)}
    with locked(target), disk_errors(target):
        if points := _found(target, claim):
            tell(f"PPO was done before: {len(points)} points in {target}")
            return points
        place = select_device(device)
        rewards = RewardModel(judge, device=place, max_tokens=JUDGE_TOKENS)
        trl = _trl()
        with _randomness(seed, place), tempfile.TemporaryDirectory() as scratch:
            run = _Run(model, rewards, prompts, target, config=config, tell=tell)
            trainer = _trainer(trl, run, config, seed=seed, place=place, scratch=scratch)
            _begin(target, claim)
            trainer.train()
        steps = [[point.step, point.episodes] for point in run.points]
        write_atomically(target / POINTS_FILE, json.dumps({**claim, "points": steps}))
    return run.points


def answer_text(tokenizer: Any, ids: Sequence[int], known: Container[int]) -> str:
    """The text of an answer as the judge is given it: that of ``evaluate.generate`` where the tokenizer keeps the blank
    that a text begins with, as byte-level ones do. Prompts are plain text: no chat template is read.

    Args:
        ids: with the end token or, in an answer that was cut short, without.
        known: the tokenizer's tokens; the vocabulary matrix may have more rows.
    """
    is_whole = bool(ids) and ids[-1] == tokenizer.eos_token_id
    text_ids = [token for token in (ids[:-1] if is_whole else ids) if token in known]
    return str(tokenizer.decode(text_ids, skip_special_tokens=True))


class JudgedTexts(nn.Module):
    """A judge of texts in the shape in which TRL asks a reward model: a backbone, and a head over its last states.

    Every place of a row has the row's reward, so that whichever TRL looks at is right.

    Args:
        reward: prompts and answers, as token ids without padding, to the rewards.
        width: places of a row before its answer.
    """

    base_model_prefix = "reader"

    def __init__(self, reward: Callable[[list[list[int]], list[list[int]]], Sequence[float]], width: int) -> None:
        super().__init__()
        self.reader = _Reader(reward, width)
        self.score = nn.Identity()


class _Reader(nn.Module):
    def __init__(self, reward: Callable[[list[list[int]], list[list[int]]], Sequence[float]], width: int) -> None:
        super().__init__()
        self._reward, self._width = reward, width

    def forward(self, input_ids: Tensor, attention_mask: Tensor, **_: Any) -> SimpleNamespace:
        kept = [ids[mask] for ids, mask in zip(input_ids.cpu(), attention_mask.bool().cpu(), strict=True)]
        sizes = attention_mask[:, : self._width].sum(1).tolist()
        prompts = [ids[:size].tolist() for ids, size in zip(kept, sizes, strict=True)]
        answers = [ids[size:].tolist() for ids, size in zip(kept, sizes, strict=True)]
        rewards_B = torch.tensor(self._reward(prompts, answers), device=input_ids.device)
        return SimpleNamespace(hidden_states=(rewards_B[:, None, None].expand(*input_ids.shape, 1),))


class _Run:
    """What one training has: its models, and what becomes of each update."""

    def __init__(
        self,
        folder: Path,
        rewards: RewardModel,
        prompts: Sequence[Sequence[int]],
        target: Path,
        *,
        config: PpoConfig,
        tell: Callable[[str], None],
    ) -> None:
        from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

        load = functools.partial(_load, folder)
        self.tokenizer = load(AutoTokenizer)
        weights = {"dtype": torch.float32, "use_safetensors": True}
        self.policy, self.reference = (load(AutoModelForCausalLM, **weights) for _ in range(2))
        layers = self.policy.config.get_text_config().num_hidden_layers
        layers = min(config.value_layers or layers, layers)
        self.value = load(AutoModelForSequenceClassification, num_labels=1, num_hidden_layers=layers, **weights)
        # It begins by expecting nothing, not what a head drawn by lot says.
        nn.init.zeros_(self.value.score.weight)
        self.prompts, self.width = prompts, max(map(len, prompts))
        self.end, self.pad = self.tokenizer.eos_token_id, self.policy.get_input_embeddings().num_embeddings
        if self.end is None:
            raise ModelError(f"The tokenizer in {folder} has no end token, so that no answer would end")
        self._known = frozenset(self.tokenizer.get_vocab().values())
        self._own_generation, self.policy.generation_config = self.policy.generation_config, self._generation()
        self.judge = JudgedTexts(self._reward, self.width)
        self.points: list[PpoPoint] = []
        self._rewards, self._target, self._config, self._tell = rewards, target, config, tell
        self._episodes: list[dict[str, Any]] = []

    def _generation(self) -> Any:
        # What TRL does not set it takes from the model: nothing but the end token may shape an answer.
        return type(self.policy.generation_config)(eos_token_id=self.end, pad_token_id=self.end)

    def _reward(self, prompts: list[list[int]], answers: list[list[int]]) -> list[float]:
        texts = [
            (
                str(self.tokenizer.decode(prompt, skip_special_tokens=True)),
                answer_text(self.tokenizer, answer, self._known),
            )
            for prompt, answer in zip(prompts, answers, strict=True)
        ]
        rewards = self._rewards([([{"role": "user", "content": prompt}], answer) for prompt, answer in texts])
        for (prompt, answer), reward in zip(texts, rewards, strict=True):
            if not math.isfinite(reward):
                raise RunError(f"The judge gives {reward} for {answer!r} after {prompt!r}", expected="a finite reward")
            self._episodes.append({"prompt": prompt, "answer": answer, "reward": reward})
        return rewards

    def note(self, step: int, metrics: Mapping[str, float]) -> None:
        """Writes what an update was like."""
        line: dict[str, float] = {"step": step, "episodes": step * self._config.batch}
        line |= {name: metrics[key] for name, key in _NAMES.items()}
        _append(self._target / METRICS_FILE, [line])
        _append(self._target / EPISODES_FILE, [{"step": step, **episode} for episode in self._episodes])
        self._episodes.clear()
        told = f"reward {line['reward']:.3f}, KL {line['kl']:.2f} nats"
        self._tell(f"PPO update {step} of {self._config.updates}: {told}")

    def save(self, step: int) -> None:
        """Writes the policy if it is its turn."""
        if step % self._config.save_every and step != self._config.updates:
            return
        folder = self._target / f"step-{step}"
        partial = folder.with_name(f".{folder.name}")
        for part in (self.policy, self._own_generation, self.tokenizer):
            part.save_pretrained(partial)
        partial.rename(folder)
        self.points.append(PpoPoint(step=step, episodes=step * self._config.batch, folder=folder))


def _trainer(trl: Any, run: _Run, config: PpoConfig, *, seed: int, place: torch.device, scratch: str) -> Any:
    from transformers import PrinterCallback

    options = trl.PPOConfig(
        output_dir=scratch, report_to="none", save_strategy="no", disable_tqdm=True, num_sample_generations=0,
        use_cpu=place.type == "cpu", bf16=False, gradient_checkpointing=False, seed=seed,
        learning_rate=config.learning_rate, lr_scheduler_type="constant", total_episodes=config.total_episodes,
        # With gradient accumulation TRL's optimiser would step once for so many minibatches, not once for each.
        per_device_train_batch_size=config.batch, gradient_accumulation_steps=1,
        # Parts of a batch would be padded to one length, and padding is no token whose log-prob could be read.
        local_rollout_forward_batch_size=config.batch,
        num_mini_batches=config.mini_batches, num_ppo_epochs=config.ppo_epochs,
        response_length=config.max_new_tokens, stop_token="eos",  # noqa: S106
        temperature=1.0,
        kl_coef=config.kl_coef, whiten_rewards=config.whiten_rewards,
    )  # fmt: skip
    trainer = trl.PPOTrainer(
        args=options,
        # Of the tokenizer it asks these two.
        processing_class=SimpleNamespace(eos_token_id=run.end, pad_token_id=run.pad),
        model=run.policy,
        ref_model=run.reference,
        reward_model=run.judge,
        value_model=run.value,
        train_dataset=[{"input_ids": list(ids)} for ids in run.prompts],
        data_collator=functools.partial(_collate, width=run.width, pad=run.pad),
        callbacks=[_callback(run)],
    )
    trainer.remove_callback(PrinterCallback)
    # It says that it begins, on standard output.
    trainer.accelerator.print = lambda *_: None
    return trainer


def _callback(run: _Run) -> Any:
    from transformers import TrainerCallback

    class Noted(TrainerCallback):  # type: ignore[misc]  # transformers is untyped
        def on_log(self, _args: Any, state: Any, _control: Any, *, logs: Mapping[str, float], **_: Any) -> None:
            run.note(state.global_step, logs)

        def on_step_end(self, _args: Any, state: Any, _control: Any, **_: Any) -> None:
            run.save(state.global_step)

    return Noted()


def _collate(rows: Sequence[Mapping[str, list[int]]], *, width: int, pad: int) -> dict[str, Tensor]:
    """Padded on the left to one width in all batches, by which the judge knows where answers begin."""
    return {"input_ids": torch.tensor([[pad] * (width - len(row["input_ids"])) + row["input_ids"] for row in rows])}


def _trl() -> Any:
    """TRL's module of PPO.

    Raises:
        MissingPackageError: it is not installed, or is too new, or a package that it needs is missing.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that it is experimental
            module = importlib.import_module("trl.experimental.ppo")
            _ = module.PPOConfig, module.PPOTrainer  # loaded when they are asked for
            return module
    except (ImportError, RuntimeError) as error:
        try:
            got = f"trl {importlib.metadata.version('trl')}: {first_line(error)}"
        except importlib.metadata.PackageNotFoundError:
            got = "no trl"
        raise MissingPackageError(
            "PPO is trained by TRL, whose later releases have no PPO",
            got=got,
            expected=f"trl {TRL} with accelerate and datasets",
            fix=f"pip install trl=={TRL}, in an environment of its own if another release is needed too",
        ) from None


def _load(folder: Path, kind: Any, **options: Any) -> Any:
    try:
        return kind.from_pretrained(folder, trust_remote_code=False, **options)
    except Exception as error:
        raise ModelError(f"The model in {folder} cannot be loaded for PPO: {first_line(error)}") from error


def _check(prompts: Sequence[Sequence[int]], config: PpoConfig) -> None:
    if not all(map(len, prompts)):
        raise DataError("A prompt for PPO has no token", expected="at least one in each")
    if len(prompts) < config.batch:
        raise DataError(
            "There are fewer prompts than PPO takes at a time",
            got=len(prompts),
            expected=f"at least batch={config.batch}",
            fix="give more prompts, or make the batch smaller",
        )


def _digest(prompts: Sequence[Sequence[int]]) -> str:
    return hashlib.sha256(json.dumps([list(map(int, ids)) for ids in prompts]).encode()).hexdigest()


def _found(target: Path, claim: Mapping[str, str]) -> list[PpoPoint]:
    """The points of a complete run with the same digest; else none."""
    file = target / POINTS_FILE
    if not file.is_file() or not (target / CLAIM_FILE).is_file():
        return []
    content = json.loads(file.read_text(encoding="utf-8"))
    points = [
        PpoPoint(step=step, episodes=episodes, folder=target / f"step-{step}") for step, episodes in content["points"]
    ]
    is_same = content["digest"] == claim["digest"] and all(point.folder.is_dir() for point in points)
    return points if is_same else []


def _begin(target: Path, claim: Mapping[str, str]) -> None:
    """Empties a folder of an earlier run.

    Raises:
        StoreError: it is not one.
    """
    if target.exists() and any(target.iterdir()) and not (target / CLAIM_FILE).is_file():
        raise StoreError(f"{target} is not empty and not a PPO run of ours", fix="name another folder")
    target.mkdir(parents=True, exist_ok=True)
    empty(target, last=CLAIM_FILE)
    write_atomically(target / CLAIM_FILE, json.dumps(claim))


def _append(file: Path, lines: Sequence[Mapping[str, Any]]) -> None:
    with file.open("a", encoding="utf-8") as stream:
        stream.writelines(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)


@contextmanager
def _randomness(seed: int, place: torch.device) -> Iterator[None]:
    """Inside, all generators that TRL draws from begin at the seed; afterwards they go on where they were."""
    devices = [place] if place.type == "cuda" else []
    python, numpy = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=devices):
        random.seed(seed)
        np.random.seed(seed % 2**32)
        torch.manual_seed(seed)
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)
