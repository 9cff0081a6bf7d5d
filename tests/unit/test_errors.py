"""The exception tree."""

from __future__ import annotations

import copy
import inspect
import multiprocessing
import pickle
from concurrent.futures import ProcessPoolExecutor

import pytest

from dpo_train import errors
from dpo_train.errors import DpoError

KINDS = [kind for _, kind in inspect.getmembers(errors, inspect.isclass) if issubclass(kind, DpoError)]


def test_message_says_what_was_got_expected_and_to_be_done() -> None:
    """One line, ready to print; full stops are not doubled."""
    error = DpoError("The beta is wrong.", got=-1, expected="a positive number", fix="set train.beta.")
    assert str(error) == "The beta is wrong. Got: -1. Expected: a positive number. What to do: set train.beta."
    assert str(DpoError("It failed")) == "It failed."


@pytest.mark.parametrize("kind", KINDS)
def test_error_survives_pickling(kind: type[DpoError]) -> None:
    """Class, message, exit code and parents come through, also for those that are an OSError or ImportError as well."""
    error = kind("It failed", got=1, fix="try again")
    for back in (pickle.loads(pickle.dumps(error)), copy.copy(error), pickle.loads(pickle.dumps(error, protocol=0))):
        assert type(back) is kind
        assert str(back) == str(error) == "It failed. Got: 1. What to do: try again."
        assert back.args == error.args
        assert back.exit_code == error.exit_code


def _raise(kind: type[DpoError]) -> None:
    raise kind("It failed", got="here")


def test_error_crosses_a_process_border() -> None:
    """A pool's worker raises, the parent catches the same class."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        with pytest.raises(errors.DiskFullError, match=r"It failed\. Got: here\."):
            pool.submit(_raise, errors.DiskFullError).result()


@pytest.mark.parametrize("kind", KINDS)
def test_exit_code_is_two_for_the_users_mistake_three_for_the_gate_one_otherwise(kind: type[DpoError]) -> None:
    """All that the command line needs to know."""
    if issubclass(kind, errors.UserError):
        assert kind.exit_code == 2
    else:
        assert kind.exit_code == (3 if kind is errors.GateRefusedError else 1)


@pytest.mark.parametrize(
    ("kind", "parent"),
    [
        (errors.ConfigError, ValueError),
        (errors.DataError, ValueError),
        (errors.ModelError, ValueError),
        (errors.StoreError, OSError),
        (errors.MissingPackageError, ImportError),
        (errors.DiskFullError, OSError),
        (errors.NonFiniteLossError, ArithmeticError),
        (errors.RunError, RuntimeError),
    ],
)
def test_error_is_also_the_standard_one(kind: type[DpoError], parent: type[Exception]) -> None:
    """Code that knows nothing of us catches what it expects."""
    with pytest.raises(parent, match="It failed"):
        raise kind("It failed")
