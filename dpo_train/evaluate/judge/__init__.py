"""Who compares the answers: a function, a reward model, or a language model behind an endpoint.

(prompt, answer) --rewarder--> rewards --compare_rewards--> Judgements
Matchups --Endpoint.compare: both orders, cache, limits, retries--> Judgements
Judgements --win_rate--> Comparison, with the reason why no rule may rest on it, if there is one

check: what can be known to be wrong before anything is trained;  identity: what of a judge decides its answers
"""

from dpo_train.evaluate.judge.checks import check, identity
from dpo_train.evaluate.judge.endpoint import Endpoint
from dpo_train.evaluate.judge.judgement import Judgement, Matchup
from dpo_train.evaluate.judge.rewards import best_of, compare_rewards, rewarder
from dpo_train.evaluate.judge.winrate import win_rate

__all__ = [
    "Endpoint",
    "Judgement",
    "Matchup",
    "best_of",
    "check",
    "compare_rewards",
    "identity",
    "rewarder",
    "win_rate",
]
