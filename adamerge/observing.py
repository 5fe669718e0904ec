"""What one model does with inputs: the statistics of its layers' inputs, outputs and gradients, in one pass."""

import re
from collections.abc import Container, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from adamerge.attention import as_queries, attentions, out_proj, projecting
from adamerge.batches import (
    Likelihoods,
    Logits,
    Targets,
    call,
    each,
    example,
    masks_of,
    output_logits,
    size,
    tokens,
    wide,
)
from adamerge.errors import InputError

#: What can be measured; see `observe`, `adamerge.agreement` for how experts agree, `adamerge.selecting` for shares.
Measure = Literal["gram", "merged_gram", "magnitude", "output_gram", "fisher", "sensitivity", "agreement", "share"]

_INPUTS = ("gram", "merged_gram", "magnitude")
_GRADIENTS: tuple[Measure, ...] = ("fisher", "sensitivity")


@dataclass(frozen=True)
class Observation:
    """What was measured of one model.

    Attributes:
        tensors: by "measure/parameter", `"gram/blocks.0.fc1.weight"` say.
        shared: weights whose inputs are always those of another (queries, keys and values): its name. Statistics of
            inputs are kept under that one alone.
        transposed: weights [in, out], as GPT-2 has them.
        signatures: by parameter, a number that tells its weights from others (`adamerge.provenance.signature`).
    """

    tensors: Mapping[str, Tensor]
    shared: Mapping[str, str] = field(default_factory=dict)
    transposed: frozenset[str] = frozenset()
    signatures: Mapping[str, float] = field(default_factory=dict)

    def key(self, measure: Measure, name: str) -> str:
        """Where a statistic of a parameter is kept: for a part of fused queries, keys and values, that of the whole."""
        if measure not in _INPUTS:
            return f"{measure}/{name}"
        whole = _whole(name)
        return f"{measure}/{self.shared.get(whole, whole)}"

    def has(self, measure: Measure, name: str) -> bool:
        """Whether a statistic of a parameter was measured."""
        whole = _whole(name)
        if measure not in _INPUTS and name != whole and f"{measure}/{whole}" in self.tensors:
            raise InputError(f"the {measure} of {whole} was measured as a whole: merge without split_fused_qkv")
        return self.key(measure, name) in self.tensors

    def flipped(self, name: str) -> bool:
        """Whether a weight is [in, out]."""
        return _whole(name) in self.transposed

    def find(self, measure: Measure, name: str) -> Tensor | None:
        """One statistic of one parameter; None where it was not measured."""
        return self.tensors[self.key(measure, name)] if self.has(measure, name) else None


def observe(
    model: nn.Module,
    batches: Iterable[Any],
    measures: Sequence[Measure] = ("gram",),
    targets: Targets = "sampled",
    logits: Logits = output_logits,
    seed: int = 0,
    layers: Container[str] | None = None,
) -> Observation:
    """Statistics of a model over batches, folded as they come: memory does not grow with the number of examples.

    For a linear layer y = W x (`nn.Linear`, or the transposed `Conv1D` of Hugging Face's GPT-2):

    | measure       | of                              | what                                                           |
    |---------------|---------------------------------|----------------------------------------------------------------|
    | `gram`        | linear layers                   | mean over tokens of x xᵀ, [in, in]                             |
    | `merged_gram` | linear layers                   | as `gram`, where the model is a merge up to there              |
    | `magnitude`   | linear layers and norms         | mean over tokens of |x|, [in]                                  |
    | `output_gram` | linear layers                   | Σ over tokens of g gᵀ, mean over examples; g = ∂ log p / ∂y    |
    | `fisher`      | every parameter that has a gradient | mean over examples of (∂ log p / ∂θ)², sample by sample    |
    | `sensitivity` | every parameter that has a gradient | |Σ θ · ∂ log p / ∂θ|, a scalar, of the mean over examples  |

    Of `nn.MultiheadAttention`, `in_proj_weight` is measured as far as its inputs go, where queries, keys and values are
    one tensor, and `out_proj.weight` as any linear layer.

    log p is the log-likelihood of `targets`, summed over the positions of a sequence. Padding does not count: tokens
    where an `attention_mask` of the batch is 0. The model should be in evaluation mode; it is not changed.

    Args:
        model: called with a batch. Its parameters need `requires_grad` where gradients are measured.
        batches: tensors, tuples (inputs, labels), or dicts of keyword arguments, whose `labels` are not handed on. The
            first axis of every tensor counts examples.
        measures: what is wanted.
        targets: see `Targets`. Only "labels" needs labels (−100 is left out); "enumerated" takes one backward pass for
            each class.
        logits: finds the logits, [B, C] or [B, T, C], in the model's output.
        seed: of what is drawn for "sampled".
        layers: names of the weights whose inputs and outputs are measured; default: all.

    Raises:
        InputError: without batches; for an unknown measure, labels that are missing, masks that cannot be told apart,
            and layers that share their inputs at times only.
    """
    known = [measure for measure in get_args(Measure) if measure not in ("agreement", "share")]
    if unknown := sorted(set(measures) - set(known)):
        raise InputError(f"expected measures among {', '.join(known)}, got {unknown[0]!r}")
    sums = _Sums(model, frozenset(measures), layers)
    likelihoods = Likelihoods(targets, logits, torch.Generator().manual_seed(seed))
    device = next(model.parameters()).device
    for batch in batches:
        sums.examples += size(batch)
        batch = each(batch, lambda tensor: tensor.to(device))
        if {*_INPUTS, "output_gram"} & sums.measures:
            sums.add_activations(batch, likelihoods)
        if set(_GRADIENTS) & sums.measures:
            for index in range(size(batch)):
                sums.add_gradients(example(batch, index), likelihoods)
    return sums.observation()


class _Sums:
    """Running sums of everything that is measured."""

    def __init__(self, model: nn.Module, measures: frozenset[str], layers: Container[str] | None) -> None:
        self.model, self.measures, self.examples = model, measures, 0
        self.sums: dict[str, Tensor] = {}
        self.tokens: dict[str, int] = {}
        self.shared: dict[str, str] = {}
        modules = {f"{name}.weight".lstrip("."): module for name, module in model.named_modules()}
        modules = {name: module for name, module in modules.items() if layers is None or name in layers}
        self.linear = {name: module for name, module in modules.items() if _is_linear(module)}
        self.attention = attentions(model)
        norms = {name: module for name, module in modules.items() if "magnitude" in measures and _is_norm(module)}
        fused = {f"{name}.in_proj_weight".lstrip("."): m for name, m in self.attention.items() if _is_fused(m)}
        fused = {name: module for name, module in fused.items() if layers is None or name in layers}
        self.hooked, self.of_inputs = self.linear | norms | fused, self.linear | fused
        self._last: tuple[Any, int, str] = (None, -1, "")

    def add(self, key: str, value: Tensor) -> None:
        value = value.detach()
        if key in self.sums:
            self.sums[key] += value
        else:
            self.sums[key] = value.clone()

    def add_activations(self, batch: Any, likelihoods: "Likelihoods") -> None:
        masks = masks_of(batch)
        outputs: list[tuple[str, Tensor]] = []

        def seen(name: str, x: Tensor, y: Tensor) -> None:
            self._input(name, x, masks)
            if "output_gram" in self.measures and name in self.linear:
                outputs.append((name, y))

        with ExitStack() as hooks, torch.set_grad_enabled("output_gram" in self.measures):
            for name, module in self.hooked.items():

                def hook(module: nn.Module, given: Any, output: Tensor, name: str = name) -> None:
                    if not isinstance(module, nn.MultiheadAttention) or given[0] is given[1] is given[2]:
                        seen(name, given[0], output)

                hooks.callback(module.register_forward_hook(hook).remove)
            projected = hooks.enter_context(projecting(self.model))
            for name, module in self.attention.items():

                def after(module: Any, given: Any, output: Any, name: str = out_proj(name)) -> None:
                    x, y = projected.pop(name)
                    if name in self.linear:
                        seen(name, as_queries(x, given[0], module.batch_first), y)

                hooks.callback(module.register_forward_hook(after).remove)
            output = call(self.model, batch)
        self._last = (None, -1, "")
        if outputs:
            for objective in likelihoods(output, batch, masks):
                gradients = torch.autograd.grad(
                    objective, [y for _, y in outputs], retain_graph=True, allow_unused=True
                )
                for (name, _), gradient in zip(outputs, gradients, strict=True):
                    if gradient is not None:
                        rows = wide(gradient.flatten(0, -2))
                        self.add(f"output_gram/{name}", rows.T @ rows)

    def _input(self, name: str, x: Tensor, masks: Mapping[str, Tensor]) -> None:
        rows = wide(tokens(x.detach(), masks, name))
        seen, self.tokens[name] = name in self.tokens, self.tokens.get(name, 0) + len(rows)
        last, last_version, source = self._last
        alike = (name in self.of_inputs) == (source in self.of_inputs)
        again = last is x and last_version == x._version and alike
        if name in self.shared and not (again and source == self.shared[name]):
            raise InputError(f"{name} has the inputs of {self.shared[name]} in some calls and others in others")
        if again and not seen and source != name:
            self.shared[name] = source
        if name in self.shared:
            return
        self._last = (x, x._version, name)
        for measure in {"gram", "merged_gram"} & self.measures if name in self.of_inputs else ():
            self.add(f"{measure}/{name}", rows.T @ rows)
        if "magnitude" in self.measures:
            self.add(f"magnitude/{name}", rows.abs().sum(0))

    def add_gradients(self, example: Any, likelihoods: "Likelihoods") -> None:
        with torch.enable_grad():
            output = call(self.model, example)
            parameters = {name: p for name, p in self.model.named_parameters() if p.requires_grad}
            for objective in likelihoods(output, example, masks_of(example)):
                values = tuple(parameters.values())
                gradients = torch.autograd.grad(objective, values, retain_graph=True, allow_unused=True)
                for name, gradient in zip(parameters, gradients, strict=True):
                    if gradient is not None and "fisher" in self.measures:
                        self.add(f"fisher/{name}", wide(gradient).square())
                    if gradient is not None and "sensitivity" in self.measures:
                        self.add(f"sensitivity/{name}", (wide(gradient) * wide(parameters[name])).sum())

    def observation(self) -> Observation:
        if not self.examples:
            raise InputError("no batch was given: nothing can be measured")
        for name, source in self.shared.items():
            if self.tokens[name] != self.tokens[source]:
                raise InputError(f"{name} has the inputs of {source} in some calls only")
        tensors = {}
        for key, total in self.sums.items():
            measure, name = key.split("/", 1)
            # max: a layer may have seen nothing but padding.
            count = max(self.tokens[name], 1) if measure in _INPUTS else self.examples
            tensors[key] = (total / count).abs() if measure == "sensitivity" else total / count
        transposed = frozenset(name for name, module in self.linear.items() if not isinstance(module, nn.Linear))
        return Observation(tensors, dict(self.shared), transposed)


def _whole(name: str) -> str:
    """The fused tensor that `adamerge.fused` has taken a part from; any other name as it is."""
    return re.sub(r"(weight|bias)\.(query|key|value)$", r"\1", name)


def _is_linear(module: nn.Module) -> bool:
    weight = getattr(module, "weight", None)
    return isinstance(weight, Tensor) and (
        isinstance(module, nn.Linear) or (type(module).__name__ == "Conv1D" and weight.dim() == 2)
    )


def _is_fused(module: nn.Module) -> bool:
    return isinstance(module, nn.MultiheadAttention) and module.in_proj_weight is not None


def _is_norm(module: nn.Module) -> bool:
    weight = getattr(module, "weight", None)
    return isinstance(weight, Tensor) and weight.dim() == 1 and type(module).__name__.endswith(("LayerNorm", "RMSNorm"))
