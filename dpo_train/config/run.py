"""Machines, and the whole run."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Literal

from annotated_types import Ge

from dpo_train.config.cluster import ClusterConfig, KubeflowConfig, RetrainConfig
from dpo_train.config.data import PrepareConfig, ScoreConfig
from dpo_train.config.evaluation import EvaluateConfig, RegisterConfig
from dpo_train.config.kinds import STRICT, Count, Positive, Seed, option
from dpo_train.config.sweeping import SweepConfig
from dpo_train.config.training import ModelConfig, SftConfig, TrainConfig


@dataclass(frozen=True, kw_only=True)
class ComputeConfig:
    """Where and how wide stages run. Never part of an output's identity."""

    __pydantic_config__ = STRICT

    executor: Literal["ray", "local"] = option("ray", "ray: Ray Data, Train and Tune; local: in this process, one rank")
    device: Literal["auto", "cpu", "cuda"] = option("auto", "auto: the GPU if there is one")
    workers: Count = option(1, "training workers; with GPUs at most one per GPU")
    min_workers: Count | None = option(
        None,
        "a training goes on with so few while other workers are away, and grows again when they are back (elastic)",
    )
    data_workers: Count = option(2, "workers for preparing, scoring and sampling")
    shard: Literal["auto", "on", "off"] = option(
        "auto", "FSDP2: each training worker holds a share of every weight; auto: when all weights are trained"
    )
    tensor_parallel: Count = option(
        1, "training workers that share each layer's matrices, for models too wide for FSDP2 alone; divides workers"
    )
    activation_checkpointing: Literal["off", "selective", "full"] = option(
        "off",
        "keep less of the forward pass and compute it again: selective keeps the outputs of matrix products, full "
        "keeps each layer's input alone",
    )
    compile: Literal["auto", "on", "off"] = option("auto", "torch.compile of each layer; auto: on GPUs")
    score_sharded: bool = option(
        False,
        "score, and sample, on the training workers together, each holding a share of every weight: for models that do "
        "not fit one worker",
    )
    timeout_minutes: Positive = option(
        30.0, "workers that wait so long for each other have lost one: the training restarts from its checkpoint"
    )
    max_failures: Annotated[int, Ge(0)] = option(1, "how often Ray may restart a training whose worker died")


@dataclass(frozen=True, kw_only=True)
class StorageConfig:
    """Object storage behind s3://. Credentials come from the environment or the machine's role, never from here.

    Never part of an output's identity.
    """

    __pydantic_config__ = STRICT

    endpoint: str | None = option(None, "address of an S3 server that is not Amazon's; default: AWS_ENDPOINT_URL")
    region: str | None = option(None, "its region; default: AWS_REGION")
    anonymous: bool = option(False, "read public buckets without credentials")
    attempts: Count = option(6, "how often a request is tried before the run fails, with growing pauses in between")
    cache: str | None = option(None, "folder for local copies; default: DPO_CACHE, else ~/.cache/dpo")


@dataclass(frozen=True, kw_only=True)
class TrackingConfig:
    """MLflow. Never part of an output's identity."""

    __pydantic_config__ = STRICT

    uri: str | None = option(None, "MLflow tracking URI; default: MLFLOW_TRACKING_URI, else SQLite in the store")
    experiment: str = option("dpo", "MLflow experiment")


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Everything one pipeline run needs."""

    __pydantic_config__ = STRICT

    store: str = option("dpo-store", "folder, here or at s3://, that holds every output, at <store>/<stage>/<digest>")
    seed: Seed = option(0, "seeds the splits, the order of pairs, the adapters and the samples")
    model: ModelConfig = field(metadata={"help": "the model to align"})
    prepare: PrepareConfig = field(metadata={"help": "raw data to pairs"})
    sft: SftConfig = field(default_factory=SftConfig, metadata={"help": "fine-tuning on the chosen answers"})
    score: ScoreConfig = field(default_factory=ScoreConfig, metadata={"help": "reference log-probs"})
    sweep: SweepConfig = field(default_factory=SweepConfig, metadata={"help": "choice of beta"})
    train: TrainConfig = field(default_factory=TrainConfig, metadata={"help": "the DPO training"})
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig, metadata={"help": "held-out evaluation"})
    register: RegisterConfig = field(default_factory=RegisterConfig, metadata={"help": "MLflow registration"})
    compute: ComputeConfig = field(default_factory=ComputeConfig, metadata={"help": "where it runs"})
    storage: StorageConfig = field(default_factory=StorageConfig, metadata={"help": "object storage"})
    tracking: TrackingConfig = field(default_factory=TrackingConfig, metadata={"help": "MLflow tracking"})
    cluster: ClusterConfig = field(default_factory=ClusterConfig, metadata={"help": "Kubernetes and Ray clusters"})
    kubeflow: KubeflowConfig = field(default_factory=KubeflowConfig, metadata={"help": "Kubeflow Pipelines"})
    retrain: RetrainConfig = field(default_factory=RetrainConfig, metadata={"help": "runs that come again"})
