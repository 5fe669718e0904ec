"""The one LightningModule behind every adaptive method."""

from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.cli import OptimizerCallable
from torch import Tensor, nn
from torch.nn.modules.module import _IncompatibleKeys

from adamerge import InputError
from adamerge.checkpoints import load_torch
from adamerge.export import export
from adamerge.fingerprint import SHORT
from adamerge.objectives import entropy
from adamerge.suites import Suite
from modules import Coefficients, Entropy, Head, MergedModel, Objective
from trainers.finetune import fine_tune
from trainers.scoring import ScoredModule
from trainers.streams import Batch

#: The key of our own entry in a checkpoint.
ENTRY = "adamerge"


class Adaptation(ScoredModule):
    """Test-time adaptation of a merge: frozen experts, a few learned numbers, no labels.

    A step takes images of every task, sums the tasks' mean losses, min_λ Σ_t mean_x ℓ(head_t(f(x; θ₀ + Σₖ λₖ τₖ))),
    and moves whatever takes a gradient: the coefficients, in plain AdaMerging (arXiv:2310.02575). A checkpoint holds
    the learned tensors, their names and the fingerprints of base and experts; it loads against the same experts only.

    Args:
        suite: base, experts, heads and tasks. `Adaptation.load_from_checkpoint(path, suite=...)` takes another one,
            whose files have moved; the fingerprints must agree.
        coefficients: how finely the task vectors are weighted, and within which bounds.
        objective: the loss per image, from the logits of its task.
        optimizer: builds the optimiser from the learned parameters.
        micro_batches: one forward and backward pass per task instead of one over all of them: the same gradient, and
            the activations of one task at a time in memory.
    """

    def __init__(
        self,
        suite: Suite,
        coefficients: Coefficients | None = None,
        objective: Objective | None = None,
        optimizer: OptimizerCallable = partial(torch.optim.Adam, lr=1e-3),
        micro_batches: bool = False,
    ) -> None:
        super().__init__()
        self.suite, self.optimizer, self.micro_batches = suite, optimizer, micro_batches
        self.coefficients = coefficients or Coefficients()
        self.objective = objective or Entropy()
        self.model: MergedModel | None = None

    # -- set-up ------------------------------------------------------------------------------------------------------

    def prepare_data(self) -> None:
        self._check()
        self.suite.prepare(fine_tune)

    def configure_model(self) -> None:
        if self.model is not None:
            return
        self._check()
        self.suite.prepare(fine_tune)
        self.suite.check()
        self.model = MergedModel(self.suite.backbone(), self.suite.task_vectors(), self.coefficients)
        for task in self.suite.tasks:
            self.heads[task] = Head(self.suite.head(task))
        self.score({task: self.suite.classes(task) for task in self.suite.tasks})

    def _check(self) -> None:
        """What can be known before anything is read or made."""
        self.coefficients.check(self.suite.tasks)
        if (
            self._trainer is not None
            and str(self.trainer.precision).endswith("-true")
            and "16" in self.trainer.precision
        ):
            raise InputError(f"precision {self.trainer.precision} would round the coefficients away; use bf16-mixed")

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return self.optimizer([parameter for _, parameter in self.learned()])

    def learned(self) -> Iterator[tuple[str, nn.Parameter]]:
        """The parameters that adaptation moves, by name."""
        return ((name, p) for name, p in self.named_parameters() if p.requires_grad)

    # -- one step ----------------------------------------------------------------------------------------------------

    def forward(self, images: Tensor, task: str) -> Tensor:
        """Logits [B, C] of one task's images [B, 3, H, W]."""
        features = self.merged(images)
        return self.heads[task](features)

    @property
    def merged(self) -> MergedModel:
        """The merged backbone: images -> features."""
        self.configure_model()
        assert self.model is not None
        return self.model

    def training_step(self, batch: Batch, batch_idx: int) -> dict[str, Any]:
        losses, entropies = self.losses(batch)
        loss = torch.stack(list(losses.values())).sum()
        self.log("loss", loss.detach(), prog_bar=True)
        self.log_dict({f"loss/{task}": value.detach() for task, value in losses.items()})
        self.log_dict({f"entropy/{task}": value for task, value in entropies.items()})
        return {"loss": loss, "losses": torch.stack([value.detach() for value in losses.values()])}

    def losses(self, batch: Batch) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Each task's mean loss, whose plain sum takes the backward pass, and the mean entropy of its predictions."""
        images = {task: part["images"] for task, part in batch.items()}
        entropies: dict[str, Tensor] = {}

        def loss(task: str, features: Tensor) -> Tensor:
            logits = self.heads[task](features)
            entropies[task] = entropy(logits.detach()).mean()
            return self.objective(logits).mean()

        if self.micro_batches:
            parts = (partial(lambda task, x: loss(task, self.merged(x)), task, x) for task, x in images.items())
            others = [p for p in self.parameters() if p is not self.coefficients.raw]
            return dict(zip(images, self.merged.in_parts(parts, others), strict=True)), entropies
        features = self.merged(torch.cat(list(images.values()))).split([len(x) for x in images.values()])
        return {task: loss(task, z) for task, z in zip(images, features, strict=True)}, entropies

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        values = self.coefficients().detach()
        grads = [p.grad.detach().flatten() for _, p in self.learned() if p.grad is not None]
        self.log_dict(
            {
                "gradient_norm": torch.linalg.vector_norm(torch.cat(grads)),
                "coefficients/mean": values.mean(),
                "coefficients/min": values.min(),
                "coefficients/max": values.max(),
            }
        )

    # -- checkpoints and export --------------------------------------------------------------------------------------

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:  # type: ignore[override]
        """The learned tensors alone: all else is in the suite."""
        everything = super().state_dict(*args, **kwargs)
        return {name: everything[name] for name, _ in self.learned()}

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Load learned tensors. Raises InputError for others."""
        own = {name for name, _ in self.learned()}
        if strict and own != state_dict.keys():
            raise InputError(
                f"these are not the learned tensors of this run; they differ in {sorted(own ^ state_dict.keys())}"
            )
        super().load_state_dict(state_dict, strict=False, assign=assign)
        return _IncompatibleKeys([], [])

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint[ENTRY] = {
            "tasks": list(self.merged.tasks),
            "rows": list(self.coefficients.groups),
            "fingerprints": self.merged.fingerprints,
        }

    def on_load_checkpoint(self, checkpoint: Mapping[str, Any]) -> None:
        entry = checkpoint.get(ENTRY)
        if entry is None:
            raise InputError("this checkpoint was not written by an adaptation run")
        _check_fingerprints(entry["fingerprints"], self.merged.fingerprints)
        for what, saved, own in (
            ("tasks", entry["tasks"], list(self.merged.tasks)),
            ("coefficient rows", entry["rows"], list(self.coefficients.groups)),
        ):
            if saved != own:
                odd = sorted(set(saved) ^ set(own))[:3] or "their order"
                raise InputError(f"the checkpoint's {what} are not those of this run; they differ in {odd}")

    def restore(self, path: str | Path) -> "Adaptation":
        """Load what was learned from a checkpoint, into this configuration."""
        if not Path(path).is_file():
            raise InputError(f"no such checkpoint: {path}")
        checkpoint = load_torch(Path(path))
        self.configure_model()
        self.on_load_checkpoint(checkpoint)
        self.load_state_dict(checkpoint["state_dict"])
        return self

    def describe(self) -> dict[str, Any]:
        """The settings that a result depends on."""
        start = self.coefficients.init if isinstance(self.coefficients.init, (float, int, list, str)) else "default"
        optimizer = self.configure_optimizers()
        plain = {k: v for k, v in optimizer.defaults.items() if isinstance(v, (bool, int, float, tuple))}
        return {
            "grain": self.coefficients.grain,
            "bound": self.coefficients.bound,
            "init": start,
            "objective": type(self.objective).__name__,
            "optimizer": {"name": type(optimizer).__name__, **plain},
        }

    @classmethod
    def load_from_checkpoint(cls, checkpoint_path: Any, *args: Any, **kwargs: Any) -> "Adaptation":
        """As Lightning's, of tensors and plain values only. Raises InputError for a broken file or a pickle."""
        load_torch(Path(checkpoint_path))
        return super().load_from_checkpoint(checkpoint_path, *args, **{"weights_only": True, **kwargs})

    def export(self, path: str | Path) -> Path:
        """Write the merged backbone: a `.safetensors` file, or a folder that `from_pretrained` opens (HF models)."""
        return export(self.merged.materialise(), Path(path))


def _check_fingerprints(saved: Mapping[str, str], own: Mapping[str, str]) -> None:
    odd = [name for name in {**saved, **own} if saved.get(name) != own.get(name)]
    if odd:
        words = "; ".join(
            f"{name}: {saved.get(name, 'absent')[:SHORT]} in the checkpoint, {own.get(name, 'absent')[:SHORT]} here"
            for name in odd
        )
        raise InputError(f"the checkpoint was learned on other models ({words}); give the suite it was made with")
