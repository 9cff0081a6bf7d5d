"""What a run would take, before anything is started: memory, time and cost, from the model's config and a few numbers.

    config.json --outline.meta_model--> sizes.py: weights, by what they are and who holds them
    a row       --trace.py: the engine's own forward and backward without numbers--> what a row takes
    sizes + trace --memory.py--> parts of a GPU's memory, stage by stage --advice.py--> what to change
    sizes + workload.py (pairs, tokens) --work.py--> operations --> pairs/s, hours, cost

No weight is read and nothing is downloaded.
"""
