"""TRL's DPOTrainer as it is, given token ids.

Only its tokenisation is left out. It logs, saves and evaluates nothing, checks no micro-batch for NaN, cuts nothing
off, clips as we do and keeps the learning rate. Gradients add up to the same optimiser batch. Its AdamW is its own
default, the fused one. Padding-free batches it does not have (it warns and pads).
"""

from __future__ import annotations

import os
from typing import Any

from tests.benchmarks.engine_turns import Spec, Turns


def run(spec: Spec, turns: Turns) -> None:
    """Loads (and scores the reference, if that is asked for), then trains until the parent has had enough."""
    os.environ.update(HF_HUB_OFFLINE="1", TQDM_DISABLE="1", HF_DATASETS_CACHE=str(spec.scratch / "datasets"))
    import transformers.models.llama.modeling_llama  # noqa: F401 - here, so that it counts as imported, not as loaded
    from datasets import Dataset
    from transformers import AutoTokenizer
    from trl.trainer.dpo_config import DPOConfig
    from trl.trainer.dpo_trainer import DPOTrainer  # noqa: F401 - as above

    turns.imported()
    home = spec.scratch / spec.name.replace(" ", "-").replace("/", "-")
    rows = [
        {
            "prompt_ids": p.prompt_ids.tolist(),
            "chosen_ids": p.chosen_ids.tolist(),
            "rejected_ids": p.rejected_ids.tolist(),
        }
        for p in spec.pairs
    ]
    # A data set with a file of its own: the trainer keeps its reference log-probs beside it.
    Dataset.from_list(rows).save_to_disk(str(home / "pairs"))
    batch_pairs, on_gpu = len(spec.batches[0]), spec.device == "cuda"
    assert batch_pairs % spec.micro_pairs == 0
    options = DPOConfig(
        output_dir=str(home), max_steps=100_000, per_device_train_batch_size=spec.micro_pairs,
        gradient_accumulation_steps=batch_pairs // spec.micro_pairs, train_sampling_strategy="sequential",
        learning_rate=spec.learning_rate, lr_scheduler_type="constant", warmup_steps=0, weight_decay=0.0,
        max_grad_norm=1.0, beta=spec.beta, max_length=None, disable_dropout=True, bf16=on_gpu, use_cpu=not on_gpu,
        gradient_checkpointing=spec.checkpointing, precompute_ref_log_probs=spec.precomputed, report_to=[],
        logging_strategy="no", save_strategy="no", eval_strategy="no", logging_nan_inf_filter=False,
        dataloader_pin_memory=on_gpu, disable_tqdm=True, use_liger_kernel=spec.liger, torch_compile=spec.compiled,
    )  # fmt: skip
    trainer = _trainer(
        turns, model=str(spec.model), args=options, train_dataset=Dataset.load_from_disk(str(home / "pairs")),
        processing_class=AutoTokenizer.from_pretrained(spec.model),
    )  # fmt: skip
    _take_turns(trainer, turns, checkpointing=spec.checkpointing)
    turns.ready(reference_seconds=trainer.reference_seconds)
    trainer.train()


def _trainer(turns: Turns, **arguments: Any) -> Any:
    from trl.trainer.dpo_trainer import DPOTrainer

    class GivenIds(DPOTrainer):
        """Takes ids as they are, and times the reference."""

        reference_seconds = 0.0

        def _prepare_dataset(self, dataset: Any, *_: Any) -> Any:
            return dataset

        def _precompute_ref_logps(self, dataset: Any, name: str, batch_size: int) -> Any:
            super()._precompute_ref_logps(dataset.select(range(batch_size)), "warm-up", batch_size)
            start = turns.now()
            found = super()._precompute_ref_logps(dataset, name, batch_size)
            self.reference_seconds = turns.now() - start
            return found

    return GivenIds(**arguments)


def _take_turns(trainer: Any, turns: Turns, *, checkpointing: bool) -> None:
    """A step counts from the end of the one before, so that collating its batches is in it."""
    from transformers import TrainerCallback

    losses: list[Any] = []
    training_step = trainer.training_step

    def keep_loss(*arguments: Any, **more: Any) -> Any:
        # Already divided by the number of micro-batches; not looked at before the step is over.
        losses.append(training_step(*arguments, **more))
        return losses[-1]

    class Turn(TrainerCallback):  # type: ignore[misc]
        def on_train_begin(self, _args: Any, _state: Any, control: Any, **_: Any) -> None:
            assert trainer.model.is_activation_checkpointing == checkpointing, "its default is to compute again"
            self._wait(control)

        def on_step_end(self, _args: Any, _state: Any, control: Any, **_: Any) -> None:
            loss = float(sum(losses))
            losses.clear()
            turns.done(loss)
            self._wait(control)

        def _wait(self, control: Any) -> None:
            if not turns.wait():
                control.should_training_stop = True

    trainer.training_step = keep_loss
    trainer.add_callback(Turn())
