"""The graph, no logic: every arrow of the flow is one task."""

from kfp import dsl

from components.evaluate import evaluate as evaluate_policy
from components.prepare import prepare
from components.register import register
from components.resolve import resolve
from components.score_reference import score_reference
from components.sft import sft
from components.sweep import sweep
from components.train import train


@dsl.pipeline(name="dpo", description="Preference data to an aligned, evaluated, registered model")
def dpo(config: str, run_name: str = "dpo") -> None:
    """Preference data to an aligned, evaluated, registered model.

    Args:
        config: the whole run config as YAML or JSON (`dpo config` prints it).
        run_name: name of the MLflow run.
    """
    # Caching is off throughout: a stage knows better than Kubeflow whether its output is complete and still true.
    kubeflow_run = dsl.PIPELINE_JOB_ID_PLACEHOLDER
    run = resolve(config=config, run_name=run_name, kubeflow_run=kubeflow_run).set_caching_options(False)
    common = {"config": config, "run_id": run.outputs["run_id"]}
    pairs = prepare(**common, data_digest=run.outputs["data_digest"]).set_caching_options(False)
    model = sft(**common, pairs=pairs.outputs["pairs"]).set_caching_options(False)
    common["model"] = model.output
    scored = score_reference(**common, pairs=pairs.outputs["pairs"]).set_caching_options(False)
    choice = sweep(**common, scored=scored.output).set_caching_options(False)
    policy = train(**common, scored=scored.output, choice=choice.outputs["choice"]).set_caching_options(False)
    report = evaluate_policy(**common, scored=scored.output, policy=policy.output).set_caching_options(False)
    register(**common, policy=policy.output, report=report.outputs["report"]).set_caching_options(False)
