"""What a version holds: a folder that MLflow loads and serves, with a folder in it that everything else loads.

    MLmodel, requirements.txt, python_env.yaml, conda.yaml, input_example.json
    model/                    a Hugging Face folder as it is: weights, configs, tokenizer, chat template, README.md
    adapter/                  the adapter before it was merged, where there is one
    components/tokenizer/     the tokenizer again: MLflow's transformers flavor looks there

``mlflow.transformers.save_model`` is not used: of a folder it cannot be had (MLflow 3.17 with transformers 5.23 fails
on the task's class), of a model it holds the weights in memory, leaves the tokenizer out of ``model/``, writes this
machine's path into MLmodel and asks the hub for a licence. What its loaders read is written here instead.
"""

from __future__ import annotations

import importlib.metadata
import json
import platform
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dpo_train.data.folder import MODEL_FOLDER

REQUIREMENTS = ("mlflow>=3.17,<4", "torch>=2.11", "transformers>=5.20,<6", "safetensors>=0.5")
"""Ranges that have been tried; what MLflow would infer asks for torchvision and pins this machine's builds."""

CHAT = "llm/v1/chat"
_EXAMPLE = {"messages": [{"role": "user", "content": "What is the capital of France?"}]}


@dataclass(frozen=True, kw_only=True)
class Package:
    """A version before it is written."""

    name: str
    write: Callable[[Path], None]
    """Writes ``model/``, and ``adapter/`` if there is one, below a folder."""
    tokenizer: Any
    chat: bool
    """Whether it answers messages; else it goes on with a text."""
    max_new_tokens: int
    """Of an answer, where the request says nothing."""
    description: str = ""
    metadata: Mapping[str, Any] = field(default_factory=dict)

    def save_model(self, path: str, mlflow_model: Any, **unused: Any) -> None:
        """Called by ``mlflow.models.Model.log``, for which this is a flavor."""
        from mlflow import pyfunc
        from mlflow.models.utils import _save_example

        root = Path(path)
        root.mkdir()
        self.write(root)
        self.tokenizer.save_pretrained(root / "components" / "tokenizer")
        mlflow_model.signature = self._signature()
        _save_example(mlflow_model, _EXAMPLE if self.chat else "The capital of France is", path)
        mlflow_model.add_flavor("transformers", **self._flavor())
        # The template writes the special tokens: a tokenizer that adds them again would open the text twice.
        own = {"add_special_tokens": False} if self.chat else {"return_full_text": False}
        pyfunc.add_to_model(
            mlflow_model,
            loader_module="mlflow.transformers",
            conda_env="conda.yaml",
            python_env="python_env.yaml",
            model_config={"max_new_tokens": self.max_new_tokens, **own},
        )
        mlflow_model.model_size_bytes = sum(file.stat().st_size for file in root.rglob("*") if file.is_file())
        mlflow_model.save(str(root / "MLmodel"))
        _write_environment(root)

    def _signature(self) -> Any:
        from mlflow.models import ModelSignature
        from mlflow.types import ColSpec, Schema
        from mlflow.types.llm import CHAT_MODEL_INPUT_SCHEMA, CHAT_MODEL_OUTPUT_SCHEMA

        if self.chat:
            return ModelSignature(inputs=CHAT_MODEL_INPUT_SCHEMA, outputs=CHAT_MODEL_OUTPUT_SCHEMA)
        return ModelSignature(inputs=Schema([ColSpec("string")]), outputs=Schema([ColSpec("string")]))

    def _flavor(self) -> dict[str, Any]:
        """What ``mlflow.transformers`` reads to load the version. The Auto classes look into the folder themselves."""
        flavor = {
            "task": "text-generation",
            "instance_type": "TextGenerationPipeline",
            "pipeline_model_type": "AutoModelForCausalLM",
            "model_binary": MODEL_FOLDER,
            "source_model_name": self.name,
            "components": ["tokenizer"],
            "tokenizer_type": "AutoTokenizer",
            "transformers_version": importlib.metadata.version("transformers"),
        }
        return {**flavor, "inference_task": CHAT} if self.chat else flavor


def log_package(package: Package, run_id: str) -> str:
    """Writes the package and uploads it as a logged model of a run.

    Returns:
        the logged model's id.
    """
    import mlflow
    from mlflow.models import Model

    metadata = {**package.metadata, **({"task": CHAT} if package.chat else {})}
    with mlflow.start_run(run_id=run_id, nested=True):  # a logged model belongs to the experiment of the active run
        info = Model.log(
            artifact_path=None,
            flavor=package,
            flavor_name="transformers",
            name="model",
            metadata=metadata,
            validate_serving_input=False,
        )
    return str(info.model_id)


def _write_environment(root: Path) -> None:
    """The files by which MLflow makes an environment for the version; YAML reads JSON."""
    (root / "requirements.txt").write_text("\n".join(REQUIREMENTS) + "\n")
    python = platform.python_version()
    environment = {"python": python, "build_dependencies": ["pip"], "dependencies": ["-r requirements.txt"]}
    conda = {
        "name": "mlflow-env",
        "channels": ["conda-forge"],
        "dependencies": [f"python={python}", "pip", {"pip": list(REQUIREMENTS)}],
    }
    for name, content in (("python_env.yaml", environment), ("conda.yaml", conda)):
        (root / name).write_text(json.dumps(content, indent=2) + "\n")
