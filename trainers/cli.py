"""The command line: LightningCLI with runs in named folders and one-sentence errors."""

import logging
import os
import sys
import warnings
from pathlib import Path
from typing import Any, cast

import lightning as L
import yaml
from jsonargparse import ArgumentError, Namespace
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from rich.console import Console
from rich.logging import RichHandler
from rich.table import Table

from adamerge import InputError
from adamerge.checkpoints import load_torch
from adamerge.files import write_text
from adamerge.plain_files import check_classes
from trainers.adaptation import Adaptation
from trainers.finetune import FineTune
from trainers.overlays import Overlay, guard_overlays
from trainers.parser import Parser, tidy
from trainers.predicting import predict
from trainers.progress import Progress
from trainers.report import Report
from trainers.saving import Checkpoint, WholeFiles, requeued
from trainers.sentences import sentence
from trainers.sources import Source

#: The main job; every `--config` is an overlay on it.
BASE = Path(__file__).parents[1] / "configs" / "base.yaml"


_IN_EVERY_CHECKPOINT = ("state_dict", "global_step", "loops", "callbacks")
_OF_ONE_CALL = ("ckpt_path", "weights_only")


class Trainer(L.Trainer):
    """Lightning's trainer, which can also export what was learned."""

    def export(
        self, model: L.LightningModule, datamodule: L.LightningDataModule | None, ckpt_path: str, output: str
    ) -> Path:
        """Write the adapted model's weights.

        Args:
            model: the adaptation, as configured.
            datamodule: not used.
            ckpt_path: the checkpoint with what was learned.
            output: a `.safetensors` file, or a folder that `from_pretrained` opens.
        """
        if not isinstance(model, Adaptation):
            raise InputError(f"export writes an adapted merge; {type(model).__name__} is none")
        path = model.restore(ckpt_path).export(output)
        Console().print(f"Wrote {path}", soft_wrap=True)
        return path

    def predict(  # type: ignore[override]  # it takes images from outside
        self,
        model: L.LightningModule,
        datamodule: L.LightningDataModule | None,
        source: Source,
        ckpt_path: str | None = None,
        output: str | None = None,
        adapt: bool = False,
        batch_size: int = 1,
        task: str | None = None,
    ) -> Path:
        """Predict images as they come.

        Args:
            model: the adaptation, as configured.
            datamodule: not used.
            source: where the images come from, such as `trainers.sources.Folder` or `trainers.sources.StandardInput`.
            ckpt_path: the checkpoint with what was learned; default: as at the start.
            output: a file of JSON lines, to which predictions are added; default: `predictions.jsonl` in the run's
                folder.
            adapt: learn from the images, each after it was predicted.
            batch_size: images that are waited for before they are predicted.
            task: the task of all images; default: it is found (`task_id: inferred`).
        """
        if not isinstance(model, Adaptation):
            raise InputError(f"predict takes an adapted merge; {type(model).__name__} is none")
        if ckpt_path is not None:
            model.restore(ckpt_path)
        path = Path(output or Path(self.default_root_dir, "predictions.jsonl"))
        trainer = cast(Any, self)
        trainer.callbacks = [each for each in trainer.callbacks if not isinstance(each, Report)]
        predict(self, model, source, path, adapt, batch_size, task)
        Console().print(f"Predictions are in {path}", soft_wrap=True)
        return path


class KeepConfig(SaveConfigCallback):
    """Leaves the whole configuration as `config.yaml` in the run's folder."""

    def save_config(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if stage == "fit":  # without what is about this call, so that other subcommands take the file too
            config = Namespace({key: value for key, value in vars(self.config).items() if key not in _OF_ONE_CALL})
            write_text(Path(trainer.default_root_dir) / "config.yaml", self.parser.dump(config, skip_none=False))


def _checkpoints(root: str, name: str) -> str:
    """The folder of a run's checkpoints."""
    if root is None or not name or Path(name).is_absolute() or ".." in Path(name).parts:
        raise InputError(f"root must name a folder and name one within it: got {root!r} and {name!r}")
    return str(Path(root, name, "checkpoints"))


class CLI(LightningCLI):
    """`--name` names the run's folder, `runs/<name>/`: config, checkpoints, logs, results and figures."""

    def init_parser(self, **kwargs: Any) -> LightningArgumentParser:
        parser = Parser(allow_abbrev=False, dump_header=[f"lightning=={L.__version__}"], **kwargs)
        parser.add_argument("-c", "--config", action=Overlay, help="a YAML file; later ones change what they name")
        return parser

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_argument("--name", type=str, default="run", help="name of the run's folder")
        parser.add_argument("--root", type=str, default="runs", help="where run folders are made")
        parser.add_lightning_class_args(Checkpoint, "checkpoint")
        parser.add_lightning_class_args(Report, "report")
        parser.link_arguments(("root", "name"), "checkpoint.dirpath", _checkpoints)
        parser.set_defaults(
            {
                "checkpoint.filename": "{step}",
                "checkpoint.save_last": True,
                "checkpoint.every_n_train_steps": 50,
                "checkpoint.enable_version_counter": False,
            }
        )

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        return {**LightningCLI.subcommands(), "export": {"model", "datamodule"}, "predict": {"model", "datamodule"}}

    def _add_subcommands(self, parser: LightningArgumentParser, **kwargs: Any) -> None:
        super()._add_subcommands(parser, **kwargs)
        tidy(parser)

    def _prepare_subcommand_parser(self, klass: type, subcommand: str, **kwargs: Any) -> LightningArgumentParser:
        parser = super()._prepare_subcommand_parser(klass, subcommand, **kwargs)
        if subcommand in ("validate", "test"):
            parser.set_defaults({"verbose": False})  # `_show_scores` has a table of its own
        return parser

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        super().parse_arguments(parser, args)
        config = self.config[self.config.subcommand]
        seed = config.seed_everything
        if seed is None or not 0 <= seed < 2**32:
            raise InputError(f"seed_everything is {seed}; a seed is a number from 0 to {2**32 - 1}")
        if config.trainer.max_steps is None:
            raise InputError("trainer.max_steps is null; a stream has no end: give a positive number")

    def _parse_ckpt_path(self) -> None:
        """A checkpoint restores what was learned; the configuration is the one given, so that folders may move."""

    def instantiate_classes(self) -> None:
        check_classes(self.config)
        super().instantiate_classes()
        spec = self.config_dump["model"]
        self.model.save_hyperparameters(
            {
                "_class_path": spec["class_path"],
                "_instantiator": "lightning.pytorch.cli.instantiate_module",
                **spec["init_args"],
            },
            logger=False,
        )

    def instantiate_trainer(self, **kwargs: Any) -> L.Trainer:
        config = self.config_init[self.subcommand]
        folder = str(Path(config.root, config.name))
        if config.trainer.enable_progress_bar is not False:
            self.trainer_defaults["callbacks"] = [Progress()]
        if (
            self.subcommand == "fit" and config.trainer.logger is None
        ):  # a resumed run adds a version, so that no log is lost
            kwargs["logger"] = [TensorBoardLogger(f"{folder}/logs", "tensorboard"), CSVLogger(f"{folder}/logs", "csv")]
        elif self.subcommand != "fit":
            kwargs["logger"] = False
        kwargs["plugins"] = [*(config.trainer.plugins or []), WholeFiles()]
        try:
            return super().instantiate_trainer(default_root_dir=folder, **kwargs)
        except InputError:
            raise
        except (TypeError, ValueError) as error:  # Lightning's checks of arguments that go together
            raise InputError(f"trainer: {error}") from error

    def after_instantiate_classes(self) -> None:
        """Look at what was given before any work starts."""
        config = self.config_init[self.subcommand]
        if self.subcommand == "fit" and config.ckpt_path is None and requeued():
            config.ckpt_path = "last"
        where = config.get("ckpt_path")
        if where and where not in ("last", "best", "hpc", "registry"):
            if not Path(where).is_file():
                raise InputError(f"no such checkpoint: {where}")
            checkpoint = load_torch(Path(where))
            if missing := [key for key in _IN_EVERY_CHECKPOINT if key not in checkpoint]:
                raise InputError(f"{where} is no checkpoint of a run: it has no {missing[0]}")
        if self.subcommand == "fit" and self.trainer.max_steps < 1 and not self.trainer.fast_dev_run:  # type: ignore[attr-defined]
            raise InputError(
                f"trainer.max_steps is {self.trainer.max_steps}; a stream has no end: give a positive number"
            )

    def after_fit(self) -> None:
        if isinstance(self.model, FineTune) and not self.trainer.fast_dev_run:  # type: ignore[attr-defined]
            self.trainer.validate(self.model, self.datamodule, verbose=False)
            self._show_scores("after fine-tuning")

    def after_validate(self) -> None:
        """Print the accuracies."""
        self._show_scores(str(self.trainer.ckpt_path or "as it begins: no checkpoint was given (--ckpt_path)"))

    def _show_scores(self, of: str) -> None:
        scores = {name: value for name, value in self.trainer.callback_metrics.items() if name.startswith("accuracy")}
        names = [name.removeprefix("accuracy/").replace("accuracy", "average") for name in scores]
        table = Table(*names)
        table.add_row(*(f"{100 * float(value):.1f}" for value in scores.values()))
        if self.trainer.is_global_zero:
            Console().print(f"accuracy in %, {of}", soft_wrap=True, highlight=False)
            Console().print(table)

    after_test = after_validate


def main(args: list[str] | None = None) -> None:
    """Run the command line; bad input ends in a sentence on stderr and exit code 2."""
    _set_up_output()
    guard_overlays()
    sys.path.insert(0, os.getcwd())  # so that class_path finds a user's own module
    try:
        CLI(
            L.LightningModule,
            L.LightningDataModule,
            subclass_mode_model=True,
            subclass_mode_data=True,
            trainer_class=Trainer,
            seed_everything_default=0,
            save_config_callback=KeepConfig,
            save_config_kwargs={"overwrite": True, "save_to_log_dir": False},
            auto_configure_optimizers=False,
            parser_kwargs={
                "description": "Adapt, fine-tune, score or export merged models. "
                "What no --config says is in configs/base.yaml.",
                "exit_on_error": False,
                **{name: {"default_config_files": [str(BASE)], "exit_on_error": False} for name in CLI.subcommands()},
            },
            args=args,
        )
    except (ValueError, FileNotFoundError, ArgumentError, MisconfigurationException, yaml.YAMLError) as error:
        known = isinstance(error, InputError | UnicodeDecodeError)
        ours = not isinstance(error, ValueError) or known or "Does not validate" in str(error)
        if not ours or os.environ.get("ADAMERGE_DEBUG"):
            raise
        if os.environ.get("LOCAL_RANK", "0") == "0":  # one process says it for all
            sys.stderr.write(f"error: {sentence(error)}\n")
        raise SystemExit(2) from None


def _set_up_output() -> None:
    """Our own messages in full; of the libraries below only what a user can act on."""
    logging.basicConfig(
        level=logging.WARNING, format="%(message)s", handlers=[RichHandler(show_time=False, show_path=False)]
    )
    for name in ("adamerge", "modules", "trainers"):
        logging.getLogger(name).setLevel(logging.INFO)
    for name in ("lightning", "lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    for message in _NOT_FOR_USERS:
        warnings.filterwarnings("ignore", message)


_NOT_FOR_USERS = (
    r".*treespec, LeafSpec.*",  # Lightning's own use of torch
    r"LightningCLI's args parameter is intended",  # `trainers.tree` asks for a configuration from within
    r"Checkpoint directory .* exists and is not empty",  # a resumed run, as it should be
    r"The dirpath has changed from",  # `test` of another run's checkpoint
    r"Be aware that when using `ckpt_path`, callbacks",  # a resumed run that saves more often
    r".*there is no last checkpoint available",  # it was stopped before its first step: begun anew, as it should be
    r"The number of training batches .* is smaller than the logging interval",
)
