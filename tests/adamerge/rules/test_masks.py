"""Masks over entries, by hand."""

import torch

from adamerge.rules.masks import tall_mask


def test_an_entry_is_its_experts_where_it_outweighs_the_others():
    deltas = torch.tensor([[4.0, 1.0, 0.0, -3.0], [1.0, -10.0, 0.0, -3.0], [0.0, 0.0, 0.0, -3.0]])
    masks = tall_mask(deltas, deltas.sum(0), 0.4)
    # Beside the others, that is: 4 of 1, 1 of 4, 0 of 5; 1 of 10, 10 of 1, 0 of 9; nothing at all; 3 of 6 each.
    assert masks.int().tolist() == [[1, 0, 0, 1], [0, 1, 0, 1], [0, 0, 0, 1]]
    assert torch.equal(masks[1], tall_mask(deltas[1], deltas.sum(0), 0.4))


def test_the_bound_itself_is_not_above_it():
    deltas = torch.tensor([[1.0], [2.0]])
    assert tall_mask(deltas, deltas.sum(0), 0.5).tolist() == [[False], [True]]


def test_a_threshold_of_zero_keeps_what_the_expert_changed():
    deltas = torch.tensor([[1.0, 0.0, -1e-9], [5.0, 7.0, 2.0]])
    assert torch.equal(tall_mask(deltas, deltas.sum(0), 0.0), deltas != 0)
