"""Predictions of images as they come: from folders that grow, standard input and iterators, adapting or not."""

import io
import json
import sys
from pathlib import Path

import lightning as L
import numpy as np
import pytest
import torch
from PIL import Image
from tiny_suite import TinySuite

from adamerge import InputError
from modules import Coefficients, PseudoLabels, Supervised
from trainers import Adaptation, ByEntropy
from trainers.cli import main
from trainers.predicting import predict
from trainers.sources import Folder, StandardInput

HERE = Path(__file__).parent


def images(count: int = 7) -> list[tuple[str, np.ndarray]]:
    pixels = TinySuite().dataset("one", "test").images[:count]
    return [(f"image {n}", x) for n, x in enumerate(pixels)]


def trainer() -> L.Trainer:
    return L.Trainer(
        accelerator="cpu", max_steps=5, logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False,
    )  # fmt: skip


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.parametrize("size", [1, 3])
def test_predictions_are_those_of_the_model_image_by_image(suite, tmp_path, size):
    run = Adaptation(suite, Coefficients("tensor"))
    predict(trainer(), run, images(), tmp_path / "out.jsonl", batch_size=size, task="one")
    found = lines(tmp_path / "out.jsonl")
    logits = run.eval()(suite.dataset("one", "test").batch(torch.arange(7))[0], "one")
    assert [line["name"] for line in found] == [f"image {n}" for n in range(7)]
    assert [line["class"] for line in found] == [suite.classes("one")[k] for k in logits.argmax(1)]
    expected = logits.softmax(1).max(1).values.tolist()
    assert [line["probability"] for line in found] == pytest.approx(expected, abs=1e-4)


def test_tasks_are_found_where_nobody_tells_them(suite, tmp_path):
    run = Adaptation(suite, Coefficients("tensor"), task_id="inferred", finder=ByEntropy())
    predict(trainer(), run, images(), tmp_path / "out.jsonl", batch_size=7)
    found = run.identify(suite.dataset("one", "test").batch(torch.arange(7))[0])
    assert [line["task"] for line in lines(tmp_path / "out.jsonl")] == [suite.tasks[k] for k in found]


def test_an_adapting_run_predicts_each_image_before_it_learns_from_it_and_before_the_next_comes(suite, tmp_path):
    out, seen = tmp_path / "out.jsonl", []

    def coming():
        for number, item in enumerate(images()):
            if number:
                seen.append(len(lines(out)))
            yield item

    run = Adaptation(suite, Coefficients("tensor"), optimizer=lambda params: torch.optim.SGD(params, lr=0.1))
    predict(trainer(), run, coming(), out, adapt=True, task="one")
    assert seen == [1, 2, 3, 4, 5, 6], "nobody waits for the next image"
    assert not torch.equal(run.coefficients.raw, torch.full_like(run.coefficients.raw, 0.3))
    still = Adaptation(suite, Coefficients("tensor"))
    predict(trainer(), still, images(1), tmp_path / "still.jsonl", task="one")
    assert lines(out)[0] == lines(tmp_path / "still.jsonl")[0]


@pytest.mark.parametrize("known", [True, False])
def test_experts_teach_on_images_as_they_come(suite, tmp_path, known):
    given = {"objective": PseudoLabels(), "optimizer": lambda params: torch.optim.SGD(params, lr=0.1)}
    given |= {} if known else {"task_id": "inferred", "finder": ByEntropy()}
    run, still = (Adaptation(suite, Coefficients("tensor"), **given) for _ in range(2))
    predict(trainer(), run, images(), tmp_path / "out.jsonl", adapt=True, batch_size=7, task="one" if known else None)
    still.configure_model()
    x = suite.dataset("one", "test").batch(torch.arange(7))[0]
    found = still.identify(x) if not known else torch.zeros(7, dtype=torch.int64)
    for k in found.unique():
        task, expert = suite.tasks[k], suite.backbone()
        expert.load_state_dict(suite.task_vectors().expert(task))
        with torch.no_grad():
            still.known.keep("expert", task, [expert.eval()(x)])
        batch = {task: {"images": x[found == k], "index": torch.where(found == k)[0]}}
        still.losses(batch)[0][task].backward()
    expected = still.coefficients.raw - 0.1 * still.coefficients.raw.grad
    torch.testing.assert_close(run.coefficients.raw.data, expected.data)
    assert not torch.equal(run.coefficients.raw, still.coefficients.raw)


def test_a_folder_that_grows_is_read_when_its_files_are_whole(tmp_path, monkeypatch):
    def write(name: str, shade: int) -> None:
        Image.new("RGB", (4, 4), (shade, 0, 0)).save(tmp_path / name)

    write("b.png", 1)
    (tmp_path / "notes.txt").write_text("no image")
    (tmp_path / ".part.png").write_text("hidden")
    assert [Path(name).name for name, _ in Folder(str(tmp_path))] == ["b.png"]
    looks = iter(
        [lambda: write("a.png", 2), lambda: (tmp_path / "c.png").write_text("half"), lambda: write("c.png", 3)]
    )
    monkeypatch.setattr("time.sleep", lambda seconds: next(looks, lambda: None)())
    assert [Path(name).name for name, _ in Folder(str(tmp_path), watch=1, patience=3)] == ["b.png", "a.png", "c.png"]
    with pytest.raises(InputError, match="no such folder"):
        next(iter(Folder(str(tmp_path / "none"))))


def test_standard_input_names_files(tmp_path, monkeypatch):
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    monkeypatch.setattr(sys, "stdin", io.StringIO(f"{tmp_path}/a.png\n\n"))
    assert [name for name, _ in StandardInput()] == [f"{tmp_path}/a.png"]


def test_a_broken_file_stops_or_is_left_out(tmp_path, monkeypatch, caplog):
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    (tmp_path / "b.png").write_text("no image")
    with pytest.raises(InputError, match=r"b\.png cannot be decoded"):
        list(Folder(str(tmp_path)))
    assert [Path(name).name for name, _ in Folder(str(tmp_path), on_bad_image="skip")] == ["a.png"]
    monkeypatch.setattr(sys, "stdin", io.StringIO(f"{tmp_path}/b.png\n{tmp_path}/none.png\n{tmp_path}/a.png\n"))
    assert [Path(name).name for name, _ in StandardInput("skip")] == ["a.png"]
    assert "none.png cannot be decoded" in caplog.text
    assert "(2 so far)" in caplog.text


@pytest.mark.parametrize(
    ("kwargs", "given", "message"),
    [
        ({}, {}, "of which task are the images"),
        ({}, {"task": "four"}, "no task is called 'four'; the suite has one, two, three"),
        ({"objective": Supervised(), "allow_labels": True}, {"task": "one", "adapt": True}, "bring no labels"),
        ({}, {"task": "one", "batch_size": 0}, "batch_size must be positive, got 0"),
    ],
)
def test_what_cannot_be_predicted(suite, tmp_path, kwargs, given, message):
    with pytest.raises(InputError, match=message):
        predict(trainer(), Adaptation(suite, **kwargs), images(), tmp_path / "out.jsonl", **given)


@pytest.mark.parametrize("adapt", ["true", "false"])
def test_on_the_command_line(tmp_path, monkeypatch, adapt):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["train.py"])
    monkeypatch.syspath_prepend(str(HERE))
    Path("inbox").mkdir()
    for name, pixels in images(3):
        Image.fromarray(pixels).save(f"inbox/{name}.png")
    command = ["predict", "--model.init_args.suite=tiny_suite.TinySuite", "--trainer.accelerator=cpu", "--task=one"]
    main([*command, "--source=trainers.sources.Folder", "--source.init_args.path=inbox", f"--adapt={adapt}"])
    assert [Path(line["name"]).name for line in lines(Path("runs/run/predictions.jsonl"))] == [
        f"image {n}.png" for n in range(3)
    ]
