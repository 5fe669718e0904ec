"""Unlabelled objectives as pure functions of logits."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def entropy(logits: Tensor, eps: float = 0.0) -> Tensor:
    """Entropy of the predicted distribution, H(p) = −Σ_c p_c log p_c with p = softmax(logits).

    Args:
        logits: [B, C], of any floating dtype; computed in float32 at least.
        eps: added inside the logarithm. 0 is exact and the default; published code often has 1e-8.

    Returns:
        [B] entropies in nats, between 0 and log C.
    """
    log_p = _float(logits).log_softmax(-1)
    p = log_p.exp()
    return -(p * (log_p if eps == 0 else (p + eps).log())).sum(-1)


def marginal_entropy(logits: Tensor) -> Tensor:
    """Entropy of the mean prediction of a batch, H(mean_b p_b), a scalar: low where all are put in one class."""
    log_mean = _float(logits).log_softmax(-1).logsumexp(0) - math.log(len(logits))
    return -(log_mean.exp() * log_mean).sum()


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """−log p_c with c the label: [B, C] and [B] -> [B]."""
    return F.cross_entropy(_float(logits), labels, reduction="none")


def pseudo_label(logits: Tensor, teacher: Tensor) -> Tensor:
    """Cross-entropy against the teacher's most likely class, −log p_c with c = argmax q: [B, C] each -> [B]."""
    return cross_entropy(logits, teacher.argmax(-1))


def worth_learning(logits: Tensor, teacher: Tensor) -> Tensor:
    """[B] where a pseudo-label is kept (Tint++, arXiv:2412.19098): both agree, or the teacher is as sure or surer."""
    p, own = _float(logits).softmax(-1).max(-1)
    q, label = _float(teacher).softmax(-1).max(-1)
    return (own == label) | (q >= p)


def kl(logits: Tensor, teacher: Tensor, temperature: float = 1.0) -> Tensor:
    """T² KL(q ‖ p) with q = softmax(teacher / T), p = softmax(logits / T): [B] in nats, not negative."""
    log_p, log_q = ((x / temperature).log_softmax(-1) for x in (_float(logits), _float(teacher)))
    return temperature**2 * (log_q.exp() * (log_q - log_p)).sum(-1)


def js(logits: Tensor, teacher: Tensor) -> Tensor:
    """Jensen-Shannon divergence ½ KL(p ‖ m) + ½ KL(q ‖ m), m = ½ (p + q): [B] in nats, between 0 and log 2."""
    log_p, log_q = _float(logits).log_softmax(-1), _float(teacher).log_softmax(-1)
    log_m = torch.logaddexp(log_p, log_q) - math.log(2)
    return 0.5 * ((log_p.exp() * (log_p - log_m)).sum(-1) + (log_q.exp() * (log_q - log_m)).sum(-1))


def kept_mean(losses: Tensor, keep: Tensor) -> Tensor:
    """[B] losses whose mean is the mean over those to `keep`, and 0, with a gradient of 0, where none is."""
    return torch.where(keep, losses, 0) * (len(losses) / keep.sum().clamp(min=1))


def _float(logits: Tensor) -> Tensor:
    return logits.to(torch.promote_types(logits.dtype, torch.float32))
