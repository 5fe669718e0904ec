"""Draws that depend on the seed, the expert and the tensor alone."""

import hashlib

import pytest
import torch

from adamerge.rules.random import generator


def test_the_same_arguments_give_the_same_numbers():
    first, second = (torch.rand(5, generator=generator(3, "digits", "0.weight")) for _ in range(2))
    assert torch.equal(first, second)


@pytest.mark.parametrize("other", [(4, "digits", "w"), (3, "signs", "w"), (3, "digits", "v"), (-3, "digits", "w")])
def test_any_other_argument_gives_others(other):
    assert not torch.equal(
        torch.rand(5, generator=generator(3, "digits", "w")), torch.rand(5, generator=generator(*other))
    )


def test_where_one_argument_ends_is_no_matter_of_chance():
    assert generator(1, "a", "b.c").initial_seed() != generator(1, "a.b", "c").initial_seed()
    assert generator(1, "1a", "b").initial_seed() != generator(11, "a", "b").initial_seed()


def test_the_seed_is_the_sha_256_of_the_arguments():
    digest = hashlib.sha256(b'[0, "digits", "0.weight"]').hexdigest()
    assert generator(0, "digits", "0.weight").initial_seed() == int(digest[:16], 16)


def test_draws_from_elsewhere_are_left_alone():
    state = torch.get_rng_state()
    torch.rand(3, generator=generator(0, "a", "w"))
    assert torch.equal(torch.get_rng_state(), state)
