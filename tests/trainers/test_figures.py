"""What the figures of a run say."""

import pytest
import torch

from trainers import figures

TASKS = ("a", "b")


@pytest.mark.parametrize(("count", "title"), [(20, "Loss by task"), (120, "Loss by task, mean of 3 steps")])
def test_progress_names_every_line_once_and_beside_the_panels(count, title, tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(figures, "save", lambda figure, path: drawn.append(figure))
    losses, scores = torch.rand(count, 2), {0: {"a": 0.4, "b": 0.5}, count: {"a": 0.6, "b": 0.5}}
    figures.progress(range(1, count + 1), losses, "Entropy", scores, {"a": 0.9}, TASKS, tmp_path / "progress.png")
    (figure,) = drawn
    assert figure.axes[0].get_title() == title
    assert [axes.get_legend() for axes in figure.axes] == [None, None]
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == ["a", "b", "average", "experts"]
    figure.draw_without_rendering()
    assert legend.get_window_extent().x0 >= figure.axes[1].get_window_extent().x1


def test_progress_of_a_run_without_a_loss(tmp_path):
    figures.progress([1], torch.full((1, 2), torch.nan), "Entropy", {}, None, TASKS, tmp_path / "progress.png")
    assert (tmp_path / "progress.png").exists()
