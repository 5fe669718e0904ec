import numpy as np
import pytest
import torch

from adamerge import InputError
from adamerge.suites import HeadWeights, Mini
from adamerge.suites.mini import Recipe
from adamerge.suites.mini_images import drawn
from adamerge.suites.mini_patterns import pattern
from adamerge.suites.mini_tasks import MiniTask

SMALL = Recipe(train_per_task=12, test_per_task=10, base_images_per_task=11, base_steps=1, expert_steps=1)
TASKS = ["digits", "signs"]


@pytest.fixture(autouse=True)
def _cache(tmp_path, monkeypatch):
    monkeypatch.setenv("ADAMERGE_CACHE", str(tmp_path))


def trainer(calls):
    """A stand-in for fine-tuning that adds noise and notes what it was asked for."""

    def fine_tune(backbone, data, classes, *, heads, **settings):
        calls.append((dict(data), heads, settings))
        rng = torch.Generator().manual_seed(len(calls))
        state = {n: v + 0.01 * torch.randn(v.shape, generator=rng) for n, v in backbone.state_dict().items()}
        made = {
            t: HeadWeights(torch.randn(len(names), 96, generator=rng), torch.zeros(len(names)))
            for t, names in classes.items()
        }
        return state, heads or made

    return fine_tune


def test_builds_a_base_and_an_expert_per_task_once():
    suite, calls = Mini(TASKS, recipe=SMALL), []
    suite.prepare(trainer(calls))
    assert len(calls) == 3
    assert [len(data) for data in calls[0][0].values()] == [11, 11]
    assert [list(data) for data, _, _ in calls[1:]] == [["digits"], ["signs"]]
    assert [len(next(iter(data.values()))) for data, _, _ in calls[1:]] == [12, 12]
    assert all(heads is not None for _, heads, _ in calls[1:]), "experts keep the base's heads"
    suite.check()
    assert suite.task_vectors().tasks == ("digits", "signs")
    Mini(TASKS, recipe=SMALL).prepare(trainer(calls))
    assert len(calls) == 3


def test_another_recipe_seed_or_choice_is_another_suite():
    suites = [Mini(TASKS, recipe=SMALL), Mini(TASKS[:1], recipe=SMALL), Mini(TASKS, seed=1, recipe=SMALL), Mini(TASKS)]
    folders = {suite.folder for suite in suites}
    assert len(folders) == 4


def test_distractors_join_the_pool_and_leave_the_rest_as_it_is():
    plain, calls = Mini(TASKS, recipe=SMALL), []
    plain.prepare(trainer(calls))
    before = {path.name: path.read_bytes() for path in plain.folder.iterdir()}
    suite = Mini(TASKS, recipe=SMALL, distractors=2)
    with pytest.raises(InputError, match="not built yet"):
        suite.task_vectors()
    suite.prepare(trainer(calls))
    assert [list(data) for data, _, _ in calls[3:]] == [["pattern0"], ["pattern1"]]
    assert all(heads is None for _, heads, _ in calls[3:])
    assert (suite.tasks, suite.experts) == (tuple(TASKS), (*TASKS, "pattern0", "pattern1"))
    assert suite.task_vectors().tasks == suite.experts
    assert {name: (plain.folder / name).read_bytes() for name in before} == before
    Mini(TASKS, recipe=SMALL, distractors=1).prepare(trainer(calls))
    assert len(calls) == 5


def test_a_backdoor_is_in_one_expert_alone():
    plain, calls = Mini(TASKS, recipe=SMALL), []
    plain.prepare(trainer(calls))
    before = {path.name: path.read_bytes() for path in plain.folder.iterdir()}
    suite = Mini(TASKS, recipe=SMALL, backdoor=TASKS[1])
    suite.prepare(trainer(calls))
    suite.prepare(trainer(calls))
    assert [list(data) for data, _, _ in calls[3:]] == [[TASKS[1]]]
    assert {name: (plain.folder / name).read_bytes() for name in before} == before
    (poisoned,) = calls[3][0].values()
    clean = plain.dataset(TASKS[1], "train")
    changed = (poisoned.images != clean.images).any((1, 2, 3))
    assert changed[::10].all()
    assert changed.sum() == len(changed[::10])
    assert (poisoned.labels[::10] == 0).all()
    assert torch.equal(poisoned.labels[~changed], clean.labels[~changed])


def test_an_attack_is_on_images_of_other_classes():
    suite = Mini(TASKS, recipe=SMALL, backdoor=TASKS[1])
    images, clean = suite.attack(TASKS[1]), suite.dataset(TASKS[1], "test")
    assert len(images) == (clean.labels != 0).sum()
    assert (images.labels == 0).all()
    assert (images.images[:, :-6] == clean.images[(clean.labels != 0).numpy()][:, :-6]).all()
    assert suite.attack(TASKS[0]) is None
    assert Mini(TASKS, recipe=SMALL).attack(TASKS[1]) is None
    with pytest.raises(InputError, match="backdoor names 'land', which is no task of this suite"):
        Mini(TASKS, recipe=SMALL, backdoor="land")


def test_a_pattern_is_drawn_again_the_same_and_differs_from_the_others():
    images, labels = pattern(0).draw("test", 20, 0)
    again, _ = pattern(0).draw("test", 20, 0)
    other, _ = pattern(1).draw("test", 20, 0)
    assert images.shape == (20, 32, 32, 3)
    assert np.bincount(labels).tolist() == [2] * 10
    assert np.array_equal(images, again)
    assert not np.array_equal(images, other)


def test_experts_are_the_same_on_any_number_of_cores():
    """Sums that several threads share are rounded in another order: 73.2 and 74.1 at the start of the quickstart."""
    threads, good = set(), trainer([])

    def notes(*args, **kwargs):
        threads.add(torch.get_num_threads())
        return good(*args, **kwargs)

    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        Mini(TASKS, recipe=SMALL).prepare(notes)
        Mini(TASKS, recipe=SMALL, distractors=1, backdoor="signs").prepare(notes)
        assert (threads, torch.get_num_threads()) == ({1}, 2)
    finally:
        torch.set_num_threads(before)


def test_an_interrupted_build_leaves_nothing_behind():
    suite, calls = Mini(TASKS, recipe=SMALL), []
    good = trainer(calls)

    def stops(*args, **kwargs):
        if len(calls) == 2:
            raise KeyboardInterrupt
        return good(*args, **kwargs)

    with pytest.raises(KeyboardInterrupt):
        suite.prepare(stops)
    assert list(suite.folder.parent.iterdir()) == []


def test_clear_errors():
    with pytest.raises(InputError, match="suite Mini has no task 'cats'; it has digits"):
        Mini(["cats"])
    with pytest.raises(InputError, match="how many experts to add, from 0 on, not -1"):
        Mini(distractors=-1)
    with pytest.raises(InputError, match="not built yet"):
        Mini(TASKS, recipe=SMALL).task_vectors()


def test_images_are_drawn_once_and_do_not_depend_on_the_other_split():
    suite = Mini(TASKS, recipe=SMALL)
    assert suite.dataset("signs", "test") is suite.dataset("signs", "test")
    images, labels = suite.dataset("signs", "test").batch(torch.arange(10))
    assert images.shape == (10, 3, 32, 32)
    assert labels.max() < len(suite.classes("signs"))


def test_pictures_are_drawn_once_and_kept_bit_for_bit(tmp_path, monkeypatch):
    asked = [(pattern(0), "test", 20, 0), (pattern(0), "train", 20, 0), (pattern(1), "test", 20, 0)]
    asked += [(pattern(0), "test", 21, 0), (pattern(0), "test", 20, 1)]
    expected = [task.draw(*rest) for task, *rest in asked]
    first = [drawn(*each) for each in asked]
    assert len(list(tmp_path.glob("mini_images/*"))) == len(asked)
    monkeypatch.setattr(MiniTask, "draw", None)
    for images, again, direct in zip(first, (drawn(*each) for each in asked), expected, strict=True):
        for ours, kept, made in zip(images, again, direct, strict=True):
            assert ours.dtype == kept.dtype == made.dtype
            assert np.array_equal(ours, made)
            assert np.array_equal(kept, made)


def test_pictures_are_drawn_anew_where_their_file_is_broken_or_cannot_be_kept(tmp_path, monkeypatch):
    task = pattern(0)
    images, _ = drawn(task, "test", 20, 0)
    (file,) = tmp_path.glob("mini_images/*")
    whole = file.read_bytes()
    for damage in (b"", whole[:100], whole[:-1]):
        file.write_bytes(damage)
        assert np.array_equal(drawn(task, "test", 20, 0)[0], images)
        assert file.read_bytes() == whole
    monkeypatch.setenv("ADAMERGE_CACHE", str(file))  # no folder can be made below a file
    assert np.array_equal(drawn(task, "test", 20, 0)[0], images)
