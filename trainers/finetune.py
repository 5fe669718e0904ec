"""Fine-tuning: how a base and its experts are made."""

import copy
import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, cast

import lightning as L
import torch
import torch.nn.functional as F
from lightning.pytorch.cli import OptimizerCallable
from torch import Tensor, nn
from torch.utils.data import Dataset

from adamerge import InputError
from adamerge.checkpoints import open_state, read_extra
from adamerge.data import DataSource, Preprocess, check_data
from adamerge.suites import HeadWeights
from modules import Head
from trainers.augment import shift_and_flip
from trainers.learning import optimizing
from trainers.loaders import StepLoader, scoring_loaders, training_loader
from trainers.progress import Progress
from trainers.scoring import ScoredModule
from trainers.streams import StreamSteps

Labelled = dict[str, dict[str, Tensor]]


class FineTune(ScoredModule):
    """Supervised training of one backbone with a linear head per task: several tasks make a base, one makes an expert.

    A step averages the tasks' mean cross-entropies. The learning rate warms up linearly and falls to zero along a half
    cosine. The checkpoint (`backbone.*`, `heads.<task>.*`, and the class names) is what `adamerge.suites.Local`
    opens.

    Args:
        backbone: images [B, 3, H, W] -> features [B, D].
        init: a checkpoint of this class to start from: its backbone and the heads of the tasks it knows.
        freeze_heads: keep heads that come with `init` as they are, so that experts share the base's heads.
        optimizer: builds the optimiser from the trainable parameters.
        warmup: fraction of the steps over which the learning rate rises.
        shift: augmentation: images move by up to this many pixels either way.
        flip: augmentation: half of the images are mirrored left to right.
    """

    def __init__(
        self,
        backbone: nn.Module,
        init: str | None = None,
        freeze_heads: bool = False,
        optimizer: OptimizerCallable = partial(torch.optim.AdamW, lr=1e-3, weight_decay=0.01),
        warmup: float = 0.1,
        shift: int = 0,
        flip: bool = False,
    ) -> None:
        super().__init__()
        self.backbone, self.init, self.freeze_heads, self.optimizer = backbone, init, freeze_heads, optimizer
        self.warmup, self.shift, self.flip = warmup, shift, flip
        self.classes: dict[str, tuple[str, ...]] = {}

    def configure_model(self) -> None:
        if not self.heads:
            data = cast(LabelledData, self.trainer.datamodule)  # type: ignore[attr-defined]
            with torch.device("cpu"):  # Lightning asks for the accelerator, where images are not yet
                self.set_tasks(data.classes, sample=data.sample)

    def set_tasks(
        self,
        classes: Mapping[str, tuple[str, ...]],
        given: Mapping[str, HeadWeights] | None = None,
        sample: Callable[[], Tensor] | None = None,
    ) -> None:
        """Make one head per task: a given one, one from `init`, or a new one, for features as of the `sample` image."""
        given = {**self._load_init(classes), **(given or {})}
        for task, names in classes.items():
            if task in given:
                if len(given[task].weight) != len(names):
                    raise InputError(f"task {task!r} has {len(names)} classes, its head {len(given[task].weight)}")
                self.heads[task] = Head(given[task]).requires_grad_(not self.freeze_heads)
            else:
                assert sample is not None
                self.heads[task] = Head.linear(self._features(sample()), len(names))
        self.score(classes)
        self.classes = dict(classes)

    def configure_optimizers(self) -> Any:
        optimizer = optimizing(self.optimizer, [p for p in self.parameters() if p.requires_grad])
        schedule = partial(warmup_cosine, warmup=self.warmup, steps=self.trainer.max_steps)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, schedule)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def forward(self, images: Tensor, task: str) -> Tensor:
        """Logits [B, C] of one task's images [B, 3, H, W]."""
        return self.heads[task](self.backbone(images))

    def training_step(self, batch: Labelled, batch_idx: int) -> Tensor:
        images = torch.cat([part["images"] for part in batch.values()])
        images = shift_and_flip(images, self.shift, self.flip, key=(torch.initial_seed(), batch_idx, self.global_rank))
        features = self.backbone(images).split([len(part["images"]) for part in batch.values()])
        losses = [
            F.cross_entropy(self.heads[task](z), part["labels"])
            for (task, part), z in zip(batch.items(), features, strict=True)
        ]
        loss = torch.stack(losses).mean()
        self.log("loss", loss.detach(), prog_bar=True)
        return loss

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["classes"] = {task: list(names) for task, names in self.classes.items()}

    def _load_init(self, classes: Mapping[str, tuple[str, ...]]) -> dict[str, HeadWeights]:
        """Load the backbone of `init`; return its heads for the tasks at hand."""
        if self.init is None:
            return {}
        _load_backbone(self.backbone, self.init)
        known = read_extra(self.init, "classes") or {}
        heads = {}
        for task in classes.keys() & known.keys():
            if list(known[task]) != list(classes[task]):
                raise InputError(
                    f"{self.init}: the head of {task!r} is for classes {known[task]}, "
                    f"the data has {list(classes[task])}"
                )
            state = open_state(self.init, f"heads.{task}.")
            heads[task] = HeadWeights(state["weight"], state.get("bias"))
        return heads

    @torch.no_grad()
    def _features(self, sample: Tensor) -> int:
        """The length of a feature, by trying one image [1, 3, H, W]."""
        was = self.backbone.training
        size: int = self.backbone.eval()(sample).shape[-1]
        self.backbone.train(was)
        return size


class LabelledData(L.LightningDataModule):
    """Labelled images of one or more tasks, for fine-tuning: each step takes `batch_size` of every task.

    Args:
        data: the source of each task's images, by task name.
        preprocess: how images become tensors; experts are merged and adapted with the same.
        batch_size: images per task and step, over all processes.
        seed: of the order of images.
        eval_batch_size: images per forward pass in evaluation.
        num_workers: worker processes that load images.
    """

    def __init__(
        self,
        data: dict[str, DataSource],
        preprocess: Preprocess = Preprocess(),  # noqa: B008  immutable
        batch_size: int = 64,
        seed: int = 0,
        eval_batch_size: int = 250,
        num_workers: int = 0,
    ) -> None:
        super().__init__()
        if not data:
            raise InputError("no task: give data one source of images per task")
        self.data, self.preprocess, self.seed = data, preprocess, seed
        self.batch_size, self.eval_batch_size, self.num_workers = batch_size, eval_batch_size, num_workers

    @property
    def classes(self) -> dict[str, tuple[str, ...]]:
        """Class names by task."""
        return {task: source.classes for task, source in self.data.items()}

    def sample(self) -> Tensor:
        """One image [1, 3, H, W]."""
        image = next(iter(self.data.values())).dataset("train", self.preprocess)[0][0]
        return image[None]

    def setup(self, stage: str) -> None:
        for task, source in self.data.items():
            check_data(task, source)

    def train_dataloader(self) -> StepLoader:
        assert self.trainer is not None
        shard = (self.trainer.global_rank, self.trainer.world_size)
        datasets = {task: source.dataset("train", self.preprocess) for task, source in self.data.items()}
        steps = StreamSteps(datasets, self.batch_size, self.seed, shard, labels=True)
        return training_loader(self.trainer, steps, self.num_workers)

    def val_dataloader(self) -> list[StepLoader]:
        assert self.trainer is not None
        datasets = [source.dataset("test", self.preprocess) for source in self.data.values()]
        return scoring_loaders(self.trainer, datasets, self.eval_batch_size, self.num_workers)

    test_dataloader = val_dataloader


def warmup_cosine(step: int, warmup: float, steps: int) -> float:
    """Factor on the learning rate: linear over the first fraction `warmup` of the steps, then a half cosine to 0."""
    rising = max(1, round(warmup * steps))
    if step < rising:
        return (step + 1) / rising
    return 0.5 * (1 + math.cos(math.pi * (step - rising) / max(1, steps - rising)))


def fine_tune(
    backbone: nn.Module,
    data: Mapping[str, Dataset[tuple[Tensor, int]]],
    classes: Mapping[str, tuple[str, ...]],
    *,
    heads: Mapping[str, HeadWeights] | None,
    steps: int,
    lr: float,
    batch_size: int,
    weight_decay: float,
    seed: int,
    label: str,
) -> tuple[dict[str, Tensor], dict[str, HeadWeights]]:
    """`FineTune` as a function; see `adamerge.suites.FineTune` for its contract."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        optimizer = partial(torch.optim.AdamW, lr=lr, weight_decay=weight_decay)
        module = FineTune(copy.deepcopy(backbone), freeze_heads=heads is not None, optimizer=optimizer, warmup=0.3)
        module.set_tasks(classes, heads, sample=lambda: next(iter(data.values()))[0][0][None])
        loader = StepLoader(StreamSteps(data, batch_size, seed, labels=True), steps, num_workers=0)
        trainer = L.Trainer(
            max_steps=steps,
            gradient_clip_val=1.0,
            limit_val_batches=0,
            accelerator="cpu",
            devices=1,
            logger=False,
            enable_checkpointing=False,
            enable_model_summary=False,
            callbacks=[Progress(label)],
        )
        trainer.fit(module, loader, val_dataloaders=loader)  # none is run; Lightning warns about a module without
    state = {name: tensor.detach().clone() for name, tensor in module.backbone.state_dict().items()}
    return state, {task: module.heads[task].weights() for task in classes}


def _load_backbone(backbone: nn.Module, where: str) -> None:
    state = open_state(where, "backbone.")
    own = backbone.state_dict()
    odd = sorted(own.keys() ^ state.keys()) or [n for n in own if own[n].shape != state[n].shape]
    if odd:
        raise InputError(f"{where} does not fit {type(backbone).__name__}: they differ in {odd[:3]}")
    backbone.load_state_dict(dict(state))
