"""The one exception for bad input: a sentence that names the culprit and says what to do."""

from collections.abc import Iterable
from difflib import get_close_matches


class InputError(ValueError):
    """Something the user gave does not fit: a file, a tensor, a class list, an option."""


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """The end of a sentence about a word that nobody knows: the nearest of those known, or what there is."""
    known = list(known)
    near = get_close_matches(word, known, 1, 0.5) or [k for k in known if k.lower() == word.lower()]
    if near:
        return f": did you mean {near[0]!r}?"
    return f"; there are {', '.join(known)}" if known else ": it takes none"
