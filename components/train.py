"""scored pairs and beta -> policy"""

from kfp import dsl

from components import _forms


@_forms.in_own_pod
def train(
    config: str,
    run_id: str,
    model: dsl.Input[dsl.Model],
    scored: dsl.Input[dsl.Dataset],
    choice: dsl.Input[dsl.Artifact],
    policy: dsl.Output[dsl.Model],
    task_config: dsl.TaskConfig,
) -> None:
    """Trains the policy with the chosen beta (Ray Train).

    Args:
        config: the whole run config as YAML or JSON.
        run_id: MLflow's parent run.
        model: from sft.
        scored: from score_reference.
        choice: from sweep.
        policy: the trained weights.
        task_config: what the task sets for its job; Kubeflow's own argument, and empty without a job.
    """
    from dpo_train import launch

    settings = launch.with_task(launch.parse_config(config), "train", task_config)
    given = {"sft": model, "score_reference": scored, "sweep": choice}
    inputs = {name: launch.stored(settings, artifact.metadata["address"]) for name, artifact in given.items()}
    artifact = launch.run_stage("train", settings, inputs, run_id=run_id)
    launch.hand_on(artifact, policy)


train_job = _forms.as_job(train)
