"""pairs -> scored pairs"""

from kfp import dsl

from components import _forms


@_forms.in_own_pod
def score_reference(
    config: str,
    run_id: str,
    model: dsl.Input[dsl.Model],
    pairs: dsl.Input[dsl.Dataset],
    scored: dsl.Output[dsl.Dataset],
    task_config: dsl.TaskConfig,
) -> None:
    """Computes the reference's log-probs once, for every beta, epoch and retry (Ray Data).

    Args:
        config: the whole run config as YAML or JSON.
        run_id: MLflow's parent run.
        model: from sft.
        pairs: from prepare.
        scored: the pairs with reference log-probs.
        task_config: what the task sets for its job; Kubeflow's own argument, and empty without a job.
    """
    from dpo_train import launch

    settings = launch.with_task(launch.parse_config(config), "score_reference", task_config)
    given = {"sft": model, "prepare": pairs}
    inputs = {name: launch.stored(settings, artifact.metadata["address"]) for name, artifact in given.items()}
    artifact = launch.run_stage("score_reference", settings, inputs, run_id=run_id)
    launch.hand_on(artifact, scored)


score_reference_job = _forms.as_job(score_reference)
