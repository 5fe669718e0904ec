"""Unlabelled objectives as pure functions of logits."""

import torch
from torch import Tensor


def entropy(logits: Tensor, eps: float = 0.0) -> Tensor:
    """Entropy of the predicted distribution, H(p) = −Σ_c p_c log p_c with p = softmax(logits).

    Args:
        logits: [B, C], of any floating dtype; computed in float32 at least.
        eps: added inside the logarithm. 0 is exact and the default; published code often has 1e-8.

    Returns:
        [B] entropies in nats, between 0 and log C.
    """
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    log_p = logits.log_softmax(-1)
    p = log_p.exp()
    return -(p * (log_p if eps == 0 else (p + eps).log())).sum(-1)
