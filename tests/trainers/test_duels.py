"""Guards of a stream that passes once: snapshots are compared on what has come, and the better one goes on."""

import pytest
import torch
from test_guards import collapsing, learned, same

from modules import Coefficients, Head
from trainers import Adaptation, ByEntropy, Shuffled, Stream
from trainers.duels import duel
from trainers.guards import Guard


def once(**kwargs) -> Stream:
    return Stream(**{"batch_size": 8, "order": Shuffled(), **kwargs})


def test_a_collapse_is_taken_back(adapt, suite):
    begun = Adaptation(suite, Coefficients("tensor"), **collapsing())
    begun.configure_model()
    module, trainer = adapt(8, stream=once(), callbacks=[guard := Guard(every=2, keep="agreement")], **collapsing())
    alone, _ = adapt(8, stream=once(), **collapsing())
    assert trainer.global_step == 8
    assert guard.seen.champion == 0
    assert same(learned(module), learned(begun))
    assert not same(learned(alone), learned(begun))


@pytest.mark.parametrize("ask", [True, False])
def test_both_are_measured_on_the_images_that_came(adapt, ask):
    module, trainer = adapt(5, stream=once())
    now = {name: value.clone() for name, value in module.state_dict().items()}
    start = {**now, "coefficients.raw": 5 * torch.ones_like(now["coefficients.raw"])}
    found = duel(trainer, module, start, now, 100, ask)
    expected, values = [], []
    for state in (start, now):
        module.load_state_dict(state)
        own, each_image = [], []
        for task, dataset in trainer.datamodule.steps().datasets.items():
            came = trainer.datamodule.steps().all_indices(task, 0, 5)
            images = torch.stack([dataset[int(index)][0] for index in came])
            logits = module(images, task).detach()
            if ask:
                expert = module.suite.backbone()
                expert.load_state_dict(module.suite.task_vectors().expert(task))
                teacher = Head(module.suite.head(task))(expert(images)).argmax(1)
                each_image.append((logits.argmax(1) == teacher).float())
                own.append(sum(map(bool, logits.argmax(1) == teacher)) / len(came))
            else:
                p = logits.softmax(1)
                each, whole = torch.special.entr(p).sum(1).mean(), torch.special.entr(p.mean(0)).sum()
                own.append(float((whole - each) / torch.tensor(float(p.shape[1])).log()))
                kl = torch.nn.functional.kl_div(p.mean(0).log().expand_as(p), p, reduction="none").sum(1)
                each_image.append(kl / torch.tensor(float(p.shape[1])).log())
        expected.append(sum(own) / len(own))
        values.append(each_image)
    doubts = [float(((b - a) ** 2).mean() / len(a)) for a, b in zip(*values, strict=True)]
    assert found == pytest.approx((expected[1] - expected[0], sum(doubts) ** 0.5 / len(doubts)), abs=1e-6)
    assert expected[0] != pytest.approx(expected[1], abs=1e-4)
    assert same(module.state_dict(), now), "the run is left with the second"


def test_a_guard_that_joins_later_begins_with_what_is_there(adapt, tmp_path):
    _, trainer = adapt(3, stream=once())
    trainer.save_checkpoint(tmp_path / "three.ckpt")
    guard = Guard(every=2, keep="information")
    module, trainer = adapt(6, stream=once(), callbacks=[guard], ckpt_path=tmp_path / "three.ckpt")
    assert trainer.global_step == 6
    assert guard.seen.champion >= 3
    assert module.coefficients.raw.isfinite().all()


def test_unknown_tasks_are_found_for_it(adapt):
    guard = Guard(every=2, keep="agreement")
    settings = {"task_id": "inferred", "finder": ByEntropy(), **collapsing()}
    module, _ = adapt(6, stream=once(task_known=False), callbacks=[guard], **settings)
    alone, _ = adapt(6, stream=once(task_known=False), **settings)
    assert guard.seen.champion == 0
    assert not same(learned(module), learned(alone))


def test_what_is_hardly_worse_goes_on_but_is_not_what_the_run_ends_with(adapt, monkeypatch):
    found = iter([(-0.01, 0.02), (0.01, 0.02), (0.05, 0.02), (-0.05, 0.02), (-0.01, 0.01)])
    asked = []

    def told(trainer, run, first, second, images, ask):
        asked.append((trainer.global_step, images))
        return next(found)

    monkeypatch.setattr("trainers.guards.duel", told)
    guard = Guard(every=1, keep="information", images=10)
    module, _ = adapt(4, stream=once(), callbacks=[guard])
    alone, _ = adapt(3, stream=once())
    assert asked == [(1, 10), (2, 10), (3, 10), (4, 10), (4, 40)]
    assert guard.describe()["ended_with_step"] == guard.seen.champion == 3
    assert same(learned(module), learned(alone))
    assert same(guard.seen.left, guard.seen.best), "it had gone back at the last look"
