"""The command line's parser: Lightning's, with errors that say what to type."""

import re
from typing import NoReturn

from lightning.pytorch.cli import LightningArgumentParser

from adamerge.errors import did_you_mean
from trainers.sentences import UNKNOWN


class Parser(LightningArgumentParser):
    """Says of an argument that it does not know which one may be meant, and names one that it misses as it is typed."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        if match := UNKNOWN.match(message):
            known = [f"--{key}" for key, _ in self.get_defaults().items() if not key.startswith("__")]
            message = f"there is no argument {match[1]}{did_you_mean(match[1], known, ': --help lists all')}"
        if message.startswith("the following arguments are required"):
            message = re.sub(r"(?<= )\w+\.", "--", message)  # without the subcommand
        super().error(message, ex)
