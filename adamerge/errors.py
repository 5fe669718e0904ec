"""The one exception for bad input: a sentence that names the culprit and says what to do."""


class InputError(ValueError):
    """Something the user gave does not fit: a file, a tensor, a class list, an option."""
