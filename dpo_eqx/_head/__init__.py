"""From last hidden states or logits to log-probabilities and KL divergences.

How a policy is run to get hidden states is in `_scoring`.
"""
