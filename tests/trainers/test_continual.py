"""Going back to the start, at times and on drift, and averages of what is learned."""

import lightning as L
import pytest
import torch
from torch.testing import assert_close

from adamerge import InputError
from trainers import Stream
from trainers.continual import MovingAverage, Reset


class AtSix(L.Callback):
    """Writes a checkpoint in mid-run, as a run's own callback does."""

    def __init__(self, path):
        self.path = path

    def on_train_batch_end(self, trainer, *_):
        if trainer.global_step == 6:
            trainer.save_checkpoint(self.path)


def adam(params):
    return torch.optim.Adam(params, lr=0.01)


def test_every_episode_begins_where_the_first_did(adapt):
    """Of a stream whose batches are all alike, the third episode learns what the first did."""
    stream = Stream(batch_size=23)  # a step sees all images of a task
    first, _ = adapt(5, stream=stream, optimizer=adam)
    reset = Reset(every=5)
    third, _ = adapt(15, stream=Stream(batch_size=23), optimizer=adam, callbacks=[reset])
    assert reset.resets == [5, 10, 15]
    assert torch.equal(third.coefficients.raw, torch.full_like(third.coefficients.raw, 0.3))
    reset = Reset(every=5)
    third, _ = adapt(14, stream=Stream(batch_size=23), optimizer=adam, callbacks=[reset])
    fourth, _ = adapt(4, stream=Stream(batch_size=23), optimizer=adam)
    assert_close(third.coefficients.raw, fourth.coefficients.raw, atol=1e-4, rtol=0)
    assert not torch.equal(first.coefficients.raw, fourth.coefficients.raw)


def logits(share: float) -> dict[str, torch.Tensor]:
    """Of two classes with relative entropy H(share) / log 2."""
    return {"one": torch.tensor([[share, 1 - share]]).log()}


def test_drift_is_found_soon_and_calm_is_not_drift():
    reset = Reset(drift=0.5)
    calm = [reset._drifts(logits(0.9 + 0.02 * (-1) ** t)) for t in range(300)]
    assert not any(calm)
    found = [reset._drifts(logits(0.6)) for _ in range(10)]
    assert found.index(True) <= 2
    reset._forget()
    assert not any(reset._drifts(logits(0.6)) for _ in range(50)), "what is usual since the reset is no drift"


def test_the_average_is_the_closed_form_of_all_steps(adapt):
    seen = []

    class Watch(MovingAverage):
        def on_train_batch_end(self, trainer, module, *rest):
            seen.append(module.coefficients.raw.detach().clone())
            super().on_train_batch_end(trainer, module, *rest)

    run, _ = adapt(6, optimizer=adam, callbacks=[Watch(0.5)])
    expected = torch.full_like(seen[0], 0.3) * 0.5**6
    for age, value in enumerate(reversed(seen)):
        expected += 0.5 ** (age + 1) * value
    assert_close(run.coefficients.raw.detach(), expected)


@pytest.mark.parametrize("make", [lambda: Reset(every=4), lambda: Reset(drift=0.01), lambda: MovingAverage(0.9)])
def test_resumed_runs_end_as_undisturbed_ones(adapt, tmp_path, make):
    whole, _ = adapt(11, optimizer=adam, callbacks=[make()])
    saved = str(tmp_path / "part.ckpt")
    adapt(9, optimizer=adam, callbacks=[make(), AtSix(saved)])
    resumed, _ = adapt(11, optimizer=adam, callbacks=[make()], ckpt_path=saved)
    assert torch.equal(whole.coefficients.raw, resumed.coefficients.raw)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (Reset, "give every or drift"),
        (lambda: Reset(every=0), "must be positive, got 0 and None"),
        (lambda: MovingAverage(1.0), r"decay is in \[0, 1\), got 1.0"),
    ],
)
def test_impossible_settings(make, message):
    with pytest.raises(InputError, match=message):
        make()
