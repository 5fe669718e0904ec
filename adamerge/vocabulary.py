"""Experts whose vocabulary is not the base's: embeddings and heads that have other rows, or as many for other tokens.

| policy      | a row of the base's embedding or head is merged with                                             |
|-------------|--------------------------------------------------------------------------------------------------|
| `refuse`    | nothing: another number of rows is an error                                                      |
| `intersect` | the expert's row for the same token, by their tokenizer.json; the base's where it has no such token |
| `base`      | the expert's row at the same place; the base's beyond the expert's last row                      |

The merge has the base's vocabulary in each case.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from adamerge.checkpoints import Factors, State, factors_of, meta, rows_of
from adamerge.errors import InputError
from adamerge.files import json_file
from adamerge.fingerprint import BASE
from adamerge.kinds import role
from adamerge.views import View

Policy: TypeAlias = Literal["refuse", "intersect", "base"]


def fitted(
    states: Mapping[str, State], folders: Mapping[str, Path], policy: Policy
) -> tuple[dict[str, State], list[str]]:
    """States with the base's rows, and sentences about what was done.

    Raises:
        InputError: for another number of rows if the policy is to refuse, and for a tokenizer that is not there if rows
            are to be matched by token.
    """
    base, outcome, notes = states[BASE], dict(states), []
    names = [name for name in base if role(name) in ("embedding", "head") and meta(base, name).dim()]
    for owner, state in states.items():
        both = [name for name in names if name in state] if owner != BASE else []
        if not both:
            continue
        odd = [name for name in both if meta(state, name).shape != meta(base, name).shape]
        rows, own = (meta(where, (odd or both)[0]).shape[0] for where in (base, state))
        if odd and policy == "refuse":
            raise InputError(
                f"expert {owner!r} has {own} rows in {odd[0]}, the base has {rows}: set vocabulary to 'intersect' to "
                "match rows by token, or to 'base' to keep the base's rows beyond those in common"
            )
        places = _by_place(rows, own) if policy == "base" else _by_token(folders, owner, rows, own, bool(odd))
        if not odd and torch.equal(places, torch.arange(rows)):
            continue
        missing = int((places < 0).sum())
        if policy == "refuse":
            moved = int((places != torch.arange(rows)).sum())
            notes.append(f"expert {owner!r} has other tokens than the base in {moved} rows: consider 'intersect'")
        else:
            outcome[owner] = Matched(state, base, places, both)
            notes.append(f"expert {owner!r} has {rows - missing} of the base's {rows} rows; the others stay the base's")
    return outcome, notes


class Matched(View):
    """An expert whose row `places[r]` is taken for row r of the base, and the base's own row where that is −1."""

    def __init__(self, state: State, base: State, places: Tensor, names: list[str]) -> None:
        super().__init__(state)
        self.base, self.places, self.names = base, places, frozenset(names)

    def meta(self, name: str) -> Tensor:
        like = meta(self.state, name)
        return like.new_empty(meta(self.base, name).shape) if name in self.names else like

    def factors(self, name: str, rows: slice | None = None) -> Factors | None:
        """As `factors_of(state, name, rows)`."""
        return None if name in self.names else factors_of(self.state, name, rows)

    def part(self, name: str, rows: slice | None) -> Tensor:
        if name not in self.names:
            return self.state[name] if rows is None else rows_of(self.state, name, rows)
        start, stop, _ = (rows or slice(None)).indices(len(self.places))
        places = self.places[start:stop]
        part = rows_of(self.base, name, slice(start, stop)).to(meta(self.state, name).dtype, copy=True)
        # Rows that follow each other in the expert are read together.
        breaks = torch.nonzero(places.diff() != 1).flatten() + 1
        for run in torch.tensor_split(torch.arange(len(places)), breaks):
            if len(run) and (first := int(places[run[0]])) >= 0:
                part[run[0] : run[-1] + 1] = rows_of(self.state, name, slice(first, first + len(run)))
        return part


def _by_place(rows: int, own: int) -> Tensor:
    """Row r of the expert for row r of the base, −1 beyond the expert's last."""
    places = torch.arange(rows)
    return torch.where(places < own, places, -1)


def _by_token(folders: Mapping[str, Path], owner: str, rows: int, own: int, needed: bool) -> Tensor:
    """The expert's row for the token of each of the base's rows; rows that are no token's in either match by place."""
    files = [folders[BASE] / "tokenizer.json", folders[owner] / "tokenizer.json"]
    base, expert = (_tokens(file) for file in files)
    if base is None or expert is None:
        if not needed:
            return torch.arange(rows)
        raise InputError(f"{files[base is not None]} cannot be read: rows are matched by its tokens")
    places = _by_place(rows, own)
    taken = [row for row in (*base.values(), *expert.values()) if row < rows]
    places[taken] = -1
    for token, row in base.items():
        if row < rows and expert.get(token, own) < own:
            places[row] = expert[token]
    return places


def _tokens(file: Path) -> dict[str, int] | None:
    """Token -> row, from a tokenizer.json."""
    content = json_file(file)
    if not isinstance(content, dict):
        return None
    tokens = content.get("model", {}).get("vocab", {})
    if isinstance(tokens, list):  # with scores, in the order of the rows
        tokens = {token: row for row, (token, *_) in enumerate(tokens)}
    return tokens | {added["content"]: added["id"] for added in content.get("added_tokens", [])}
