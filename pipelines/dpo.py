"""The graph, no logic: every arrow of the flow is one task."""

from typing import Any

from kfp import dsl

from components import SECRET, SECRET_KEYS, WEBHOOK_KEY, WEBHOOK_SECRET
from components.evaluate import evaluate as evaluate_policy
from components.notify import notify
from components.prepare import prepare
from components.register import register
from components.resolve import resolve
from components.score_reference import score_reference
from components.sft import sft
from components.sweep import sweep
from components.train import train


def _set_up(task: dsl.PipelineTask, *more: dict[str, Any]) -> dsl.PipelineTask:
    """What holds of every task: no caching, and logins from the Secret."""
    # A stage knows better than Kubeflow whether its output is complete and still true.
    task.set_caching_options(False)
    task.platform_config["kubernetes"] = {"secretAsEnv": [_from_secret(SECRET, *SECRET_KEYS), *more]}
    return task


def _from_secret(name: str, *keys: str) -> dict[str, Any]:
    """Keys of a Secret as environment variables, where they are there.

    As kfp-kubernetes' use_secret_as_env writes it, by a name and by a parameter: old servers know only the first.
    """
    return {
        "secretName": name,
        "secretNameParameter": {"runtimeValue": {"constant": name}},
        "keyToEnv": [{"secretKey": key, "envVar": key} for key in keys],
        "optional": True,
    }


@dsl.pipeline(name="dpo", description="Preference data to an aligned, evaluated, registered model")
def dpo(config: str, run_name: str = "dpo", overrides: list = []) -> None:  # noqa: B006 - Kubeflow reads it once
    """Preference data to an aligned, evaluated, registered model.

    Args:
        config: the whole run config as YAML or JSON (`dpo config` prints it).
        run_name: name of the MLflow run.
        overrides: a list of section.key=value, applied to the config.
    """
    given = {
        "config": config,
        "run_name": run_name,
        "overrides": overrides,
        "kubeflow_run": dsl.PIPELINE_JOB_ID_PLACEHOLDER,
    }
    with dsl.ExitHandler(_set_up(notify(**given), _from_secret(WEBHOOK_SECRET, WEBHOOK_KEY)), name="whatever happens"):
        run = _set_up(resolve(**given))
        with dsl.If(run.outputs["Output"] == "train", name="there is something to do"):
            common = {"config": run.outputs["config"], "run_id": run.outputs["run_id"]}
            pairs = _set_up(prepare(**common, data_digest=run.outputs["data_digest"]))
            model = _set_up(sft(**common, pairs=pairs.outputs["pairs"]))
            common["model"] = model.output
            scored = _set_up(score_reference(**common, pairs=pairs.outputs["pairs"]))
            choice = _set_up(sweep(**common, scored=scored.output))
            policy = _set_up(train(**common, scored=scored.output, choice=choice.outputs["choice"]))
            report = _set_up(evaluate_policy(**common, scored=scored.output, policy=policy.output))
            _set_up(register(**common, policy=policy.output, report=report.outputs["report"]))
