"""Dynamic composition: the routed layers of a model compute with weights of their own for every sample."""

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, nn

from adamerge.routed import routed_linear
from modules.routers import BlockRouter, Router
from modules.structure import Site, is_transposed

if TYPE_CHECKING:
    from modules.merged import MergedModel


class Routing:
    """Puts itself in place of the forward passes of the routed layers of `model`, which it owns.

    The first layer of a site asks the router for w [B, K], from its own input; all layers of the site use that w.
    """

    def __init__(self, merged: "MergedModel", model: nn.Module, sites: list[Site], router: Router) -> None:
        self.merged, self.router = weakref.proxy(merged), router
        #: The routed layers.
        self.layers = frozenset(name for site in sites for name in site.layers)
        self._given: Tensor | None = None
        self._off = False
        self._weights: dict[str, Tensor] = {}
        for site in sites:
            for number, name in enumerate(site.layers):
                layer = model.get_submodule(name)
                layer.forward = partial(self._forward, layer, name, site.name, number == 0)

    @contextmanager
    def using(self, weights: Tensor) -> Iterator[None]:
        """Within the block, every site uses these weights [B, K]."""
        self._given = weights
        try:
            yield
        finally:
            self._given = None

    @contextmanager
    def off(self) -> Iterator[None]:
        """Within the block, routed layers compute with the base's weights."""
        self._off = True
        try:
            yield
        finally:
            self._off = False

    def _forward(self, layer: nn.Module, name: str, site: str, first: bool, x: Tensor) -> Tensor:
        if self._off:
            return cast(Tensor, type(layer).forward(layer, x))
        if first and self._given is None:
            self._weights[site] = self._route(x, site)
        routing = self._weights[site] if self._given is None else self._given
        weight = layer.get_parameter("weight"), self.merged.delta(f"{name}.weight")
        bias = None if layer.bias is None else (layer.get_parameter("bias"), self.merged.delta(f"{name}.bias"))
        groups = x.reshape(len(routing), -1, x.shape[-1])
        y = routed_linear(groups, routing, weight, bias, is_transposed(layer))
        return y.reshape(*x.shape[:-1], y.shape[-1])

    def _route(self, x: Tensor, site: str) -> Tensor:
        weights = self.router(x, site)
        if isinstance(self.router, BlockRouter) and self.router.per == "batch" and self.router.training:
            parts = weights.split(list(self.merged.segments.values()) or [len(weights)])
            if len({len(part) for part in parts}) == 1:  # one merge per task
                return torch.stack([part.mean(0) for part in parts])
            return torch.cat([part.mean(0, keepdim=True).expand_as(part) for part in parts])
        return weights
