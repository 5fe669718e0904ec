"""What a tensor is, read from its name: the policy table that every merge shares.

| kind       | example                            | merged as                                       |
|------------|------------------------------------|-------------------------------------------------|
| parameter  | weights, biases, norms, embeddings | base + combined deltas                          |
| statistics | BatchNorm running mean, variance   | mean over the experts: a variance stays positive |
| constant   | position ids, counters, masks      | copied from the base                            |
"""

import re
from collections.abc import Iterable
from typing import Literal

from torch import Tensor

Kind = Literal["parameter", "statistics", "constant"]

_STATISTICS = re.compile(r"(^|\.)running_(mean|var)$")
_INDEX = re.compile(r"(?:^|(?<=\.))(\d+)(?=\.)")


def kind(name: str, tensor: Tensor) -> Kind:
    """The kind of one tensor of a state dict."""
    if not tensor.is_floating_point():
        return "constant"
    return "statistics" if _STATISTICS.search(name) else "parameter"


def block_of(names: Iterable[str]) -> dict[str, str]:
    """Group parameter names by the block they sit in.

    A block is the first numbered container on the way to a tensor (`encoder.layers.3.mlp.fc1.weight` is in
    `encoder.layers.3`); what is outside any block is grouped by its outermost modules, up to two of them.
    Stacks that hold other stacks (`layer1.0.conv1.weight` in a ResNet) split at the first number as well.
    """
    blocks = {}
    for name in names:
        found = _INDEX.search(name)
        blocks[name] = name[: found.end()] if found else ".".join(name.split(".")[:-1][:2]) or name
    return blocks
