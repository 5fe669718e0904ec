"""Training with Lightning: adaptation, fine-tuning, streams and the command line."""

from trainers.adaptation import Adaptation
from trainers.continual import Experts, MovingAverage, Reset
from trainers.defence import Adversarial
from trainers.evolution import CMAES, M2N2
from trainers.finding import ByEntropy, ByPrototype, ByRouter
from trainers.finetune import FineTune, LabelledData, fine_tune
from trainers.frank_wolfe import FrankWolfe
from trainers.guards import Guard
from trainers.orders import ClassBlocks, ClassCorrelated, Drifting, Joining, Shuffled, TaskBlocks
from trainers.pareto import MAP
from trainers.programs import MGDA, Alternate, BiLevel, Joint, Program, Weighted
from trainers.search import AdaMMS, GridSearch, LMCocktail, Search, Static
from trainers.streams import Stream

__all__ = [
    "CMAES",
    "M2N2",
    "MAP",
    "MGDA",
    "AdaMMS",
    "Adaptation",
    "Adversarial",
    "Alternate",
    "BiLevel",
    "ByEntropy",
    "ByPrototype",
    "ByRouter",
    "ClassBlocks",
    "ClassCorrelated",
    "Drifting",
    "Experts",
    "FineTune",
    "FrankWolfe",
    "GridSearch",
    "Guard",
    "Joining",
    "Joint",
    "LMCocktail",
    "LabelledData",
    "MovingAverage",
    "Program",
    "Reset",
    "Search",
    "Shuffled",
    "Static",
    "Stream",
    "TaskBlocks",
    "Weighted",
    "fine_tune",
]
