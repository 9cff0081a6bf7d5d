"""policy -> report"""

from kfp import dsl

from components import _forms


@_forms.in_own_pod
def evaluate(
    config: str,
    run_id: str,
    model: dsl.Input[dsl.Model],
    scored: dsl.Input[dsl.Dataset],
    policy: dsl.Input[dsl.Model],
    report: dsl.Output[dsl.HTML],
    metrics: dsl.Output[dsl.Metrics],
    task_config: dsl.TaskConfig,
) -> None:
    """Measures the policy on held-out pairs and writes the report with the gate's verdict.

    Args:
        config: the whole run config as YAML or JSON.
        run_id: MLflow's parent run.
        model: from sft.
        scored: from score_reference.
        policy: from train.
        report: the page for people.
        metrics: held-out numbers with their 95 % bounds.
        task_config: what the task sets for its job; Kubeflow's own argument, and empty without a job.
    """
    from dpo_train import launch

    settings = launch.with_task(launch.parse_config(config), "evaluate", task_config)
    given = {"sft": model, "score_reference": scored, "train": policy}
    inputs = {name: launch.stored(settings, artifact.metadata["address"]) for name, artifact in given.items()}
    artifact = launch.run_stage("evaluate", settings, inputs, run_id=run_id)
    launch.hand_on(artifact, report, page="report.html")
    for name, value in artifact.record.metrics.items():
        metrics.log_metric(name, value)


evaluate_job = _forms.as_job(evaluate)
