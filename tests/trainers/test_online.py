"""A stream that passes once: predicted, then adapted on; resumed, corrupted, of unknown tasks, of unseen ones."""

import json
from types import SimpleNamespace

import pytest
import torch
from tiny_suite import TinySuite

from adamerge import InputError
from adamerge.corruptions import Contrast, GaussianNoise
from modules import Coefficients, FeatureRouter, PseudoLabels, Surgery
from trainers import Adaptation, ByEntropy, ByPrototype, Drifting, Shuffled, Stream, TaskBlocks
from trainers.report import Report
from trainers.streams import StreamSteps


def ordered(**kwargs) -> Stream:
    return Stream(**{"batch_size": 8, "order": Shuffled(), **kwargs})


def lasting(lr: float = 0.05) -> dict:
    return {"optimizer": lambda params: torch.optim.SGD(params, lr=lr, momentum=0.9)}


class Watched(Adaptation):
    """Remembers what it predicts for every batch before it learns from it."""

    def training_step(self, batch, batch_idx):
        with torch.no_grad():
            for task, part in batch.items():
                right = self(part["images"], task).argmax(1)
                self.seen = [*getattr(self, "seen", []), (task, part["index"].tolist(), right.tolist())]
        return super().training_step(batch, batch_idx)


def test_each_image_is_predicted_once_before_the_step_that_learns_from_it(adapt, suite, tmp_path):
    report = Report(references=False, figures=False)
    module = Watched(suite, Coefficients("tensor"), **lasting())
    _, trainer = adapt(500, module=module, stream=ordered(), callbacks=[report])
    assert trainer.global_step == 9, "69 images, 8 a step: the run ends with the stream"
    assert len({(task, i) for task, index, _ in module.seen for i in index}) == 69
    for task in suite.tasks:
        labels = suite.dataset(task, "test").labels
        own = [(index, torch.tensor(found)) for t, index, found in module.seen if t == task]
        right = sum((labels[index] == found).sum().item() for index, found in own)
        assert report.online.accuracy(suite.tasks)[task] == pytest.approx(right / 23)
    curves = json.loads((tmp_path / "prequential.json").read_text())
    assert curves["images"] == [8, 16, 24, 32, 40, 48, 56, 64, 69]
    assert curves["cumulative"]["all images"][-1] == pytest.approx(
        sum(report.online.accuracy(suite.tasks).values()) / 3
    )
    rows = [row["method"] for row in json.loads((tmp_path / "results.json").read_text())["rows"]]
    assert rows == ["this run, start", "this run, online", "this run, adapted"]


@pytest.mark.parametrize("size", [1, 4])
def test_images_one_by_one_add_up_over_a_window(adapt, size):
    """A window of batches moves as one batch of all its images does."""
    by_window, trainer = adapt(
        3, stream=ordered(batch_size=size), trainer={"accumulate_grad_batches": 8 // size}, **lasting()
    )
    assert trainer.global_step == 3
    at_once, _ = adapt(3, stream=ordered(), **lasting(0.05 * 8 / size * size / 8))
    change = [run.coefficients.raw.detach() - 0.3 for run in (by_window, at_once)]
    torch.testing.assert_close(*change, rtol=1e-4, atol=1e-6)


def test_a_balanced_batch_has_the_loss_of_the_offline_protocol(suite):
    stream = ordered(batch_size=6)
    stream.trainer = SimpleNamespace(
        lightning_module=SimpleNamespace(suite=suite), global_rank=0, world_size=1, accumulate_grad_batches=1
    )
    run = Adaptation(suite, Coefficients("tensor"))
    run.configure_model()
    batch = StreamSteps({t: suite.dataset(t, "test") for t in suite.tasks}, 2, 0)[0]
    offline = torch.stack(list(run.losses(batch)[0].values())).sum()
    for part in batch.values():
        part["weight"] = torch.full((2,), 3 / 6)
    torch.testing.assert_close(torch.stack(list(run.losses(batch)[0].values())).sum(), offline)


@pytest.mark.parametrize(
    "kwargs",
    [
        {"order": TaskBlocks(2)},
        {"order": Drifting(), "batch_size": 1},
        {"corruptions": [GaussianNoise(5), Contrast(5)]},
        {"task_known": False},
    ],
    ids=["blocks", "one by one", "corrupted", "untold"],
)
def test_a_resumed_stream_ends_as_an_undisturbed_one(adapt, tmp_path, kwargs):
    def run(steps, **more):
        report = Report(references=False, figures=False)
        task = {"task_id": "inferred", "finder": ByEntropy()} if "task_known" in kwargs else {}
        module, trainer = adapt(steps, stream=ordered(**kwargs), callbacks=[report], **task, **lasting(), **more)
        return module, trainer, report

    whole, _, told = run(9)
    _, trainer, _ = run(4)
    trainer.save_checkpoint(tmp_path / "part.ckpt")
    resumed, _, same = run(9, ckpt_path=str(tmp_path / "part.ckpt"))
    assert torch.equal(whole.coefficients.raw, resumed.coefficients.raw)
    assert torch.equal(told.online.table(), same.online.table())


# -- corrupted, unseen, unknown --------------------------------------------------------------------------------------


def attached(suite, **kwargs) -> Stream:
    stream = Stream(**kwargs)
    module = SimpleNamespace(suite=suite, without_images=list)
    stream.trainer = SimpleNamespace(lightning_module=module, global_rank=0, world_size=1, accumulate_grad_batches=1)
    return stream


def test_a_corrupted_image_looks_the_same_whenever_it_is_read_and_wherever_it_is_held(suite):
    plain = attached(suite)._parts()["one"][0]
    stream = attached(suite, corruptions=[GaussianNoise(2)])
    adapted, scored = stream._parts()["one"]
    assert adapted is scored
    index = torch.tensor([5, 3, 20])
    assert not scored.batch(index)[0].equal(plain.batch(index)[0])
    assert scored.batch(index)[0].equal(torch.stack([scored[int(i)][0] for i in index]))
    assert scored.labels.equal(plain.labels)
    noise = (scored.batch(torch.arange(23))[0] - plain.batch(torch.arange(23))[0]) / 2  # a std of 0.5 doubles it
    assert 0.02 < noise.std() < 0.07
    held = attached(suite, corruptions=[GaussianNoise(2)], held_out=0.5)._parts()["one"]
    for part in held:
        assert part[4][0].equal(scored[int(part.dataset.indices[4])][0])
    other = attached(suite, corruptions=[GaussianNoise(2)], seed=1)._parts()["one"][0]
    assert not other[5][0].equal(scored[5][0])


def test_training_images_stay_as_they_are(suite):
    adapted, _ = attached(suite, corruptions=[Contrast()], train_split="train")._parts()["two"]
    assert adapted[3][0].equal(suite.dataset("two", "train")[3][0])


def test_corruptions_take_turns_in_the_order_of_the_stream(suite):
    stream = attached(suite, order=Shuffled(), batch_size=23, corruptions=[Contrast(1), Contrast(5), Contrast(1)])
    steps, calm = stream.steps(), attached(suite, order=Shuffled(), batch_size=23, corruptions=[Contrast(1)]).steps()
    for step, same in enumerate((True, False, True)):
        for task, part in steps[step].items():
            assert part["images"].equal(calm[step][task]["images"]) is same
            assert part["index"].equal(calm[step][task]["index"])


def test_a_run_adapts_on_some_tasks_and_scores_all(adapt, suite, tmp_path):
    report = Report(references=False, figures=False)
    module = Watched(suite, Coefficients("tensor"))
    adapt(4, module=module, stream=Stream(batch_size=4, tasks=["three", "one"]), callbacks=[report])
    assert {task for task, _, _ in module.seen} == {"three", "one"}
    results = json.loads((tmp_path / "results.json").read_text())
    assert set(results["rows"][-1]["accuracy"]) == set(suite.tasks)
    assert results["unseen_tasks"]["adapted"] == results["rows"][-1]["accuracy"]["two"]
    with pytest.raises(InputError, match=r"the stream names task 'four'; the suite has one, two, three"):
        adapt(1, stream=Stream(tasks=["four"]))


def truth(suite) -> Adaptation:
    run = Adaptation(suite, Coefficients("model"), task_id="inferred", finder=ByEntropy())
    run.configure_model()
    return run.eval()


def test_the_surest_head_finds_the_task(suite):
    run = truth(suite)
    images = suite.dataset("one", "test").batch(torch.arange(23))[0]
    logits = {task: run(images, task).detach() for task in suite.tasks}
    relative = [
        torch.distributions.Categorical(logits=x).entropy() / torch.tensor(float(x.shape[1])).log()
        for x in logits.values()
    ]
    expected = torch.stack(relative).argmin(0)
    assert run.identify(images).equal(expected)
    assert len(expected.unique()) > 1
    scored = run.scored(images, "one")
    assert scored[:, :-1].equal(logits["one"])
    assert (scored.argmax(1) == scored.shape[1] - 1).equal(expected != 0)


def test_a_prototype_finds_tasks_that_look_different(suite, monkeypatch):
    plain = TinySuite.dataset

    def dataset(self, task, split):
        data = plain(self, task, split)
        data.images = (data.images // 8 + 100 * self.tasks.index(task)).astype("uint8")
        return data

    monkeypatch.setattr(TinySuite, "dataset", dataset)
    run = Adaptation(suite, Coefficients("model"), task_id="inferred", finder=ByPrototype(8))
    run.configure_model()
    images = {task: suite.dataset(task, "test").batch(torch.arange(23))[0] for task in suite.tasks}
    right = torch.cat([run.identified(x, task) for task, x in images.items()]).float().mean()
    assert right > 0.8, "a third by chance"
    assert "train data" in ByPrototype.needs


def test_an_untold_run_learns_by_the_tasks_it_finds(adapt, suite):
    """It never looks at the tasks that a batch comes with."""
    parts = []

    class Renamed(Adaptation):
        def told(self, batch):
            found = super().told(batch)
            parts.append(found)
            whole = {name: torch.cat([part[name] for part in batch.values()]) for name in next(iter(batch.values()))}
            again = super().told({"two": whole})
            assert {t: set(p["index"].tolist()) for t, p in again.items()} == {
                t: set(p["index"].tolist()) for t, p in found.items()
            }
            return found

    module = Renamed(
        suite, Coefficients("tensor"), PseudoLabels(), learn=["coefficients"], task_id="inferred", finder=ByEntropy()
    )
    adapt(9, module=module, stream=ordered(task_known=False))
    assert sum(len(part["index"]) for batch in parts for part in batch.values()) == 69


def test_surgery_on_a_stream_of_unknown_tasks(adapt, suite):
    run, _ = adapt(
        4,
        suite=suite,
        correction=Surgery(rank=2),
        objective=PseudoLabels(),
        learn=["correction"],
        task_id="inferred",
        finder=ByEntropy(),
        stream=ordered(task_known=False),
    )
    assert any(bool((p != 0).any()) for p in run.correction.parameters())


@pytest.mark.parametrize(
    ("stream", "kwargs", "message"),
    [
        (ordered(task_known=False), {}, "does not tell the tasks of its images: set task_id to inferred"),
        (ordered(), {"task_id": "inferred"}, "or another finder, such as trainers.ByEntropy"),
    ],
)
def test_runs_that_cannot_find_a_task_are_refused(adapt, stream, kwargs, message):
    with pytest.raises(InputError, match=message):
        adapt(1, stream=stream, **kwargs)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"order": Shuffled(), "tasks_per_step": 1}, "leave out tasks_per_step"),
        ({"corruptions": [Contrast(), Contrast()]}, "need an order of the stream"),
    ],
)
def test_streams_that_contradict_themselves(kwargs, message):
    with pytest.raises(InputError, match=message):
        Stream(**kwargs)


def test_a_router_of_tasks_is_the_default_finder(adapt):
    run, _ = adapt(3, router=FeatureRouter(), task_id="inferred", stream=ordered())
    images = run.suite.dataset("one", "test").batch(torch.arange(5))[0]
    run.eval()
    expected = run.view("one", {"images": images}).task_logits.argmax(1)
    assert run.identify(images).equal(expected)
