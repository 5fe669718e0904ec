"""Dynamic composition: the routed layers of a model compute with weights of their own for every sample."""

import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from adamerge.routed import routed_linear, routed_rows
from modules.routers import BlockRouter, Router
from modules.structure import Site, is_transposed

if TYPE_CHECKING:
    from modules.merged import MergedModel


class Routing:
    """Puts itself in place of the forward passes of the routed layers of `model`, which it owns.

    The layer of a site that is called first asks the router for w [B, K], from its own input; all others of the site
    use that w.
    """

    def __init__(self, merged: "MergedModel", model: nn.Module, sites: list[Site], router: Router) -> None:
        self.merged, self.router = weakref.proxy(merged), router
        #: The routed layers.
        self.layers = frozenset(name for site in sites for name in site.layers)
        self._given: Tensor | None = None
        self._off = False
        #: By site, the weights of this pass and the layers that have used them.
        self._current: dict[str, tuple[Tensor, set[str]]] = {}
        for site in sites:
            for name in site.layers:
                layer = model.get_submodule(name)
                layer.forward = partial(self._forward, layer, name, site.name)
                layer.register_forward_pre_hook(_called)

    @contextmanager
    def using(self, weights: Tensor) -> Iterator[None]:
        """Within the block, every site uses these weights [B, K]."""
        self._given = weights
        try:
            yield
        finally:
            self._given = None

    @property
    def given(self) -> bool:
        """Whether the weights are given from outside."""
        return self._given is not None

    @contextmanager
    def of_task(self, task: str, segments: Mapping[str, int]) -> Iterator[None]:
        """Within the block, a batch is what that task has of a batch of `segments`; so are weights that were given."""
        outer = self._given
        if outer is not None:
            self._given = dict(zip(segments, outer.split(list(segments.values())), strict=True))[task]
        try:
            with self.merged.of({task: segments[task]}):
                yield
        finally:
            self._given = outer

    @contextmanager
    def off(self) -> Iterator[None]:
        """Within the block, routed layers compute with the base's weights."""
        self._off = True
        try:
            yield
        finally:
            self._off = False

    def _forward(self, layer: nn.Module, name: str, site: str, x: Tensor) -> Tensor:
        if self._off:
            return cast(Tensor, type(layer).forward(layer, x))
        routing = self._routing(x, name, site) if self._given is None else self._given
        weight = layer.get_parameter("weight"), self.merged.delta(f"{name}.weight")
        bias = None if layer.bias is None else (layer.get_parameter("bias"), self.merged.delta(f"{name}.bias"))
        if isinstance(layer, nn.Conv2d):
            return _convolution(layer, x, routing, weight, bias)
        groups = x.reshape(len(routing), -1, x.shape[-1])
        if isinstance(layer, nn.LayerNorm):
            y = F.layer_norm(groups, layer.normalized_shape, eps=layer.eps) * routed_rows(routing, *weight).unsqueeze(1)
            return (y if bias is None else y + routed_rows(routing, *bias).unsqueeze(1)).reshape(x.shape)
        y = routed_linear(groups, routing, weight, bias, is_transposed(layer))
        return y.reshape(*x.shape[:-1], y.shape[-1])

    def _routing(self, x: Tensor, name: str, site: str) -> Tensor:
        """The weights of a site. A layer that is called again begins another pass, whichever that is."""
        if site not in self._current or name in self._current[site][1]:
            self._current[site] = self._route(x, site), set()
        weights, used = self._current[site]
        used.add(name)
        return weights

    def _route(self, x: Tensor, site: str) -> Tensor:
        weights = self.router(x, site)
        if isinstance(self.router, BlockRouter) and self.router.per == "batch" and self.router.training:
            parts = weights.split(list((self.merged.segments or {}).values()) or [len(weights)])
            if len({len(part) for part in parts}) == 1:  # one merge per task
                return torch.stack([part.mean(0) for part in parts])
            return torch.cat([part.mean(0, keepdim=True).expand_as(part) for part in parts])
        return weights


def _convolution(layer: nn.Conv2d, x: Tensor, routing: Tensor, weight: Any, bias: Any) -> Tensor:
    """A convolution is a linear layer on patches."""
    size, stride = cast(tuple[int, int], layer.kernel_size), cast(tuple[int, int], layer.stride)
    padding, dilation = cast(tuple[int, int], layer.padding), cast(tuple[int, int], layer.dilation)
    patches = F.unfold(x, size, dilation, padding, stride).mT  # [B, places, I kh kw]
    groups = patches.reshape(len(routing), -1, patches.shape[-1])
    y = routed_linear(groups, routing, (weight[0].flatten(1), weight[1]), bias)
    steps = zip(x.shape[-2:], size, stride, padding, dilation, strict=True)
    height, width = ((n + 2 * p - d * (k - 1) - 1) // s + 1 for n, k, s, p, d in steps)
    return y.reshape(len(x), height * width, -1).mT.unflatten(-1, (height, width))


def _called(layer: nn.Module, args: tuple[Tensor, ...]) -> None:
    """Does nothing; a layer with a hook is called, where torch's fused encoder layer would use its weights alone."""
