"""What the bar says of a run."""

from types import SimpleNamespace

import pytest
from lightning.pytorch.callbacks import RichProgressBar

from trainers import progress


@pytest.mark.parametrize("accumulated", [1, 2])
def test_the_bar_counts_the_batches_of_the_whole_run(adapt, tmp_path, accumulated):
    settings = {"enable_progress_bar": True, "accumulate_grad_batches": accumulated}
    _, first = adapt(steps=3, callbacks=[progress.Progress()], trainer=settings)
    first.save_checkpoint(tmp_path / "part.ckpt")
    again = {"callbacks": [progress.Progress()], "ckpt_path": str(tmp_path / "part.ckpt")}
    _, resumed = adapt(steps=5, trainer=settings, **again)
    bars = [trainer.progress_bar_callback.train_progress_bar for trainer in (first, resumed)]
    assert [(bar.completed, bar.total) for bar in bars] == [(steps * accumulated,) * 2 for steps in (3, 5)]


def test_a_bar_asks_for_the_loss_now_and_then_and_at_the_end(monkeypatch):
    """Each time it asks, the host waits for the device."""
    asked, now = [], [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(RichProgressBar, "_update_metrics", lambda self, trainer, module: asked.append(now[0]))
    bar = progress.Progress()
    for step in range(1, 11):
        bar._update_metrics(SimpleNamespace(global_step=step, max_steps=10), None)
        now[0] += 0.0625
    assert asked == [100.0, 100.25, 100.5, 100.5625]
