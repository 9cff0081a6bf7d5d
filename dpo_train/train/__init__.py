"""The DPO training.

worker.run_rank: load policy and scored pairs -> loop.fit: resume, step, checkpoint, evaluate -> save
step.train_step: rows of one optimiser step -> gradients summed over ranks -> update -> metrics
"""
