"""An expert joins a merge that is a folder: the job that it comes down to."""

import os
from pathlib import Path
from typing import Any

from adamerge.errors import InputError
from adamerge.files import expanded, json_file
from adamerge.recipes import Job, Recipe, job, locate
from adamerge.running import RECORD


def fold_job(
    merged: str, expert: str, base: str, rule: str | None = None, count: int | None = None, scale: float | None = None
) -> Job:
    """The job that lets an expert join a merge of others; see `adamerge.rules.Fold`.

    Args:
        merged: folder or file of the merge so far.
        expert: folder, file or Hub id of the one that joins it.
        base: of the base model, likewise.
        rule: that the merge so far was made with, by name; what its record says by default, as for all that follow.
        count: how many experts are in it.
        scale: of it.

    Raises:
        InputError: where the record does not say what is left out, and for models that do not fit together.
    """
    known, exclude = _recorded(expanded(merged))
    given = {"rule": rule, "count": count, "scale": scale}
    arguments = known | {key: value for key, value in given.items() if value is not None}
    if missing := [f"--{key}" for key in given if key not in arguments]:
        raise InputError(f"{merged} has no {RECORD} of a merge that can be folded: give {', '.join(missing)}")
    here = Path()
    paths = {key: os.path.abspath(locate(where, here)) for key, where in (("so far", merged), ("new", expert))}
    recipe = Recipe(os.path.abspath(locate(base, here)), paths, [{"Fold": arguments}], exclude=exclude)
    return job(recipe, here)


def _recorded(merged: Path) -> tuple[dict[str, Any], list[str]]:
    """What a merge's record says of its rule, count and scale, and of what it left out."""
    recipe = (json_file(merged / RECORD) or {}).get("recipe", {})
    rules, scale = recipe.get("rules", []), recipe.get("scale")
    if len(rules) != 1 or not isinstance(scale, int | float) or "experts" not in recipe:
        return {}, []
    exclude = list(recipe.get("exclude", ()))
    if isinstance(rules[0], dict) and "Fold" in rules[0]:
        before = rules[0]["Fold"]
        return before | {"count": before["count"] + 1}, exclude
    return {"rule": rules[0], "count": len(recipe["experts"]), "scale": scale}, exclude
