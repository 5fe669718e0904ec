import pytest
import torch

from adamerge import InputError
from trainers import Stream
from trainers.streams import EvalChunks, Part, StepLoader, StreamSteps, generator


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


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [({"held_out": 1.0}, r"fraction in \[0, 1\), got 1.0"), ({"batch_size": 0}, "batch sizes must be positive")],
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
