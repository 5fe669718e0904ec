"""The one exception for bad input: a sentence that names the culprit and says what to do."""

import re
from collections.abc import Iterable
from difflib import SequenceMatcher


class InputError(ValueError):
    """Something the user gave does not fit: a file, a tensor, a class list, an option."""


def did_you_mean(word: str, known: Iterable[str], otherwise: str | None = None) -> str:
    """The end of a sentence about a word that nobody knows: the nearest of those known, or what there is.

    A part of a name may stand for it, `lr` for `optimizer.lr`. `otherwise` is what to say where nothing is near and
    there is too much to list.
    """
    known = list(known)
    near = max(known, key=lambda name: (_likeness(word, name), -len(name)), default="")
    if known and _likeness(word, near) >= 0.65:
        return f": did you mean {near!r}?"
    if otherwise is not None:
        return otherwise
    return f"; there are {', '.join(known)}" if known else ": it takes none"


def _likeness(word: str, name: str) -> float:
    """Between 0 and 1, of a word to a name or to that part of it which is most like it, whatever their case."""
    word, name = word.lower().lstrip("-"), name.lower().lstrip("-")
    parts = {name, *name.split("."), *re.split("[._]", name)}
    return max(SequenceMatcher(None, part, word).ratio() for part in parts)
