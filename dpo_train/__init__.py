"""Preference data to an aligned, evaluated, registered model by Direct Preference Optimization (arXiv 2305.18290).

    raw data -> prepare -> pairs (-> sft -> model) -> score_reference -> scored pairs -> sweep (beta) -> train -> policy
                                                                  -> evaluate -> report -> register -> model version

The flow from a notebook::

    from dpo_train import load_config, run
    config = load_config("config.yaml", ["train.beta=0.2"])
    result = run(config)
    print(result.metrics["heldout/accuracy"], result.report)
    print(result.model_uri, result.tracking_uri)

or stage by stage with ``run_stage(name, config, inputs)``.
"""

from dpo_train.artifacts import Artifact
from dpo_train.config import RunConfig, load_config
from dpo_train.errors import DpoError
from dpo_train.launch import Result, run, run_stage

__all__ = ["Artifact", "DpoError", "Result", "RunConfig", "load_config", "run", "run_stage"]
