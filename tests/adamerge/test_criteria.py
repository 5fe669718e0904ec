"""Criteria without labels: their limits, and what they make of a collapse."""

import math

import pytest
import torch
from torch.testing import assert_close

from adamerge.criteria import agreement, certainty, information

SURE = 100 * torch.eye(4, dtype=torch.float64)
RANDOM = torch.randn(64, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    ("logits", "sure", "informed"),
    [(SURE, 1.0, 1.0), (SURE[:1].expand(6, -1), 1.0, 0.0), (torch.zeros(6, 4), 0.0, 0.0), (SURE[:2], 1.0, 0.5)],
    ids=["sure of every class", "collapsed", "unsure", "sure of half the classes"],
)
def test_limits(logits, sure, informed):
    assert_close(certainty(logits).item(), sure)
    assert_close(information(logits).item(), informed, atol=1e-7, rtol=0)


def test_information_is_the_divergence_from_the_mean_prediction():
    p = RANDOM.softmax(1)
    expected = (p * (p / p.mean(0)).log()).sum(1).mean() / math.log(5)
    assert_close(information(RANDOM), expected)


def test_a_task_of_one_class_tells_nothing():
    assert information(RANDOM[:, :1]) == 0
    assert certainty(RANDOM[:, :1]) == 1


def test_agreement_counts_images_of_the_same_class():
    assert agreement(RANDOM, 3 * RANDOM + 1) == 1
    assert agreement(SURE, SURE[[0, 1, 3, 2]]) == 0.5
