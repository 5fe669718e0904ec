"""Orders in closed form, and the batches of a stream that passes once."""

import pytest
import torch
from tiny_suite import TinySuite

from adamerge import InputError
from trainers.orders import ClassBlocks, ClassCorrelated, Drifting, Joining, OrderedSteps, Shuffled, TaskBlocks
from trainers.seeding import generator
from trainers.steps import Together, Untold

#: Four tasks of 30 images, of 2, 3, 4 and 5 classes.
TASKS = torch.arange(4).repeat_interleave(30)
LABELS = torch.cat([10 * k + torch.arange(30) % (2 + k) for k in range(4)])
ORDERS = [Shuffled(), TaskBlocks(), TaskBlocks(3), Drifting(), Joining(), ClassCorrelated(), ClassBlocks(3)]


def come(order, seed: int = 0) -> torch.Tensor:
    return order.arrange(TASKS, lambda: LABELS, generator(seed))


@pytest.mark.parametrize("order", ORDERS, ids=lambda order: str(type(order).__name__))
def test_every_image_comes_once_in_an_order_of_the_seed(order):
    assert come(order).sort().values.equal(torch.arange(120))
    assert come(order).equal(come(order))
    assert not come(order).equal(come(order, 1))


def test_task_blocks_come_in_turn_and_come_back():
    assert TASKS[come(TaskBlocks())].equal(TASKS)
    assert TASKS[come(TaskBlocks(3))].equal(torch.arange(4).repeat_interleave(10).repeat(3))


def test_a_drifting_mixture_goes_from_blocks_to_shuffled():
    assert TASKS[come(Drifting(0))].equal(TASKS)
    places = come(Drifting(0.05)).argsort().double()
    centres = torch.stack([places[k == TASKS].mean() for k in range(4)])
    assert (centres.diff() > 15).all()
    at_once = TASKS[come(Drifting(0.05))][:40]
    assert len(at_once.unique()) > 1, "neighbours mix"
    wide = come(Drifting(100)).argsort().double()
    assert torch.stack([wide[k == TASKS].mean() for k in range(4)]).std() < 12


def test_tasks_join_where_they_should_and_stay():
    tasks = TASKS[come(Joining([0.25, 0, 0.5, 0]))]
    first = {k: int((tasks == k).nonzero()[0]) for k in range(4)}
    assert 30 <= first[0] < 40
    assert 60 <= first[2] < 70
    for part in (slice(0, 30), slice(30, 60), slice(60, 90), slice(90, 120)):
        there = {k for k in range(4) if first[k] < part.stop}
        assert set(tasks[part].tolist()) == there
    early = TASKS[come(Joining([0, 0.9, 0.9, 0.9]))]
    assert early[:30].equal(torch.zeros(30, dtype=torch.int64)), "no image is lost where too few are left to wait with"
    assert len(early[30:42].unique()) == 3


def test_the_smaller_delta_the_closer_images_of_a_class_come():
    def repeats(order) -> float:
        classes = LABELS[come(order)]
        return (classes[1:] == classes[:-1]).float().mean().item()

    assert repeats(ClassCorrelated(1e-3)) > 0.4 > 0.3 > repeats(ClassCorrelated(1e3))
    assert repeats(Shuffled()) < 0.2


def test_class_blocks_show_every_class_in_one_part():
    order = come(ClassBlocks(2))
    whole, first = LABELS[order], LABELS[come(ClassBlocks(2, shown=1))]
    assert whole[: len(first)].equal(first)
    early, late = set(first.tolist()), set(whole[len(first) :].tolist())
    assert not early & late
    assert early | late == set(LABELS.tolist())
    for k in range(4):
        assert sum(c // 10 == k for c in early) == -(-(2 + k) // 2)


def test_orders_that_need_none_ask_for_no_label():
    def labels():
        raise AssertionError("labels were asked for")

    for order in (Shuffled(), TaskBlocks(2), Drifting(), Joining()):
        order.arrange(TASKS, labels, generator(0))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: TaskBlocks(0), "rounds must be positive, got 0"),
        (lambda: Drifting(-1), "at least 0, not -1"),
        (lambda: Joining([0.1, 0.5]), r"fractions of a stream in \[0, 1\), the first of them 0, not \[0.1, 0.5\]"),
        (lambda: come(Joining([0, 0.5])), "starts has 2 fractions for 4 tasks"),
        (lambda: ClassCorrelated(0), "delta must be positive"),
        (lambda: ClassBlocks(2, 0), "shown must be positive, got 0"),
    ],
)
def test_impossible_orders(make, message):
    with pytest.raises(InputError, match=message):
        make()


# -- batches ---------------------------------------------------------------------------------------------------------


def steps(suite: TinySuite, order=None, **kwargs) -> OrderedSteps:
    datasets = {task: suite.dataset(task, "test") for task in suite.tasks}
    return OrderedSteps(datasets, order or Shuffled(), **{"batch_size": 16, "seed": 0, **kwargs})


@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize("size", [1, 16, 17, 34, 100])
def test_every_image_is_seen_once_over_all_processes_and_none_goes_without(suite, world, size):
    seen = []
    shards = [steps(suite, batch_size=world * size, shard=(rank, world)) for rank in range(world)]
    for step in range(shards[0].count):
        for shard in shards:
            own = [(task, int(i)) for task, index in shard.indices_of(step).items() for i in index]
            assert own
            seen += own
    assert len(seen) == len(set(seen)) == 69


def test_batches_follow_the_order_and_do_not_depend_on_each_other(suite):
    ordered = steps(suite, TaskBlocks(), batch_size=23)
    assert [list(ordered[step]) for step in range(3)] == [["one"], ["two"], ["three"]]
    mixed, again = steps(suite), steps(suite)
    whole = [mixed[step] for step in range(mixed.count)]
    for step in (4, 1, 3):
        for task, part in again[step].items():
            assert part["index"].equal(whole[step][task]["index"])
            assert part["images"].equal(suite.dataset(task, "test").batch(part["index"])[0])


def test_weights_make_the_mean_over_a_batch_whoever_has_which_image(suite):
    """Two processes average their gradients: halves of the sums over both."""
    whole = steps(suite)
    for step in range(whole.count):
        both = [steps(suite, shard=(rank, 2))[step] for rank in (0, 1)]
        total = sum(part["weight"].sum() for batch in both for part in batch.values()) / 2
        assert total.item() == pytest.approx(3)
        assert sum(part["weight"].sum() for part in whole[step].values()).item() == pytest.approx(3)


def test_all_indices_are_those_of_the_batches(suite):
    ordered = steps(suite, Drifting())
    for start, end, per_step in ((0, 2, 1), (1, 3, 2), (0, 50, 1)):
        batches = [ordered.indices_of(s) for s in range(start * per_step, min(end * per_step, ordered.count))]
        for task in suite.tasks:
            expected = sorted(i for batch in batches for i in batch.get(task, torch.empty(0)).tolist())
            assert ordered.all_indices(task, start, end, per_step).tolist() == expected


def test_where_tasks_are_not_told_positions_are_among_all_images(suite):
    told, untold = steps(suite), Untold(steps(suite), ("one", "two", "three", "four"))
    assert list(untold.datasets) == ["one", "two", "three", "four"]
    for task, part in untold[1].items():
        whole = untold.datasets["four"]
        assert whole.batch(part["index"])[0].equal(told[1][task]["images"])
        assert whole.labels[part["index"]].equal(suite.dataset(task, "test").labels[told[1][task]["index"]])
    seen = torch.cat([index for step in (0, 1) for index in untold.indices_of(step).values()])
    assert untold.all_indices("four", 0, 2).sort().values.equal(seen.sort().values)


def test_several_data_sets_together_keep_the_order_that_is_asked_for(suite):
    whole = Together([suite.dataset(task, "test") for task in suite.tasks])
    wanted = torch.tensor([50, 3, 22, 23, 68, 0])
    images, labels = whole.batch(wanted)
    assert len(whole) == 69
    for image, label, index in zip(images, labels, wanted.tolist(), strict=True):
        assert image.equal(whole[index][0])
        assert int(label) == whole[index][1]
    assert images[1].equal(suite.dataset("one", "test")[3][0])
    assert images[3].equal(suite.dataset("two", "test")[0][0])
