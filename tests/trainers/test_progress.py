"""Progress bars."""

from types import SimpleNamespace

from lightning.pytorch.callbacks import RichProgressBar

from trainers import progress


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
