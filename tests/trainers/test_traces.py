"""What is kept of every step stays bounded."""

import torch

from trainers.traces import Trace


def test_a_short_run_is_kept_as_it_was_and_a_long_one_as_means():
    trace = Trace(limit=8)
    for step in range(1, 8):
        trace.add(step, 0.1 * step, torch.tensor([float(step), torch.nan]))
    assert trace.steps == list(range(1, 8))
    trace.add(8, 0.8, torch.tensor([8.0, 4.0]))
    assert trace.steps == [2, 4, 6, 8]
    assert torch.stack(trace.losses)[:, 0].tolist() == [1.5, 3.5, 5.5, 7.5]
    assert trace.losses[-1].tolist() == [7.5, 4.0], "of the steps in which a task came"
    for step in range(9, 1000):
        trace.add(step, 0.0, torch.tensor([float(step), 0.0]))
        assert len(trace.steps) < 8
    other = Trace(limit=8)
    other.load_state_dict(trace.state_dict())
    for each in (trace, other):
        each.add(1000, 0.0, torch.tensor([1000.0, 0.0]))
    assert trace.steps == other.steps
    assert torch.equal(torch.stack(trace.losses), torch.stack(other.losses))
