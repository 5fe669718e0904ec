"""The command line's parser: Lightning's, with help that begins with a run, and errors that say what to type."""

import re
from typing import NoReturn

from lightning.pytorch.cli import LightningArgumentParser

from adamerge.errors import did_you_mean
from trainers.sentences import UNKNOWN

#: What the subcommands do.
_DO = {
    "fit": "Adapt a merge, or fine-tune an expert.",
    "validate": "Score a checkpoint, as a run does on its way.",
    "test": "Score a checkpoint.",
    "predict": "Predict images as they come.",
    "export": "Write the adapted model's weights.",
}
#: Titles of groups of arguments.
_TITLES = {
    "model": "What is adapted or fine-tuned; --model.help trainers.Adaptation lists its arguments",
    "data": "The images; --data.help trainers.Stream lists its arguments",
    "report": "What is reported",
    "checkpoint": "When checkpoints are written",
    "trainer": "Lightning's trainer",
}


def tidy(parser: LightningArgumentParser) -> None:
    """Give the subcommands a line of help each, and their arguments an order and titles in this project's words."""
    commands = parser._subcommands_action
    assert commands is not None
    for action in commands._choices_actions:
        action.help = _DO[action.dest]
    for command, each in commands.choices.items():
        each.description, each.usage = _DO[command], "%(prog)s [--config FILE ...] [--KEY VALUE ...]"
        wanted = [key for key in ("model", "data", command, "report", "checkpoint", "trainer") if key in each.groups]
        for key in wanted:
            each.groups[key].title = _TITLES.get(key, f"Of {command} alone")
        last = [each.groups[key] for key in wanted] + [g for g in each._action_groups if g.title == "Linked arguments"]
        each._action_groups = [group for group in each._action_groups if group not in last] + last


class Parser(LightningArgumentParser):
    """Says of an argument that it does not know which one may be meant, and names one that it misses as it is typed."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        if match := UNKNOWN.match(message):
            known = [f"--{key}" for key, _ in self.get_defaults().items() if not key.startswith("__")]
            message = f"there is no argument {match[1]}{did_you_mean(match[1], known, ': --help lists all')}"
        if message.startswith("the following arguments are required"):
            message = re.sub(r"(?<= )\w+\.", "--", message)  # without the subcommand
        super().error(message, ex)
