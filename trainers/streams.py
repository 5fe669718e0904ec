"""The test stream: batches of images of some tasks, each a pure function of (seed, step)."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, cast

import lightning as L
import torch
from torch import Tensor
from torch.utils.data import Dataset

from adamerge import InputError
from adamerge.corruptions import Corruption
from adamerge.data import Substituted, fetch, labels_of, split_held_out
from adamerge.suites import Split, Suite
from trainers.corrupting import Corrupted
from trainers.loaders import StepLoader, scoring_loaders, training_loader
from trainers.orders import Order, OrderedSteps, arranged
from trainers.placing import Parts, in_bytes, place
from trainers.seeding import generator
from trainers.settings import settings
from trainers.steps import Steps, Untold


class Stream(L.LightningDataModule):
    """Unlabelled batches of every task for adaptation, and labelled ones to score with.

    The default is the papers' protocol: transductive, that is, each step takes `batch_size` shuffled images per task
    from the very split that is scored. `held_out` keeps a part of it for scoring alone. A batch depends on (seed,
    step) only, so that a resumed run sees what it would have seen, whatever the number of workers; several processes
    split every batch.

    With an `order`, images of all tasks come mixed, in one stream that passes once: each is predicted, then adapted on,
    and a run ends with it at the latest.

    Args:
        batch_size: images per step, over all processes: of every task, or, with an `order`, in all.
        split: the split to score, and to adapt on unless `train_split` says otherwise.
        train_split: another split to adapt on, for objectives that are trained on training data.
        half: adapt on one half of the images alone, 0 or 1, as `seed` divides them: two runs with a half each tell how
            far a result depends on its images. Default: adapt on all.
        tasks_per_step: how many tasks a step takes images of; all tasks come once, in an order drawn anew, before one
            comes again. Default: all at every step.
        per_task: adapt on that many images of each task (all of them, where there are fewer), drawn by the seed.
            Default: all.
        held_out: fraction of that split that is scored and never adapted on; 0 scores all of it.
        seed: of the order of images.
        eval_batch_size: images per forward pass in evaluation.
        num_workers: worker processes that load images; where one dies, another goes on with what it owed.
        on_bad_image: "stop" raises InputError for an image that can no longer be read, "skip" leaves it out, in
            adaptation and in scoring, and counts; a step of which nothing is left learns nothing.
        order: of a stream that passes once, such as `trainers.Shuffled`.
        tasks: adapt on these alone, in this order, and score all; default: all.
        corruptions: of the images that are scored, and adapted on where they are of the same split (see
            `adamerge.corruptions`). Several, in an `order`, take turns: each has its part of the stream, one after
            another, and what is scored alone has the last.
        images_on_device: whether images stay in 8 bits on the device that computes once they were read, so that none is
            read or moved twice; worker processes read all of a task at its first image. Default: on a GPU, where they
            take half of its free memory at most.
        task_known: whether a run is told of which task the images are that it adapts on. If not, it finds that out, as
            it does in scoring where `task_id` is `inferred`.
    """

    def __init__(
        self,
        batch_size: int = 16,
        split: Split = "test",
        held_out: float = 0.0,
        seed: int = 0,
        eval_batch_size: int = 250,
        num_workers: int = 0,
        train_split: Split | None = None,
        tasks_per_step: int | None = None,
        per_task: int | None = None,
        half: Literal[0, 1] | None = None,
        on_bad_image: Literal["stop", "skip"] = "stop",
        order: Order | None = None,
        tasks: list[str] | None = None,
        corruptions: list[Corruption] | None = None,
        task_known: bool = True,
        images_on_device: bool | None = None,
    ) -> None:
        super().__init__()
        if batch_size < 1 or eval_batch_size < 1:
            raise InputError(
                f"batch sizes must be positive: batch_size={batch_size}, eval_batch_size={eval_batch_size}"
            )
        if not 0 <= held_out < 1:
            raise InputError(f"held_out is a fraction in [0, 1), got {held_out}")
        if held_out and train_split not in (None, split):
            raise InputError(
                f"adapting on the {train_split} split leaves the whole {split} split to score: drop held_out"
            )
        if tasks_per_step is not None and tasks_per_step < 1:
            raise InputError(f"tasks_per_step must be positive, got {tasks_per_step}")
        if per_task is not None and per_task < 1:
            raise InputError(f"per_task must be positive, got {per_task}")
        if order is not None and tasks_per_step is not None:
            raise InputError("an order says of which tasks the images of a step are: leave out tasks_per_step")
        if order is None and len(corruptions or ()) > 1:
            raise InputError("corruptions that take turns need an order of the stream, such as trainers.Shuffled")
        self.order, self.tasks, self.corruptions, self.task_known = order, tasks, corruptions or [], task_known
        self.train_split, self.tasks_per_step = train_split or split, tasks_per_step
        self.per_task, self.half = per_task, half
        self.batch_size, self.split, self.held_out, self.seed = batch_size, split, held_out, seed
        self.eval_batch_size, self.num_workers, self.on_bad_image = eval_batch_size, num_workers, on_bad_image
        self.images_on_device = images_on_device
        self._unread: dict[tuple[str, str], dict[int, str]] = {}
        self._placed: tuple[Suite, torch.device, Parts] | None = None

    @property
    def suite(self) -> Suite:
        """The suite of the module that is trained."""
        assert self.trainer is not None
        return cast(Suite, self.trainer.lightning_module.suite)

    def describe(self) -> dict[str, Any]:
        """The settings that a result depends on."""
        names = ("batch_size", "split", "train_split", "tasks_per_step", "per_task", "held_out", "half", "seed")
        plain = {name: value for name in names if (value := getattr(self, name)) is not None}
        more = {
            "tasks": self.tasks,
            "order": settings(self.order),
            "corruptions": [settings(each) for each in self.corruptions],
        }
        return {**plain, **{k: v for k, v in more.items() if v}, **({} if self.task_known else {"task_known": False})}

    def setup(self, stage: str) -> None:
        """A stream that passes once ends a run that would be longer."""
        if stage == "fit" and self.order is not None and self.trainer is not None:
            most = -(-cast(int, self._steps([]).count) // self.trainer.accumulate_grad_batches)
            if not 0 <= self.trainer.max_steps <= most:
                self.trainer.fit_loop.epoch_loop.max_steps = most

    def eval_tasks(self) -> dict[str, Dataset[Any]]:
        """The images that are scored, by task."""
        return {task: dataset for task, (_, dataset) in self._parts().items()}

    def steps(self) -> Steps:
        """The batches of this process."""
        assert self.trainer is not None
        if self.order is not None or not self.task_known:  # where every image is predicted, every one is needed
            return self._steps([])
        n = self.trainer.accumulate_grad_batches
        module = cast(Any, self.trainer.lightning_module)
        return self._steps([range(r.start * n, r.stop * n) for r in module.without_images()])

    def _steps(self, known: list[range]) -> Steps:
        assert self.trainer is not None
        shard = (self.trainer.global_rank, self.trainer.world_size)
        parts = self._parts()
        datasets = {task: parts[task][0] for task in self._adapted()}
        labels = bool(getattr(self.trainer.lightning_module, "allow_labels", False))
        if self.order is None:
            endless = StreamSteps(datasets, self.batch_size, self.seed, shard, labels, self.tasks_per_step, known)
            return endless if self.task_known else Untold(endless, self.suite.tasks)
        passing = OrderedSteps(datasets, self.order, self.batch_size, self.seed, shard, labels, known)
        return passing if self.task_known else Untold(passing, self.suite.tasks)

    def train_dataloader(self) -> "StepLoader":
        assert self.trainer is not None
        return training_loader(self.trainer, self.steps(), self.num_workers)

    def val_dataloader(self) -> list["StepLoader"]:
        assert self.trainer is not None
        return scoring_loaders(self.trainer, self.eval_tasks().values(), self.eval_batch_size, self.num_workers)

    test_dataloader = val_dataloader

    def teardown(self, stage: str) -> None:
        """What stayed on a device goes."""
        self._placed = None

    def _parts(self) -> Parts:
        """What to adapt on and what to score, by task; of images that are on a device, the same again and again."""
        assert self.trainer is not None
        device = getattr(self.trainer.lightning_module, "device", torch.device("cpu"))
        if device.type == "cpu" and not self.images_on_device:
            return self._robust(self._found(lambda dataset: dataset))
        if self._placed is None or self._placed[:2] != (self.suite, device):
            parts = place(self._found(in_bytes), device, self.num_workers, self.images_on_device)
            self._placed = self.suite, device, parts
        return self._robust(self._placed[2])

    def _found(self, view: Callable[[Dataset[Any]], Dataset[Any]]) -> Parts:
        """The data sets, of images seen as `view` says."""
        parts: Parts = {}
        for task in self.suite.tasks:
            dataset = view(self.suite.dataset(task, self.split))
            same = self.train_split == self.split
            adapted = dataset if same else view(self.suite.dataset(task, self.train_split))
            for split, images in ((self.split, dataset), (self.train_split, adapted)):
                if not len(images):  # type: ignore[arg-type]
                    raise InputError(f"task {task!r} has no image in its {split} split")
            scored = dataset
            if self.held_out:
                adapt, held = split_held_out(len(dataset), self.held_out, self.seed)  # type: ignore[arg-type]
                adapted, scored = Part(dataset, adapt), Part(dataset, held)
            if self.half is not None:
                half = split_held_out(len(adapted), 0.5, self.seed)[self.half]  # type: ignore[arg-type]
                adapted = Part(adapted, half)
            parts[task] = (self._few(task, adapted), scored)
        return self._corrupt(parts) if self.corruptions else parts

    def _robust(self, parts: Parts) -> Parts:
        """The same, where asked for without what cannot be read; what was told of one image is not told again."""
        if self.on_bad_image == "stop":
            return parts
        robust: Parts = {}
        for task, (adapted, scored) in parts.items():
            own = Substituted(scored, self._unread.setdefault((task, "scored"), {}))
            other = self._unread.setdefault((task, "adapted"), {}) if adapted is not scored else {}
            robust[task] = (own if adapted is scored else Substituted(adapted, other), own)
        return robust

    def _adapted(self) -> list[str]:
        """The tasks to adapt on."""
        if odd := [task for task in self.tasks or () if task not in self.suite.tasks]:
            raise InputError(f"the stream names task {odd[0]!r}; the suite has {', '.join(self.suite.tasks)}")
        return list(dict.fromkeys(self.tasks or self.suite.tasks))

    def _corrupt(self, parts: Mapping[str, tuple[Dataset[Any], Dataset[Any]]]) -> dict[str, Any]:
        """The same, corrupted; an image that is both adapted on and scored looks the same."""
        turns = dict.fromkeys(parts, torch.tensor(len(self.corruptions) - 1))
        whole = {}
        if self.order is not None and len(self.corruptions) > 1:
            streamed = {task: parts[task][0] for task in self._adapted()}
            task_of, positions = arranged(streamed, self.order, self.seed)
            turn = torch.arange(len(task_of)) * len(self.corruptions) // len(task_of)
            for number, task in enumerate(streamed):
                own = task_of == number
                whole[task] = turns[task].repeat(len(streamed[task])).scatter(0, positions[own], turn[own])  # type: ignore[arg-type]

        def corrupted(task: str, dataset: Dataset[Any], which: Tensor) -> Corrupted:
            which = which.expand(len(dataset))  # type: ignore[arg-type]
            return Corrupted(dataset, task, self.corruptions, which, self.seed)

        found: dict[str, Any] = {}
        for task, (adapted, scored) in parts.items():
            same = adapted is scored
            ours = corrupted(task, scored, whole.get(task, turns[task]) if same else turns[task])
            if same or self.train_split != self.split:
                found[task] = (ours if same else adapted, ours)
            else:
                found[task] = (corrupted(task, adapted, whole.get(task, turns[task])), ours)
        return found

    def _few(self, task: str, dataset: Dataset[Any]) -> Dataset[Any]:
        """`per_task` images of a data set."""
        count = len(dataset)  # type: ignore[arg-type]
        if self.per_task is None or self.per_task >= count:
            return dataset
        drawn = torch.randperm(count, generator=generator(self.seed, task, "few"))[: self.per_task]
        return Part(dataset, drawn.sort().values)


class Part(Dataset[tuple[Tensor, int]]):
    """Some images of a data set."""

    def __init__(self, dataset: Dataset[Any], indices: Tensor) -> None:
        self.dataset, self.indices = dataset, torch.as_tensor(indices)

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return cast(tuple[Tensor, int], self.dataset[int(self.indices[index])])

    @property
    def labels(self) -> Tensor:
        """Labels [N], without decoding images where the whole data set has them."""
        return labels_of(self.dataset)[self.indices]

    def batch(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        """As `adamerge.data.fetch`."""
        return fetch(self.dataset, self.indices[indices])


class StreamSteps(Steps):
    """The batches of a stream that gives so many images of every task at each step, for as long as asked.

    Every task runs through its images in one shuffled order after another; the order of an epoch is drawn from (seed,
    task, epoch). Of each batch, a process takes every `world`-th image.
    """

    def __init__(
        self,
        datasets: Mapping[str, Dataset[Any]],
        batch_size: int,
        seed: int,
        shard: tuple[int, int] = (0, 1),
        labels: bool = False,
        tasks_per_step: int | None = None,
        known: Sequence[range] = (),
    ) -> None:
        super().__init__(datasets, batch_size, labels, known)
        self.seed, self.shard = seed, shard
        self.tasks_per_step = min(tasks_per_step or len(datasets), len(datasets))
        self._orders: dict[str, tuple[int, Tensor]] = {}

    def indices_of(self, step: int) -> dict[str, Tensor]:
        return {task: self.indices(task, turn) for task, turn in self.turns(step).items()}

    def turns(self, step: int) -> dict[str, int]:
        """The tasks of one step, in the order of the suite, and how many batches each has had before."""
        tasks, size = list(self.datasets), self.tasks_per_step
        if size == len(tasks):
            return dict.fromkeys(tasks, step)
        places = range(step * size, (step + 1) * size)
        drawn = [(place // len(tasks), self._turn(place // len(tasks))[place % len(tasks)]) for place in places]
        found = {
            tasks[number]: turn for turn, number in drawn
        }  # a task may come twice where rounds meet: once is enough
        return {task: found[task] for task in tasks if task in found}

    def _turn(self, number: int) -> list[int]:
        return torch.randperm(len(self.datasets), generator=generator(self.seed, "tasks", number)).tolist()

    def all_indices(self, task: str, start: int, end: int, per_step: int = 1) -> Tensor:
        turns = (self.turns(step).get(task) for step in range(start * per_step, end * per_step))
        seen = [self.indices(task, turn) for turn in turns if turn is not None]
        return torch.cat(seen).unique() if seen else torch.empty(0, dtype=torch.int64)

    def indices(self, task: str, turn: int) -> Tensor:
        """Positions of this process's images of one task in its batch number `turn`."""
        rank, world = self.shard
        count = len(self.datasets[task])  # type: ignore[arg-type]
        places = torch.arange(turn * self.batch_size, (turn + 1) * self.batch_size)[rank::world]
        return torch.stack([self._order(task, int(p) // count)[int(p) % count] for p in places])

    def _order(self, task: str, epoch: int) -> Tensor:
        if self._orders.get(task, (-1,))[0] != epoch:
            count = len(self.datasets[task])  # type: ignore[arg-type]
            self._orders[task] = (epoch, torch.randperm(count, generator=generator(self.seed, task, epoch)))
        return self._orders[task][1]
