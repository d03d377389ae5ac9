"""From last hidden states or logits to log-probabilities and KL divergences.

`_scoring` runs a policy to compute the hidden states.
"""
