"""raw data -> pairs"""

from kfp import dsl

from components import _forms


@_forms.in_own_pod
def prepare(
    config: str,
    run_id: str,
    data_digest: str,
    pairs: dsl.Output[dsl.Dataset],
    report: dsl.Output[dsl.HTML],
    task_config: dsl.TaskConfig,
) -> None:
    """Validates, tokenises and splits the raw preference data (Ray Data).

    Args:
        config: the whole run config as YAML or JSON.
        run_id: MLflow's parent run.
        data_digest: of the raw data, so that a cached task is not taken for data that has changed.
        pairs: the validated pairs.
        report: what came in, what was used, what was not and why.
        task_config: what the task sets for its job; Kubeflow's own argument, and empty without a job.
    """
    from dpo_train import launch

    print("raw data", data_digest)
    settings = launch.with_task(launch.parse_config(config), "prepare", task_config)
    artifact = launch.run_stage("prepare", settings, {}, run_id=run_id)
    launch.hand_on(artifact, pairs)
    launch.hand_on(artifact, report, page="report.html")


prepare_job = _forms.as_job(prepare)
