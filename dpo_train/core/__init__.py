"""Pure torch: tensors and floats in, tensors out. No input or output, no ranks, no config.

packed rows --attention.shared_prompt_mask--> decoder --> hidden states
hidden states + vocabulary matrix --logprobs.token_logprobs--> per-token log-probs --> logps per answer
logps of policy and reference --loss.preference_loss--> loss and rewards per pair --metrics--> (sum, count)
"""
