"""A suite in memory, of a user's own making: the command line finds it by its class_path."""

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from adamerge import TaskVectors
from adamerge.backbones import MLP, TinyViT
from adamerge.data import ArrayImages, Preprocess
from adamerge.suites import HeadWeights, Split, Suite


class TinySuite(Suite):
    """Noisy images of three tasks and experts that differ at random from a random base.

    Args:
        seed: of base and experts.
        images: per task and split.
        vit: a transformer of two blocks on 8 × 8 images instead of an MLP on 4 × 4.
    """

    name = "tiny"

    def __init__(self, seed: int = 0, images: int = 23, vit: bool = False) -> None:
        self.seed, self.images, self.vit = seed, images, vit

    @property
    def tasks(self) -> tuple[str, ...]:
        return ("one", "two", "three")

    def backbone(self) -> nn.Module:
        return TinyViT(image_size=8, patch=4, dim=8, depth=2, heads=2) if self.vit else MLP(image_size=4, dim=8)

    def task_vectors(self) -> TaskVectors:
        return TaskVectors.from_state_dicts(*self.states())

    def states(self) -> tuple[dict[str, Tensor], dict[str, dict[str, Tensor]]]:
        rng = torch.Generator().manual_seed(self.seed)

        def noise(scale: float) -> dict[str, Tensor]:
            state = self.backbone().state_dict()
            return {name: scale * torch.randn(value.shape, generator=rng) for name, value in state.items()}

        base = noise(0.5)
        return base, {task: {name: base[name] + change for name, change in noise(0.2).items()} for task in self.tasks}

    def classes(self, task: str) -> tuple[str, ...]:
        return tuple("abcde")[: 2 + len(task) % 3]

    def head(self, task: str) -> HeadWeights:
        rng = torch.Generator().manual_seed(len(task))
        return HeadWeights(torch.randn(len(self.classes(task)), 8, generator=rng))

    def dataset(self, task: str, split: Split) -> Dataset[tuple[Tensor, int]]:
        rng = torch.Generator().manual_seed(len(task) + 10 * (split == "test"))
        size = 8 if self.vit else 4
        images = torch.randint(256, (self.images, size, size, 3), generator=rng, dtype=torch.uint8)
        labels = torch.randint(len(self.classes(task)), (self.images,), generator=rng)
        return ArrayImages(images.numpy(), labels.numpy(), Preprocess())


class Secret(Dataset[tuple[Tensor, int]]):
    """Images whose labels come along without values, and raise when they are asked for."""

    def __init__(self, images: ArrayImages) -> None:
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    @property
    def labels(self) -> Tensor:
        raise AssertionError("labels were asked for")

    def batch(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        images, labels = self.images.batch(indices)
        return images, labels.to("meta")


class Unlabelled(TinySuite):
    """The tiny suite for whoever has no labels."""

    def dataset(self, task: str, split: Split) -> Dataset[tuple[Tensor, int]]:
        return Secret(super().dataset(task, split))
