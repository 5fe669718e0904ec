"""How good predictions look without a label: pure functions of logits, between 0 and 1, and the more the better."""

import math

from torch import Tensor

from adamerge.objectives import entropy, marginal_entropy


def certainty(logits: Tensor) -> Tensor:
    """1 − mean_b H(p_b) / log C, of logits [B, C]: 1 too where all images are put into one class."""
    return 1 - entropy(logits).mean() / _most(logits)


def information(logits: Tensor) -> Tensor:
    """Mutual information of image and class, (H(mean_b p_b) − mean_b H(p_b)) / log C, of logits [B, C].

    It is 1 where predictions are sure and spread evenly, 0 where they are all alike, sure or not (Bridle et al.,
    "Unsupervised classifiers, mutual information and phantom targets", 1991). Few images per class bound it: by
    log B / log C.
    """
    return (marginal_entropy(logits) - entropy(logits).mean()) / _most(logits)


def agreement(logits: Tensor, teacher: Tensor) -> Tensor:
    """The fraction of images for which two classifiers name the same class: [B, C] each -> a scalar."""
    return (logits.argmax(-1) == teacher.argmax(-1)).float().mean()


def _most(logits: Tensor) -> float:
    """log C, the largest entropy; of a task with one class, whose entropies are 0, any number."""
    return math.log(max(logits.shape[-1], 2))
