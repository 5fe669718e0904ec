"""What the bar says of a run."""

import pytest

from trainers.progress import Progress


@pytest.mark.parametrize("accumulated", [1, 2])
def test_the_bar_counts_the_batches_of_the_whole_run(adapt, tmp_path, accumulated):
    settings = {"enable_progress_bar": True, "accumulate_grad_batches": accumulated}
    _, first = adapt(steps=3, callbacks=[Progress()], trainer=settings)
    first.save_checkpoint(tmp_path / "part.ckpt")
    _, resumed = adapt(steps=5, callbacks=[Progress()], trainer=settings, ckpt_path=str(tmp_path / "part.ckpt"))
    bars = [trainer.progress_bar_callback.train_progress_bar for trainer in (first, resumed)]
    assert [(bar.completed, bar.total) for bar in bars] == [(steps * accumulated,) * 2 for steps in (3, 5)]
