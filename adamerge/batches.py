"""Batches in the forms that models take, and the log-likelihoods whose gradients are wanted."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

from adamerge.errors import InputError

#: Where the classes come from whose log-likelihood is differentiated: drawn from the model's own prediction, all of
#: them weighted by it, or the true ones.
Targets = Literal["sampled", "enumerated", "labels"]
#: Finds the logits, [B, C] or [B, T, C], in a model's output.
Logits = Callable[[Any], Tensor]


def output_logits(output: Any) -> Tensor:
    """The logits of a model's output: the `logits` attribute of a Hugging Face output, or the tensor itself."""
    logits = getattr(output, "logits", output)
    if not isinstance(logits, Tensor):
        raise InputError(
            f"the model returns a {type(output).__name__}: give `logits`, a function that finds them in it"
        )
    return logits


def call(model: nn.Module, batch: Any) -> Any:
    """The model's output for a batch, without its labels."""
    if isinstance(batch, Mapping):
        return model(**{name: value for name, value in batch.items() if name != "labels"})
    return model(batch[0] if isinstance(batch, tuple | list) else batch)


def masks_of(batch: Any) -> dict[str, Tensor]:
    """The attention masks [B, T] of a batch, by name."""
    if not isinstance(batch, Mapping):
        return {}
    return {name: value for name, value in batch.items() if name.endswith("attention_mask") and value.dim() == 2}


def tokens(x: Tensor, masks: Mapping[str, Tensor], name: str) -> Tensor:
    """[tokens, in] of inputs [B, in] or [B, T, in] (or [B · T, in]), without padding."""
    fits = [
        mask for mask in masks.values()
        if (x.dim() > 2 and mask.shape == x.shape[:-1]) or (x.dim() == 2 and len(x) == mask.numel() != len(mask))
    ]  # fmt: skip
    if any(not torch.equal(mask, fits[0]) for mask in fits[1:]):
        raise InputError(f"{' and '.join(masks)} both fit the inputs of {name}: pad them to different lengths")
    rows = x.flatten(0, -2)
    return rows[fits[0].flatten().bool()] if fits else rows


def size(batch: Any) -> int:
    """How many examples a batch has."""
    if isinstance(batch, Tensor):
        return len(batch)
    return len(next(iter(batch.values())) if isinstance(batch, Mapping) else batch[0])


def each(batch: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """A batch with its tensors changed."""
    if isinstance(batch, Mapping):
        return {name: each(value, change) for name, value in batch.items()}
    if isinstance(batch, tuple | list):
        return tuple(each(value, change) for value in batch)
    return change(batch) if isinstance(batch, Tensor) else batch


def example(batch: Any, index: int) -> Any:
    """A batch of one of its examples."""
    return each(batch, lambda tensor: tensor[index : index + 1])


def wide(x: Tensor) -> Tensor:
    """In float32 or better."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


class Likelihoods:
    """Scalars whose gradients are wanted, one after the other: with several of them, their squares add up.

    Each is Σ log p over the examples of a batch and the positions of a sequence that count.

    Args:
        targets: see `Targets`.
        logits: see `Logits`.
        generator: of what is drawn.
    """

    def __init__(self, targets: Targets, logits: Logits, generator: torch.Generator) -> None:
        self.targets, self.logits, self.generator = targets, logits, generator

    def __call__(self, output: Any, batch: Any, masks: Mapping[str, Tensor]) -> Iterator[Tensor]:
        log_p = wide(self.logits(output)).log_softmax(-1)
        if self.targets == "enumerated":
            if log_p.dim() != 2:
                raise InputError(f"logits of shape {list(log_p.shape)} cannot be enumerated: use targets='sampled'")
            for column in log_p.unbind(-1):
                # √p, so that squares of gradients have weight p.
                yield (column * (column.detach() / 2).exp()).sum()
            return
        chosen, counts = self._chosen(log_p, batch)
        if log_p.dim() > 2:
            counts &= next((m.bool() for m in masks.values() if m.shape == counts.shape), torch.ones_like(counts))
        yield (log_p.gather(-1, chosen.unsqueeze(-1)).squeeze(-1) * counts).sum()

    def _chosen(self, log_p: Tensor, batch: Any) -> tuple[Tensor, Tensor]:
        """The classes, and which of them count."""
        if self.targets == "sampled":
            drawn = torch.multinomial(log_p.detach().flatten(0, -2).exp().cpu(), 1, generator=self.generator)
            return drawn.view(log_p.shape[:-1]).to(log_p.device), torch.ones_like(log_p[..., 0], dtype=torch.bool)
        labels = batch.get("labels") if isinstance(batch, Mapping) else None
        labels = batch[1] if isinstance(batch, tuple | list) and len(batch) == 2 else labels
        if labels is None or labels.shape != log_p.shape[:-1]:
            got = "none" if labels is None else f"labels of shape {list(labels.shape)}"
            raise InputError(f"targets='labels' needs labels of shape {list(log_p.shape[:-1])}, got {got}")
        return labels.clamp(min=0), labels >= 0
