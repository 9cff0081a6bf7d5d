"""One function per arrow. A stage owns its record and its reuse; the executor that does the heavy part is passed in.

    prepare -> pairs -> sft -> model (if there is no SFT model yet)
    pairs, model -> score_reference -> scored pairs -> sweep -> beta
    scored pairs, beta -> train -> policy -> evaluate -> report -> register -> model version

Each takes the run's config, the artifacts it reads and an executor, and returns the artifact it made or reused. Its
output lies at ``<store>/<stage>/<digest>``, or at ``output`` if that is given.
"""

from dpo_train.stages.evaluate import evaluate
from dpo_train.stages.prepare import prepare
from dpo_train.stages.register import register
from dpo_train.stages.sample import sample
from dpo_train.stages.score_reference import score_reference
from dpo_train.stages.sft import sft
from dpo_train.stages.sweep import sweep
from dpo_train.stages.train import train

__all__ = ["evaluate", "prepare", "register", "sample", "score_reference", "sft", "sweep", "train"]
