"""Training with Lightning: adaptation, fine-tuning, streams and the command line."""

from trainers.adaptation import Adaptation
from trainers.finetune import FineTune, LabelledData, fine_tune
from trainers.frank_wolfe import FrankWolfe
from trainers.programs import MGDA, Alternate, BiLevel, Joint, Program, Weighted
from trainers.streams import Stream

__all__ = [
    "MGDA",
    "Adaptation",
    "Alternate",
    "BiLevel",
    "FineTune",
    "FrankWolfe",
    "Joint",
    "LabelledData",
    "Program",
    "Stream",
    "Weighted",
    "fine_tune",
]
