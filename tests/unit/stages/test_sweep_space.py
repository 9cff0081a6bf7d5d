"""Which settings a sweep tries."""

from __future__ import annotations

import math
import statistics
import sys
from dataclasses import replace
from typing import Any

import pytest

from dpo_train.config import LogUniform, RunConfig
from dpo_train.errors import ConfigError, MissingPackageError
from dpo_train.stages.sweep_space import Parameters, fixed_settings, name_of, optuna_settings, with_parameters
from tests.tiny import tiny_config

RANGE = LogUniform(low=0.01, high=1.0)


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    return tiny_config(tmp_path_factory.mktemp("space"))


def of(config: RunConfig, seed: int = 0, **changes: Any) -> RunConfig:
    return replace(config, seed=seed, sweep=replace(config.sweep, **changes))


def test_a_grid_has_every_combination_once_whatever_its_order(config: RunConfig) -> None:
    """Two betas, one of them twice, and two ranks: four settings."""
    found = fixed_settings(of(config, betas=(0.5, 0.1, 0.5), lora_ranks=(8, 4)))

    assert [name_of(one) for one in found] == [
        "beta=0.1,lora.rank=4", "beta=0.1,lora.rank=8", "beta=0.5,lora.rank=4", "beta=0.5,lora.rank=8",
    ]  # fmt: skip
    assert found == fixed_settings(of(config, betas=(0.1, 0.5), lora_ranks=(4, 8)))


def test_random_draws_are_different_within_their_range_and_the_same_for_a_seed(config: RunConfig) -> None:
    """Three digits each; more trials begin with the same ones; about half lie below the geometric mean."""
    fifty = fixed_settings(of(config, betas=RANGE, search="random", trials=50))
    betas = [float(one["beta"]) for one in fifty]

    assert len({name_of(one) for one in fifty}) == 50
    assert all(0.01 <= beta <= 1 and beta == float(f"{beta:.3g}") for beta in betas)
    assert 15 <= sum(beta < math.sqrt(0.01 * 1.0) for beta in betas) <= 35
    assert fixed_settings(of(config, betas=RANGE, search="random", trials=5)) == fifty[:5]
    assert fixed_settings(of(config, seed=1, betas=RANGE, search="random", trials=5)) != fifty[:5]


def test_a_range_too_narrow_for_as_many_trials_is_refused(config: RunConfig) -> None:
    """From 0.1 to 0.102 there are three numbers of three digits."""
    narrow = LogUniform(low=0.1, high=0.102)

    with pytest.raises(ConfigError, match="3 different settings"):
        fixed_settings(of(config, betas=narrow, search="random", trials=4))


def test_a_setting_is_what_its_training_reads(config: RunConfig) -> None:
    """Beta, rate, loss and epochs are train's own keys; the rank is that of its LoRA, whose alpha stays."""
    setting: Parameters = {"beta": 0.3, "learning_rate": 1e-3, "loss": "ipo", "epochs": 2, "lora.rank": 2}
    train = with_parameters(config, setting).train

    assert (train.beta, train.learning_rate, train.loss, train.epochs) == (0.3, 1e-3, "ipo", 2)
    assert train.lora is not None
    assert (train.lora.rank, train.lora.alpha) == (2, 8.0)


def test_optuna_looks_where_it_was_good_and_a_seed_repeats_it(config: RunConfig) -> None:
    """Told that beta = 0.3 is best, its last proposals lie nearer to it than its first; a failed one does no harm."""
    pytest.importorskip("optuna")

    def tried(seed: int) -> list[float]:
        betas: list[float] = []

        def try_all(settings: list[Parameters]) -> list[float | None]:
            found = [float(one["beta"]) for one in settings]
            is_first = not betas
            betas.extend(found)
            return [None if is_first and number == 1 else -_off(beta) for number, beta in enumerate(found)]

        optuna_settings(of(config, seed=seed, betas=RANGE, search="optuna", trials=40), try_all)
        return betas

    betas = tried(0)
    assert len(set(betas)) == 40
    assert statistics.median(map(_off, betas[20:])) < 0.6 * statistics.median(map(_off, betas[:10]))
    assert tried(0) == betas
    assert tried(1) != betas


def _off(beta: float) -> float:
    """Distance from the best, in orders of e."""
    return abs(math.log(beta / 0.3))


def test_optuna_stops_where_all_has_been_tried(config: RunConfig) -> None:
    """Three values, each proposed once, though more trials were asked for."""
    pytest.importorskip("optuna")
    rounds: list[list[Parameters]] = []

    def try_all(settings: list[Parameters]) -> list[float | None]:
        rounds.append(settings)
        return [0.5] * len(settings)

    optuna_settings(of(config, betas=(0.1, 0.2, 0.3), search="optuna", trials=5), try_all)

    assert sorted(float(one["beta"]) for each in rounds for one in each) == [0.1, 0.2, 0.3]


@pytest.mark.parametrize("seed", [0, 1])
def test_optuna_tries_as_many_as_asked_for_though_it_is_sure_of_some(config: RunConfig, seed: int) -> None:
    """Twelve betas, of which the smallest are told to be best by far: TPE repeats itself, and twelve are tried."""
    pytest.importorskip("optuna")
    betas: list[float] = []

    def try_all(settings: list[Parameters]) -> list[float | None]:
        betas.extend(float(one["beta"]) for one in settings)
        return [-float(one["beta"]) for one in settings]

    twelve = tuple(round(0.1 * number, 1) for number in range(1, 13))
    optuna_settings(of(config, seed=seed, betas=twelve, search="optuna", trials=12), try_all)

    assert sorted(betas) == list(twelve)


def test_missing_optuna_names_its_extra(config: RunConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """A package that cannot be imported is one to install."""
    monkeypatch.setitem(sys.modules, "optuna", None)

    with pytest.raises(MissingPackageError, match=r"dpo-train\[optuna\]"):
        optuna_settings(of(config, betas=RANGE, search="optuna", trials=2), lambda _: [])
