"""Training with Lightning: adaptation, fine-tuning, streams and the command line."""

from trainers.adaptation import Adaptation
from trainers.finetune import FineTune, LabelledData, fine_tune
from trainers.streams import Stream

__all__ = ["Adaptation", "FineTune", "LabelledData", "Stream", "fine_tune"]
