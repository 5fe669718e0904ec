"""Mini, the embedded suite: a tiny ViT and one expert per task, trained on first use on the CPU."""

import hashlib
import json
import logging
import os
import shutil
from dataclasses import asdict
from functools import cached_property, partial
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.data import Dataset

from adamerge.backbones import TinyViT
from adamerge.data import ArrayImages, Preprocess
from adamerge.errors import InputError
from adamerge.files import cache_folder
from adamerge.suites.base import FineTune, HeadWeights, Split, Suite
from adamerge.suites.mini_tasks import TASKS, Recipe
from adamerge.task_vectors import TaskVectors

log = logging.getLogger(__name__)

#: Goes into the cache key: raise it when drawing or training changes in a way that the recipe does not show.
VERSION = 2


class Mini(Suite):
    """Small real and drawn tasks in fog, a base that knows them in clear view, and experts fine-tuned in the fog.

    It shows the field's picture on a laptop: the base is weak, task arithmetic helps, layer-wise AdaMerging helps
    more, and the experts stay ahead. Models are made by `prepare` within minutes, once, and kept in the user's cache
    folder under a name that hashes the recipe.

    Args:
        tasks: some of the tasks, in this order; default: all.
        seed: of everything that is drawn or trained.
        recipe: sizes and training settings.
    """

    name = "mini"
    scale = 0.125

    def __init__(self, tasks: list[str] | None = None, seed: int = 0, recipe: Recipe = Recipe()) -> None:  # noqa: B008  frozen
        unknown = sorted(set(tasks or ()) - set(TASKS))
        if unknown:
            raise InputError(f"suite Mini has no task {unknown[0]!r}; it has {', '.join(TASKS)}")
        self._tasks, self.seed, self.recipe = tuple(tasks or TASKS), seed, recipe
        self._preprocess = Preprocess()

    @property
    def tasks(self) -> tuple[str, ...]:
        return self._tasks

    @cached_property
    def folder(self) -> Path:
        """Where its models are kept."""
        key = json.dumps([VERSION, self.tasks, self.seed, asdict(self.recipe)])
        return cache_folder() / "mini" / hashlib.sha256(key.encode()).hexdigest()[:16]

    def prepare(self, fine_tune: FineTune) -> None:
        if self.folder.is_dir():
            return
        log.info("Building suite Mini once, into %s: some minutes on two cores", self.folder)
        unfinished = self.folder.with_name(f".{self.folder.name}.{os.getpid()}.tmp")
        unfinished.mkdir(parents=True, exist_ok=True)
        try:
            self._build(fine_tune, unfinished)
            if not self.folder.is_dir():  # another process may have been faster
                unfinished.rename(self.folder)
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)

    def backbone(self) -> nn.Module:
        return TinyViT()

    def task_vectors(self) -> TaskVectors:
        return TaskVectors.open(self._file("base"), {task: self._file(task) for task in self.tasks}).load()

    def classes(self, task: str) -> tuple[str, ...]:
        return TASKS[task].classes

    def head(self, task: str) -> HeadWeights:
        tensors = load_file(self._file("heads"))
        return HeadWeights(tensors[f"{task}.weight"], tensors[f"{task}.bias"])

    def dataset(self, task: str, split: Split) -> Dataset[tuple[Tensor, int]]:
        if (split, task) not in self._drawn:
            count = self.recipe.train_per_task if split == "train" else self.recipe.test_per_task
            self._drawn[split, task] = self._images(split, task, count)
        return self._drawn[split, task]

    @cached_property
    def _drawn(self) -> dict[tuple[Split, str], ArrayImages]:
        return {}

    def _file(self, name: str) -> Path:
        if not self.folder.is_dir():
            raise InputError("suite Mini is not built yet: call suite.prepare(trainers.fine_tune), or run train.py fit")
        return self.folder / f"{name}.safetensors"

    def _build(self, fine_tune: FineTune, folder: Path) -> None:
        recipe, total = self.recipe, len(self.tasks) + 1
        train = partial(fine_tune, weight_decay=recipe.weight_decay, seed=self.seed)
        classes = {task: self.classes(task) for task in self.tasks}
        clear = {task: self._images("train", task, recipe.base_images_per_task, clear=True) for task in self.tasks}
        with torch.random.fork_rng():
            torch.manual_seed(self.seed)
            start = self.backbone()
        learn = partial(train, steps=recipe.base_steps, lr=recipe.base_lr, batch_size=recipe.base_batch_per_task)
        base, heads = learn(start, clear, classes, heads=None, label=f"Mini 1/{total} base")
        save_file(base, folder / "base.safetensors")
        tensors = {f"{task}.weight": head.weight for task, head in heads.items()}
        tensors |= {f"{task}.bias": head.bias for task, head in heads.items() if head.bias is not None}
        save_file(tensors, folder / "heads.safetensors")
        start.load_state_dict(base)
        for name, parameter in start.named_parameters():
            parameter.requires_grad_(any(part in name for part in recipe.tuned))
        learn = partial(train, steps=recipe.expert_steps, batch_size=recipe.batch_size)
        for number, task in enumerate(self.tasks, 2):
            data, own = {task: self.dataset(task, "train")}, {task: classes[task]}
            label = f"Mini {number}/{total} {task}"
            lr = recipe.expert_lrs[list(TASKS).index(task) % len(recipe.expert_lrs)]
            expert, _ = learn(start, data, own, heads={task: heads[task]}, lr=lr, label=label)
            save_file(expert, folder / f"{task}.safetensors")

    def _images(self, split: Split, task: str, count: int, clear: bool = False) -> ArrayImages:
        images, labels = TASKS[task].draw(split, count, self.seed, clear)
        return ArrayImages(images, labels, self._preprocess, f"{split} image of {task}")
