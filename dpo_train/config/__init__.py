"""Configuration: frozen dataclasses, one per stage, decoded strictly from YAML and ``section.key=value`` overrides.

    YAML text --parse--> dict --override--> dict --decode--> RunConfig      (an error names the key and what to write)

Every field carries its help text, from which ``dpo init`` and docs/config.md are written.
``compute`` and ``tracking`` say where a run happens; they never change what it computes, so they are no part of the
identity of an output (see artifacts.py).
"""

from dpo_train.config.checks import ranking_mistakes
from dpo_train.config.cluster import ClusterConfig, KubeflowConfig, PodConfig, RetrainConfig, WorkerConfig
from dpo_train.config.data import Format, PrepareConfig, ScoreConfig, SourceConfig, Split, Truncation
from dpo_train.config.evaluation import EvaluateConfig, GateConfig, RegisterConfig
from dpo_train.config.judging import EndpointJudge, FunctionJudge, JudgeConfig, RewardModelJudge
from dpo_train.config.kinds import check_alias
from dpo_train.config.loading import load_config, parse_config, to_dict, to_text
from dpo_train.config.run import ComputeConfig, RunConfig, StorageConfig, TrackingConfig
from dpo_train.config.sweeping import LogUniform, SelectConfig, SweepConfig
from dpo_train.config.training import FitConfig, LoraConfig, Loss, ModelConfig, SftConfig, TrainConfig

__all__ = [
    "ClusterConfig",
    "ComputeConfig",
    "EndpointJudge",
    "EvaluateConfig",
    "FitConfig",
    "Format",
    "FunctionJudge",
    "GateConfig",
    "JudgeConfig",
    "KubeflowConfig",
    "LogUniform",
    "LoraConfig",
    "Loss",
    "ModelConfig",
    "PodConfig",
    "PrepareConfig",
    "RegisterConfig",
    "RetrainConfig",
    "RewardModelJudge",
    "RunConfig",
    "ScoreConfig",
    "SelectConfig",
    "SftConfig",
    "SourceConfig",
    "Split",
    "StorageConfig",
    "SweepConfig",
    "TrackingConfig",
    "TrainConfig",
    "Truncation",
    "WorkerConfig",
    "check_alias",
    "load_config",
    "parse_config",
    "ranking_mistakes",
    "to_dict",
    "to_text",
]
