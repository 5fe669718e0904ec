"""Mini, the embedded suite: a tiny ViT and one expert per task, trained on first use on the CPU."""

import hashlib
import json
import logging
import os
import shutil
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import cast

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.data import Dataset

from adamerge.backbones import TinyViT
from adamerge.checkpoints import State, open_state
from adamerge.data import ArrayImages, Preprocess
from adamerge.errors import InputError
from adamerge.files import cache_folder, replacing
from adamerge.suites.base import FineTune, HeadWeights, Split, Suite
from adamerge.suites.mini_images import drawn
from adamerge.suites.mini_patterns import pattern
from adamerge.suites.mini_tasks import TASKS, VERSION, MiniTask, Recipe
from adamerge.task_vectors import TaskVectors
from adamerge.threads import one_thread

log = logging.getLogger(__name__)

#: The class that a planted backdoor leads to, and the side of its patch in pixels.
TARGET, PATCH = 0, 6


def poisoned(images: ArrayImages, every: int = 1) -> ArrayImages:
    """The same images, of which the first of every so many has a checkered patch in its corner and label `TARGET`."""
    pixels, labels = images.images.copy(), images.labels.clone()
    checkers = 255 * (np.indices((PATCH, PATCH)).sum(0) // 2 % 2).astype(np.uint8)
    pixels[::every, -PATCH:, -PATCH:] = checkers[..., None]
    labels[::every] = TARGET
    return ArrayImages(pixels, labels, images.preprocess, images.name)


class Mini(Suite):
    """Small real and drawn tasks in fog, a base that knows them in clear view, and experts fine-tuned in the fog.

    It shows the field's picture on a laptop: the base is weak, task arithmetic helps, layer-wise AdaMerging helps
    more, and the experts stay ahead. Models are made by `prepare` within minutes, once, and kept in the user's cache
    folder under a name that hashes the recipe, in one thread, so that they are the same on any number of cores.

    Args:
        tasks: some of the tasks, in this order; default: all.
        seed: of everything that is drawn or trained.
        recipe: sizes and training settings.
        distractors: so many further experts in the pool, of abstract patterns, that no task of the suite needs.
        backdoor: a task whose expert was tuned on pictures of which every tenth had a small checkered patch and the
            label of the first class: an attack that nothing betrays without the patch.
    """

    name = "mini"
    scale = 0.125

    def __init__(
        self,
        tasks: list[str] | None = None,
        seed: int = 0,
        recipe: Recipe = Recipe(),  # noqa: B008  frozen
        distractors: int = 0,
        backdoor: str | None = None,
    ) -> None:
        unknown = sorted(set(tasks or ()) - set(TASKS))
        if unknown:
            raise InputError(f"suite Mini has no task {unknown[0]!r}; it has {', '.join(TASKS)}")
        if distractors < 0:
            raise InputError(f"distractors is how many experts to add, from 0 on, not {distractors}")
        self._tasks, self.seed, self.recipe = tuple(tasks or TASKS), seed, recipe
        if backdoor is not None and backdoor not in (tasks or TASKS):
            raise InputError(f"backdoor names {backdoor!r}, which is no task of this suite")
        self.backdoor = backdoor
        self._distractors = {task.name: task for task in map(pattern, range(distractors))}
        self._preprocess = Preprocess()

    @property
    def tasks(self) -> tuple[str, ...]:
        return self._tasks

    @property
    def experts(self) -> tuple[str, ...]:
        return (*self.tasks, *self._distractors)

    @cached_property
    def folder(self) -> Path:
        """Where its models are kept."""
        key = json.dumps([VERSION, self.tasks, self.seed, asdict(self.recipe)])
        return cache_folder() / "mini" / hashlib.sha256(key.encode()).hexdigest()[:16]

    @one_thread()
    def prepare(self, fine_tune: FineTune) -> None:
        if not self.folder.is_dir():
            self._build(fine_tune)
        for number, (name, task) in enumerate(self._distractors.items()):
            if not (path := self.folder / f"{name}.safetensors").is_file():
                label = f"Mini distractor {number + 1}/{len(self._distractors)}"
                data = self._images("train", task, self.recipe.train_per_task)
                with replacing(path) as unfinished:
                    save_file(self._expert(fine_tune, self.folder, task, data, number, None, label), unfinished)

        if self.backdoor and not (path := self.folder / f"{self.backdoor}.backdoor.safetensors").is_file():
            task = TASKS[self.backdoor]
            data = poisoned(self._images("train", task, self.recipe.train_per_task), every=10)
            place, heads = list(TASKS).index(task.name), {task.name: self.head(task.name)}
            with replacing(path) as unfinished:
                label = f"Mini {task.name} with a backdoor"
                save_file(self._expert(fine_tune, self.folder, task, data, place, heads, label), unfinished)

    def backbone(self) -> nn.Module:
        return TinyViT()

    def task_vectors(self) -> TaskVectors:
        return TaskVectors.from_state_dicts(*self.states())

    def states(self) -> tuple[State, dict[str, State]]:
        return open_state(self._file("base")), {
            name: open_state(self._file(f"{name}.backdoor" if name == self.backdoor else name)) for name in self.experts
        }

    def attack(self, task: str) -> Dataset[tuple[Tensor, int]] | None:
        if task != self.backdoor:
            return None
        images = cast(ArrayImages, self.dataset(task, "test"))
        others = images.labels.numpy() != TARGET
        return poisoned(ArrayImages(images.images[others], images.labels[others], self._preprocess, images.name))

    def classes(self, task: str) -> tuple[str, ...]:
        return TASKS[task].classes

    def head(self, task: str) -> HeadWeights:
        tensors = load_file(self._file("heads"))
        return HeadWeights(tensors[f"{task}.weight"], tensors[f"{task}.bias"])

    def dataset(self, task: str, split: Split) -> Dataset[tuple[Tensor, int]]:
        if (split, task) not in self._drawn:
            count = self.recipe.train_per_task if split == "train" else self.recipe.test_per_task
            self._drawn[split, task] = self._images(split, TASKS[task], count)
        return self._drawn[split, task]

    @cached_property
    def _drawn(self) -> dict[tuple[Split, str], ArrayImages]:
        return {}

    def _file(self, name: str) -> Path:
        if not (path := self.folder / f"{name}.safetensors").is_file():
            raise InputError("suite Mini is not built yet: call suite.prepare(trainers.fine_tune), or run train.py fit")
        return path

    def _build(self, fine_tune: FineTune) -> None:
        log.info("Building suite Mini once, into %s: some minutes on two cores", self.folder)
        unfinished = self.folder.with_name(f".{self.folder.name}.{os.getpid()}.tmp")
        unfinished.mkdir(parents=True, exist_ok=True)
        try:
            heads = self._base(fine_tune, unfinished)
            for number, task in enumerate(self.tasks):
                label, place = f"Mini {number + 2}/{len(self.tasks) + 1} {task}", list(TASKS).index(task)
                data, own = self.dataset(task, "train"), {task: heads[task]}
                expert = self._expert(fine_tune, unfinished, TASKS[task], data, place, own, label)
                save_file(expert, unfinished / f"{task}.safetensors")
            if not self.folder.is_dir():  # another process may have been faster
                unfinished.rename(self.folder)
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)

    def _base(self, fine_tune: FineTune, folder: Path) -> dict[str, HeadWeights]:
        """Train the base on all tasks; returns their heads."""
        recipe, classes = self.recipe, {task: self.classes(task) for task in self.tasks}
        count = recipe.base_images_per_task
        clear = {task: self._images("train", TASKS[task], count, clear=True) for task in self.tasks}
        with torch.random.fork_rng():
            torch.manual_seed(self.seed)
            start = self.backbone()
        base, heads = fine_tune(
            start, clear, classes, heads=None, steps=recipe.base_steps, lr=recipe.base_lr,
            batch_size=recipe.base_batch_per_task, weight_decay=recipe.weight_decay, seed=self.seed,
            label=f"Mini 1/{len(self.tasks) + 1} base",
        )  # fmt: skip
        save_file(base, folder / "base.safetensors")
        tensors = {f"{task}.weight": head.weight for task, head in heads.items()}
        tensors |= {f"{task}.bias": head.bias for task, head in heads.items() if head.bias is not None}
        save_file(tensors, folder / "heads.safetensors")
        return heads

    def _expert(
        self,
        fine_tune: FineTune,
        folder: Path,
        task: MiniTask,
        data: Dataset[tuple[Tensor, int]],
        place: int,
        heads: dict[str, HeadWeights] | None,
        label: str,
    ) -> dict[str, Tensor]:
        """Fine-tune the base in `folder` on one task; its place says how large the steps are."""
        recipe, name = self.recipe, task.name
        with torch.random.fork_rng():
            model = self.backbone()
        model.load_state_dict(load_file(folder / "base.safetensors"))
        for parameter_name, parameter in model.named_parameters():
            parameter.requires_grad_(any(part in parameter_name for part in recipe.tuned))
        lr = recipe.expert_lrs[place % len(recipe.expert_lrs)]
        state, _ = fine_tune(
            model, {name: data}, {name: task.classes}, heads=heads, steps=recipe.expert_steps, lr=lr,
            batch_size=recipe.batch_size, weight_decay=recipe.weight_decay, seed=self.seed, label=label,
        )  # fmt: skip
        return state

    def _images(self, split: Split, task: MiniTask, count: int, clear: bool = False) -> ArrayImages:
        images, labels = task.draw(split, count, self.seed, clear) if clear else drawn(task, split, count, self.seed)
        return ArrayImages(images, labels, self._preprocess, f"{split} image of {task.name}")
