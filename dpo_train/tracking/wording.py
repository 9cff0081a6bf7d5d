"""What runs say about themselves on MLflow's pages: what they are, and what their numbers mean, with units."""

from __future__ import annotations

PIPELINE = """\
One run of the **dpo** pipeline: preference data to an aligned, evaluated, registered model.
Below it is a run for each stage, and below the stage *sweep* one for each trial.

| metric | meaning | unit |
|---|---|---|
| `heldout/accuracy` | held-out pairs whose chosen answer gets the larger reward (chance: 0.5) | share |
| `heldout/margin` | reward of the chosen answer minus that of the rejected one | nats x beta |
| `samples/kl` | KL(policy, reference), from the policy's own answers | nats per answer |
| `samples/length_ratio` | length of the policy's answers over the reference's | ratio |
| `judge/.../win_rate` | answers that the judge prefers to the opponent's, ties counting half | share |
| `chosen/beta` | beta of the final training, by the sweep or by the config | |

`..._low` and `..._high` are the bounds of a 95 % interval. The artifact `config.json` is the whole config:
`dpo reproduce URI RUN_ID` runs it again.
"""

_TRAINING = """\
| metric | meaning | unit |
|---|---|---|
| `loss` | of the step's pairs, before its update | nats |
| `rewards/accuracy` | pairs whose chosen answer gets the larger reward (chance: 0.5) | share |
| `rewards/chosen`, `rewards/rejected`, `rewards/margin` | beta x log(policy / reference) | nats x beta |
| `logps/...` | log-probability of an answer under the policy | nats per answer |
| `drift/...` | log(policy / reference) of an answer; both below 0: both answers are falling | nats per answer |
| `kl` | estimate of KL(policy, reference) on the data's answers | nats per answer |
| `grad_norm`, `learning_rate` | before clipping; of this step | |
| `validation/...` | the same numbers on the validation pairs | as above |
| `pairs_per_second`, `tokens_per_second` | over all workers | 1/s |
| `row_fill` | part of the packed rows that holds tokens | share |
| `peak_memory_gb` | of the fullest worker | GB |
| `mfu` | use of the GPUs' peak arithmetic | share |
| `count/...` | steps and pairs | count |

The x-axis is the optimiser's step, from 1.
"""

_COUNTS = "| metric | meaning | unit |\n|---|---|---|\n| `count/...` | records, pairs and tokens | count |\n"

STAGES = {
    "prepare": f"Raw preference data to validated, tokenised pairs.\n\n{_COUNTS}",
    "sft": f"Supervised fine-tuning on the chosen answers, before DPO.\n\n{_TRAINING}",
    "score_reference": f"Log-probs of the pairs under the reference model.\n\n{_COUNTS}",
    "sweep": (
        "The choice of beta on validation pairs: a run below this one for each trial. `trials.json` says why each of "
        "the others lost.\n\n"
        "| metric | meaning | unit |\n|---|---|---|\n"
        "| `validation/...` | of the trial that won | share; nats x beta |\n| `count/...` | trials | count |\n"
    ),
    "train": f"Direct Preference Optimization: scored pairs to a policy.\n\n{_TRAINING}",
    "evaluate": (
        "Policy against reference and champion, on held-out pairs and on answers of their own. `report.html` has it "
        "all with plots.\n\n" + PIPELINE[PIPELINE.index("| metric") : PIPELINE.index("| `chosen/beta`")]
    ),
    "register": "The policy as a version in the model registry, if the gate let it pass.",
}

TRIAL = f"""\
One setting of the sweep, trained and measured on validation pairs. The tag `dpo.chosen` says whether it won, and
`dpo.why_not` why it did not.

| metric | meaning | unit |
|---|---|---|
| `validation/accuracy` | validation pairs whose chosen answer gets the larger reward (chance: 0.5) | share |
| `validation/margin` | reward of the chosen answer minus that of the rejected one | nats x beta |
| `samples/kl` | KL(policy, reference), from the policy's own answers to validation prompts | nats per answer |
| `samples/length_ratio` | length of those answers over the reference's | ratio |
| `judge/reward`, `judge/win_rate` | of those answers, by the judge | the judge's; share |
| `trained/steps` | optimiser steps that it was trained | count |

{_TRAINING}"""
