"""Lazy views of a state dict: elsewhere, or with other tensors than the files have."""

from abc import abstractmethod
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from adamerge.checkpoints import Factors, Renamed, State, factors_of, meta, rows_of
from adamerge.files import json_file
from adamerge.fingerprint import BASE
from adamerge.kinds import role


class View(Mapping[str, Tensor]):
    """Another state's tensors, changed when they are read; names and, by default, shapes are the same."""

    def __init__(self, state: State) -> None:
        self.state = state

    @abstractmethod
    def part(self, name: str, rows: slice | None) -> Tensor:
        """Some rows of a tensor, or all of it."""

    def __getitem__(self, name: str) -> Tensor:
        return self.part(name, None)

    def __contains__(self, name: object) -> bool:
        return name in self.state

    def __iter__(self) -> Iterator[str]:
        return iter(self.state)

    def __len__(self) -> int:
        return len(self.state)

    def rows(self, name: str, rows: slice) -> Tensor:
        """As `rows_of(state, name, rows)`."""
        return self.part(name, rows)

    def meta(self, name: str) -> Tensor:
        """As `meta(state, name)`."""
        return meta(self.state, name)


class OnDevice(View):
    """A state whose tensors are moved to a device as they are read."""

    def __init__(self, state: State, device: torch.device) -> None:
        super().__init__(state)
        self.device = device

    def part(self, name: str, rows: slice | None) -> Tensor:
        tensor = self.state[name] if rows is None else rows_of(self.state, name, rows)
        return tensor.to(self.device)

    def factors(self, name: str, rows: slice | None = None) -> Factors | None:
        """As `factors_of(state, name, rows)`."""
        found = factors_of(self.state, name, rows)
        return found and (found[0].to(self.device), found[1].to(self.device))


def as_tied(states: Mapping[str, State], folders: Mapping[str, Path]) -> dict[str, State]:
    """States that have the base's heads: a file may hold a head that is tied to the embedding, or leave it out.

    Whether it is tied says `tie_word_embeddings` in the expert's config.json.
    """
    base = states[BASE]
    heads = {name for name in base if role(name) == "head"}
    fitted = {}
    for owner, state in states.items():
        config = json_file(folders[owner] / "config.json")
        names = {name: name for name in state}
        if owner != BASE and isinstance(config, dict) and config.get("tie_word_embeddings") is True:
            names = {name: name for name in state if role(name) != "head" or name in heads}
            embedding = next((name for name in state if role(name) == "embedding"), None)
            names |= {head: embedding for head in heads - set(state) if embedding and head.endswith(".weight")}
        fitted[owner] = state if list(names) == list(state) else Renamed(state, names)
    return fitted
