from types import SimpleNamespace

import pytest
import torch
from tiny_suite import TinySuite

from adamerge import InputError
from trainers import Adaptation, Stream
from trainers.loaders import EvalChunks, StepLoader
from trainers.seeding import generator
from trainers.streams import Part, StreamSteps


def steps(suite, **kwargs) -> StreamSteps:
    datasets = {task: suite.dataset(task, "test") for task in suite.tasks}
    return StreamSteps(datasets, **{"batch_size": 4, "seed": 0, **kwargs})


def test_a_batch_is_a_pure_function_of_seed_and_step(suite):
    forward, again = steps(suite), steps(suite)
    batches = [forward[step] for step in range(12)]
    for step in (11, 3, 7):  # any order, across epochs (23 images, 4 a step)
        for task in suite.tasks:
            assert torch.equal(batches[step][task]["index"], again[step][task]["index"])
            assert torch.equal(batches[step][task]["images"], again[step][task]["images"])
    assert not torch.equal(batches[0]["one"]["index"], steps(suite, seed=1)[0]["one"]["index"])


def test_every_image_comes_once_an_epoch_in_a_new_order(suite):
    stream = steps(suite, batch_size=1)
    epochs = torch.stack([stream.indices("two", step) for step in range(46)]).view(2, 23)
    for epoch in epochs:
        assert sorted(epoch.tolist()) == list(range(23))
    assert not torch.equal(*epochs)


def test_tasks_have_orders_of_their_own(suite):
    stream = steps(suite, batch_size=23)
    assert not torch.equal(stream.indices("one", 0), stream.indices("two", 0))


def test_images_are_those_of_the_index_and_labels_only_on_request(suite):
    data = suite.dataset("one", "test")
    part = steps(suite)[2]["one"]
    assert "labels" not in part
    torch.testing.assert_close(part["images"], torch.stack([data[int(i)][0] for i in part["index"]]))
    labelled = steps(suite, labels=True)[2]["one"]
    assert labelled["labels"].tolist() == [data[int(i)][1] for i in part["index"]]


def test_processes_share_out_one_global_batch(suite):
    whole = steps(suite)
    halves = [steps(suite, shard=(rank, 2)) for rank in (0, 1)]
    for step in range(8):
        parts = [half.indices("three", step) for half in halves]
        assert torch.equal(torch.stack(parts, 1).flatten(), whole.indices("three", step))


@pytest.mark.parametrize("world", [1, 2, 3])
def test_evaluation_sees_every_image_once(suite, world):
    seen = []
    for rank in range(world):
        chunks = EvalChunks(suite.dataset("one", "test"), 10, (rank, world))
        assert len(chunks) == 3
        seen += [image for chunk in range(3) for image in chunks[chunk][0]]
    assert len({tuple(image.flatten().tolist()) for image in seen}) == len(seen) == 23


@pytest.mark.parametrize("workers", [0, 2])
def test_loading_keeps_the_order_whatever_the_workers(suite, workers):
    stream = steps(suite)
    loaded = list(StepLoader(stream, 9, workers, first=lambda: 3))
    assert [batch["one"]["index"].tolist() for batch in loaded] == [
        stream.indices("one", s).tolist() for s in range(3, 9)
    ]


def test_a_part_is_a_view_by_position(suite):
    data = suite.dataset("one", "test")
    part = Part(data, torch.tensor([5, 2]))
    assert len(part) == 2
    torch.testing.assert_close(part[1][0], data[2][0])
    torch.testing.assert_close(part.batch(torch.tensor([0]))[0][0], data[5][0])


def test_held_out_images_are_scored_and_never_adapted_on(adapt):
    stream = Stream(batch_size=4, held_out=0.5)
    adapt(steps=1, stream=stream)
    for adapted, held in stream._parts().values():
        assert not set(adapted.indices.tolist()) & set(held.indices.tolist())
        assert len(adapted) + len(held) == 23
    assert {task: len(data) for task, data in stream.eval_tasks().items()} == {"one": 12, "two": 12, "three": 12}


@pytest.mark.parametrize("kwargs", [{}, {"held_out": 0.4}, {"train_split": "train"}], ids=str)
def test_two_halves_share_nothing_and_cover_what_is_adapted_on(suite, kwargs):
    """Both are scored on all that is scored without halves."""

    def parts(half: int | None) -> dict:
        stream = Stream(batch_size=4, half=half, **kwargs)
        stream.trainer = SimpleNamespace(lightning_module=SimpleNamespace(suite=suite))
        return stream._parts()

    first, second, whole = parts(0), parts(1), parts(None)
    for task in suite.tasks:
        own = [set(half[task][0].indices.tolist()) for half in (first, second)]
        assert not own[0] & own[1]
        assert own[0] | own[1] == set(range(len(whole[task][0])))
        assert abs(len(own[0]) - len(own[1])) <= 1
        assert len(first[task][1]) == len(second[task][1]) == len(whole[task][1])


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"held_out": 1.0}, r"fraction in \[0, 1\), got 1.0"),
        ({"batch_size": 0}, "batch sizes must be positive"),
        ({"per_task": 0}, "per_task must be positive, got 0"),
    ],
)
def test_impossible_settings(kwargs, message):
    with pytest.raises(InputError, match=message):
        Stream(**kwargs)


def test_a_stream_without_end_is_refused(adapt):
    with pytest.raises(InputError, match=r"set trainer\.max_steps"):
        adapt(steps=-1, trainer={"max_epochs": 1})


def test_generators_depend_on_their_key_alone():
    assert torch.rand(3, generator=generator(0, "a", 1)).equal(torch.rand(3, generator=generator(0, "a", 1)))
    assert not torch.rand(3, generator=generator(0, "a", 1)).equal(torch.rand(3, generator=generator(0, "a", 2)))


# -- some tasks a step ---------------------------------------------------------------------------------------------


def test_every_task_comes_once_a_round_in_a_new_order(suite):
    stream = steps(suite, tasks_per_step=1)
    tasks = [next(iter(stream.turns(step))) for step in range(60)]
    rounds = [tuple(tasks[start : start + 3]) for start in range(0, 60, 3)]
    assert all(sorted(each) == sorted(suite.tasks) for each in rounds)
    assert len(set(rounds)) > 3
    seeds = [[next(iter(steps(suite, tasks_per_step=1, seed=s).turns(step))) for step in range(60)] for s in (0, 1)]
    assert seeds[0] == tasks
    assert seeds[1] != tasks


def test_a_task_goes_through_its_images_in_its_own_turns(suite):
    """Its n-th batch is the same whether other tasks come in the same step or not."""
    whole, single = steps(suite), steps(suite, tasks_per_step=1)
    met = dict.fromkeys(suite.tasks, 0)
    for step in range(30):
        ((task, part),) = single[step].items()
        assert part["index"].equal(whole.indices(task, met[task]))
        met[task] += 1
    assert set(met.values()) == {10}


@pytest.mark.parametrize("size", [1, 2, 3, 5])
def test_turns_are_a_pure_function_of_the_step(suite, size):
    stream = steps(suite, tasks_per_step=size)
    forward = [stream.turns(step) for step in range(12)]
    assert [steps(suite, tasks_per_step=size).turns(step) for step in reversed(range(12))] == forward[::-1]
    for turns in forward:
        assert list(turns) == [task for task in suite.tasks if task in turns]  # in the order of the suite
        assert 1 <= len(turns) <= min(size, 3)
    for task in suite.tasks:
        numbers = [turns[task] for turns in forward if task in turns]
        assert numbers == sorted(set(numbers)), "no batch comes twice"


def test_processes_agree_on_the_tasks_of_a_step(suite):
    halves = [steps(suite, tasks_per_step=2, shard=(rank, 2)) for rank in (0, 1)]
    for step in range(9):
        assert list(halves[0][step]) == list(halves[1][step])


@pytest.mark.parametrize("size", [1, 2])
def test_a_run_with_turns_resumes_bit_for_bit(adapt, tmp_path, size):
    def stream():
        return Stream(batch_size=4, tasks_per_step=size)

    whole, _ = adapt(steps=11, stream=stream())
    _, trainer = adapt(steps=4, stream=stream())
    trainer.save_checkpoint(tmp_path / "part.ckpt")
    resumed, _ = adapt(steps=11, stream=stream(), ckpt_path=str(tmp_path / "part.ckpt"))
    assert torch.equal(whole.coefficients.raw, resumed.coefficients.raw)


@pytest.mark.parametrize("per_step", [1, 2])
@pytest.mark.parametrize("size", [None, 1, 2])
def test_all_indices_are_those_of_the_batches(suite, size, per_step):
    stream = steps(suite, tasks_per_step=size)
    for start, end in ((0, 1), (0, 4), (3, 9), (5, 5)):
        seen = {task: set() for task in suite.tasks}
        for step in range(start * per_step, end * per_step):
            for task, part in stream[step].items():
                seen[task] |= set(part["index"].tolist())
        for task in suite.tasks:
            assert stream.all_indices(task, start, end, per_step).tolist() == sorted(seen[task])


def test_known_steps_have_no_images(suite):
    stream = steps(suite, known=[range(2, 4)])
    assert [stream[step]["one"]["images"].numel() > 0 for step in range(6)] == [True, True, False, False, True, True]
    assert stream[2]["one"]["index"].equal(steps(suite)[2]["one"]["index"])


# -- what a run sees -----------------------------------------------------------------------------------------------


def test_adapting_on_the_train_split_and_scoring_the_test_split(suite, adapt):
    stream = Stream(batch_size=4, train_split="train")
    adapt(steps=1, stream=stream)
    for task in suite.tasks:
        adapted, scored = stream._parts()[task]
        torch.testing.assert_close(adapted[3][0], suite.dataset(task, "train")[3][0])
        torch.testing.assert_close(scored[3][0], suite.dataset(task, "test")[3][0])
    assert stream.describe() == {
        "batch_size": 4, "split": "test", "train_split": "train", "held_out": 0.0, "seed": 0,
    }  # fmt: skip


@pytest.mark.parametrize("allowed", [False, True])
def test_labels_are_seen_where_they_are_allowed(suite, adapt, allowed):
    stream = Stream(batch_size=4)
    adapt(steps=1, stream=stream, allow_labels=allowed)
    assert all(("labels" in part) is allowed for part in stream.steps()[0].values())


def test_labels_of_a_held_out_part_are_those_of_its_images(suite, adapt):
    stream = Stream(batch_size=4, held_out=0.4)
    adapt(steps=1, stream=stream, allow_labels=True)
    adapted, _ = stream._parts()["two"]
    part = stream.steps()[1]["two"]
    assert part["labels"].tolist() == [adapted[int(i)][1] for i in part["index"]]
    torch.testing.assert_close(part["images"], torch.stack([adapted[int(i)][0] for i in part["index"]]))


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"tasks_per_step": 0}, "tasks_per_step must be positive, got 0"),
        ({"held_out": 0.5, "train_split": "train"}, "leaves the whole test split to score: drop held_out"),
        ({"eval_batch_size": 0}, "batch sizes must be positive"),
    ],
)
def test_settings_that_contradict(kwargs, message):
    with pytest.raises(InputError, match=message):
        Stream(**kwargs)


def test_holding_out_of_the_split_that_is_adapted_on_is_fine():
    assert Stream(held_out=0.5, train_split="test").describe()["held_out"] == 0.5


@pytest.mark.parametrize(("split", "empty"), [("train", "train"), (None, "test")])
def test_a_split_without_images_is_named(adapt, monkeypatch, split, empty):
    plain = TinySuite.dataset

    def dataset(self, task, split):
        data = plain(self, task, split)
        return Part(data, torch.arange(0)) if (task, split) == ("two", empty) else data

    monkeypatch.setattr(TinySuite, "dataset", dataset)
    with pytest.raises(InputError, match=f"task 'two' has no image in its {empty} split"):
        adapt(steps=1, stream=Stream(batch_size=4, train_split=split))


# -- few images a task ---------------------------------------------------------------------------------------------


def few(suite, count: int | None, **kwargs) -> Stream:
    stream = Stream(per_task=count, **kwargs)
    stream.trainer = SimpleNamespace(lightning_module=SimpleNamespace(suite=suite))
    return stream


@pytest.mark.parametrize("kwargs", [{}, {"train_split": "train"}, {"held_out": 0.5}])
def test_few_images_a_task_are_drawn_by_the_seed_and_all_are_scored(suite, kwargs):
    whole, parts, again = (few(suite, n, **kwargs)._parts() for n in (None, 7, 7))
    other = few(suite, 7, seed=1, **({} if "held_out" in kwargs else kwargs))._parts()
    for task in suite.tasks:
        drawn = parts[task][0]
        assert len(drawn) == 7
        assert len(drawn.indices.unique()) == 7
        assert torch.equal(drawn.indices, again[task][0].indices)
        assert not torch.equal(drawn.indices, other[task][0].indices)
        assert torch.equal(drawn[3][0], whole[task][0][int(drawn.indices[3])][0])
        assert len(parts[task][1]) == len(whole[task][1])
    assert len({tuple(parts[task][0].indices.tolist()) for task in suite.tasks}) == 3


def test_where_there_are_fewer_images_all_are_taken(suite):
    assert len(few(suite, 100)._parts()["one"][0]) == 23


def test_a_run_sees_the_few_images_alone(suite, adapt):
    seen = set()

    class Watched(Adaptation):
        def training_step(self, batch, batch_idx):
            seen.update(tuple(image.flatten().tolist()) for image in batch["one"]["images"])
            return super().training_step(batch, batch_idx)

    adapt(steps=12, module=Watched(suite), stream=Stream(4, per_task=6, train_split="train"))
    assert len(seen) == 6
