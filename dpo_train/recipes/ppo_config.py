"""How PPO trains."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

from dpo_train.errors import ConfigError

_MIN_WHITENED = 8
"""TRL whitens the rewards of no smaller minibatch."""


@dataclass(frozen=True, kw_only=True)
class PpoConfig:
    """How PPO trains.

    Raises:
        ConfigError: a number is out of its range, or batch and minibatches do not fit.
    """

    learning_rate: float = 1e-5
    """Of AdamW, constant, for policy and value model."""
    kl_coef: float = 0.05
    """Reward that a nat of KL from the SFT model costs."""
    batch: int = 64
    """Episodes (a prompt and one sampled answer) of an update."""
    mini_batches: int = 4
    """Equal parts of a batch; each gives one optimiser step."""
    ppo_epochs: int = 2
    """Passes over an update's episodes."""
    total_episodes: int = 1024
    """Rounded up to whole updates."""
    max_new_tokens: int = 24
    """Longest answer, its end token counted."""
    save_every: int = 4
    """Updates between two points. The last update always gives one."""
    whiten_rewards: bool = True
    """Divide an update's rewards, KL included, by their standard deviation."""
    value_layers: int | None = None
    """Layers of the SFT model that the value model keeps at most, from the first; None: all."""

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.name == "kl_coef":
                is_right, expected = value >= 0 and math.isfinite(value), "a finite number, 0 or more"
            else:
                is_right, expected = value is None or (value > 0 and math.isfinite(value)), "more than 0"
            if not is_right and not isinstance(value, bool):
                raise ConfigError(f"PPO's {field.name} is out of range", got=value, expected=expected)
        if self.batch % self.mini_batches:
            raise ConfigError(
                "PPO's batch is not divisible into its minibatches",
                got=f"batch={self.batch}, mini_batches={self.mini_batches}",
                fix="choose a multiple",
            )
        if self.whiten_rewards and self.batch // self.mini_batches < _MIN_WHITENED:
            raise ConfigError(
                "PPO's minibatches are too small for whitened rewards",
                got=f"{self.batch // self.mini_batches} episodes",
                expected=f"at least {_MIN_WHITENED}",
                fix="use fewer minibatches, a larger batch, or whiten_rewards=False",
            )

    @property
    def updates(self) -> int:
        """Of the whole run."""
        return math.ceil(self.total_episodes / self.batch)
