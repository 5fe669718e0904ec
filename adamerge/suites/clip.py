"""CLIP vision models: experts of one visual tower under zero-shot heads from the text tower it was trained with."""

import re
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from adamerge.data import DataSource, Preprocess, Split, check_data
from adamerge.errors import InputError
from adamerge.suites.base import FineTune, HeadWeights, Suite
from adamerge.suites.clip_models import ClipFamily, HuggingFaceClip, OpenClip, Tensors, local_path, open_tower
from adamerge.suites.clip_tasks import prompt_names, usual_templates
from adamerge.suites.zero_shot import zero_shot_head
from adamerge.task_vectors import TaskVectors

#: Of the images that CLIP was trained on.
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)

_FILE_ENDING = re.compile(r"\.(safetensors|pth?|bin|ckpt)$")


class ClipVision(Suite):
    """CLIP image encoders, fine-tuned on one task each under frozen zero-shot heads (Radford et al., arXiv:2103.00020).

    Features are the projected image embeddings, not normalised; the heads normalise them. The text model makes the
    heads from class names and prompt templates, once; they are kept in the user's cache folder.

    Args:
        base: the pretrained model. Hugging Face: a Hub id or a folder with a `CLIPModel`. open_clip: a file of weights
            (.safetensors, .pt) of the whole model or of its visual tower.
        experts: by name, Hub ids or folders with a `CLIPVisionModel` or more of the model; with open_clip, files. Those
            that come without the visual projection share the base's.
        data: by task, its images. An expert without data is in the pool, and no task is scored by its name.
        text_model: where the text tower is, if not in `base`.
        class_names: by task, names for the prompts in the order of the labels, instead of those of the data.
        templates: by task, prompts with `{}` for the name; default: CLIP's own, or "a photo of a {}.".
        open_clip: the architecture of open_clip models, by name (`ViT-B-32`) or as a config file (.json). Weights by
            OpenAI take the names that end in `-quickgelu`. Default: Hugging Face models.
        name: shown in results; default: the last part of `base`.
    """

    def __init__(
        self,
        base: str,
        experts: dict[str, str],
        data: dict[str, DataSource],
        text_model: str | None = None,
        class_names: dict[str, list[str]] | None = None,
        templates: dict[str, list[str]] | None = None,
        open_clip: str | None = None,
        name: str | None = None,
    ) -> None:
        if not experts:
            raise InputError("suite ClipVision has no task: give one expert per task, and its data")
        if odd := sorted(set(data) - set(experts)) or sorted(experts)[: not data]:
            raise InputError(f"every task needs an expert and data; {odd[0]!r} lacks one")
        for option, given in (("class_names", class_names), ("templates", templates)):
            if unknown := sorted(set(given or ()) - set(data)):
                raise InputError(f"{option} has no task {unknown[0]!r}; the tasks are {', '.join(data)}")
        self.base, self.data, self.text_model = base, data, text_model or base
        self._experts = dict(sorted(experts.items(), key=lambda item: item[0] not in data))  # those of tasks first
        self.class_names, self.templates, self.open_clip = class_names or {}, templates or {}, open_clip
        self.name = name or _FILE_ENDING.sub("", Path(base).name)

    @property
    def tasks(self) -> tuple[str, ...]:
        return tuple(name for name in self._experts if name in self.data)

    @property
    def experts(self) -> tuple[str, ...]:
        return tuple(self._experts)

    def prepare(self, fine_tune: FineTune) -> None:
        for owner, where in (("base", self.base), *self._experts.items()):
            local_path(where, owner)
        self._heads  # noqa: B018  makes and caches them

    def check(self) -> None:
        self.states()
        for task in self.tasks:
            check_data(task, self.data[task], self.classes(task))
        super().check()
        if (width := self._heads[self.tasks[0]].weight.shape[1]) != self._family.width:
            raise InputError(f"text model {self.text_model} has {width} features, {self.base} {self._family.width}")

    def backbone(self) -> nn.Module:
        with torch.random.fork_rng(devices=[]):  # fresh weights do not matter, so they must not move the random state
            return self._family.vision().eval()

    def task_vectors(self) -> TaskVectors:
        return TaskVectors.from_state_dicts(*self.states())

    def classes(self, task: str) -> tuple[str, ...]:
        own, given = self.data[task].classes, self.class_names.get(task)
        if given is None:
            return prompt_names(task, own)
        if len(given) != len(own):
            raise InputError(f"task {task!r} has {len(own)} classes in its data, but {len(given)} class_names")
        return tuple(given)

    def head(self, task: str) -> HeadWeights:
        return self._heads[task]

    def dataset(self, task: str, split: Split) -> Dataset[tuple[Tensor, int]]:
        return self.data[task].dataset(split, Preprocess(self._family.image_size, MEAN, STD))

    @cached_property
    def _family(self) -> ClipFamily:
        return OpenClip(self.open_clip) if self.open_clip else HuggingFaceClip(local_path(self.base, "base"))

    @cached_property
    def _heads(self) -> dict[str, HeadWeights]:
        text = self._family.text(local_path(self.text_model, "text model"))  # goes when all heads are made
        return {
            task: zero_shot_head(text, self.classes(task), self.templates.get(task, usual_templates(task)), task)
            for task in self.tasks
        }

    def states(self) -> tuple[Tensors, dict[str, Tensors]]:
        with torch.device("meta"):
            shapes = self._family.vision().state_dict()
        base = open_tower("base", self.base, shapes, self._family, {})
        spare = dict.fromkeys(self._family.spare, base)
        return base, {
            task: open_tower(f"expert {task!r}", where, shapes, self._family, spare)
            for task, where in self._experts.items()
        }
