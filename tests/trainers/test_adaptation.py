from contextlib import contextmanager
from types import SimpleNamespace

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from tiny_suite import TinySuite

from adamerge import InputError
from adamerge.objectives import entropy
from modules import Coefficients, Entropy
from trainers import Adaptation, Stream
from trainers.evaluation import accuracy
from trainers.loaders import training_loader
from trainers.streams import StreamSteps


def learned(module: Adaptation) -> torch.Tensor:
    return module.coefficients.raw.detach()


def test_only_the_coefficients_are_learned(suite):
    module = Adaptation(suite)
    module.configure_model()
    assert [name for name, _ in module.learned()] == ["coefficients.raw"]


def test_a_step_is_one_step_of_the_optimiser_on_the_summed_entropies(suite, adapt):
    module, _ = adapt(steps=1, optimizer=lambda params: torch.optim.SGD(params, lr=0.1))
    reference = Adaptation(suite)
    reference.configure_model()
    loss = 0
    for task in suite.tasks:
        images = torch.stack([suite.dataset(task, "test")[int(i)][0] for i in stream_indices(suite, task)])
        loss = loss + entropy(reference(images, task)).mean()
    loss.backward()
    torch.testing.assert_close(learned(module), 0.3 - 0.1 * reference.coefficients.raw.grad)


def stream_indices(suite, task):
    return StreamSteps({t: suite.dataset(t, "test") for t in suite.tasks}, 4, 0).indices(task, 0)


def test_entropy_falls(suite, adapt):
    module, _ = adapt(steps=60, optimizer=lambda params: torch.optim.Adam(params, lr=3e-2))

    def total(model):
        with torch.no_grad():
            data = {task: torch.stack([x for x, _ in suite.dataset(task, "test")]) for task in suite.tasks}
            return sum(entropy(model(x, task)).mean() for task, x in data.items())

    assert total(module) < total(Adaptation(suite)) - 0.1


def test_micro_batches_learn_the_same(adapt):
    one, _ = adapt(steps=5)
    parts, _ = adapt(steps=5, micro_batches=True)
    torch.testing.assert_close(learned(one), learned(parts), rtol=0, atol=1e-6)


@pytest.mark.parametrize("workers", [0, 2])
def test_same_seed_same_result_whatever_the_workers(adapt, workers):
    first, _ = adapt(steps=5)
    second, _ = adapt(steps=5, stream=Stream(batch_size=4, num_workers=workers))
    assert torch.equal(learned(first), learned(second))
    other, _ = adapt(steps=5, stream=Stream(batch_size=4, seed=1))
    assert not torch.equal(learned(first), learned(other))


@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")
def test_resuming_goes_on_bit_for_bit(adapt, tmp_path):
    whole, _ = adapt(steps=20)
    keep = ModelCheckpoint(tmp_path, save_last=True, every_n_train_steps=7)
    adapt(steps=10, callbacks=[keep])
    assert torch.load(tmp_path / "last.ckpt", weights_only=True)["global_step"] == 7
    resumed, trainer = adapt(steps=20, ckpt_path=str(tmp_path / "last.ckpt"), callbacks=[keep])
    assert trainer.global_step == 20
    assert torch.equal(learned(whole), learned(resumed))


@pytest.fixture
def checkpoint(adapt, tmp_path):
    module, trainer = adapt(steps=3)
    trainer.save_checkpoint(tmp_path / "run.ckpt")
    return module, tmp_path / "run.ckpt"


def test_a_checkpoint_holds_learned_tensors_and_fingerprints_only(checkpoint):
    module, path = checkpoint
    saved = torch.load(path, weights_only=True)
    assert list(saved["state_dict"]) == ["coefficients.raw"]
    assert saved["adamerge"]["fingerprints"] == module.merged.fingerprints
    assert path.stat().st_size < 50_000


def test_a_checkpoint_gives_the_adapted_model_back(checkpoint, suite):
    module, path = checkpoint
    again = Adaptation.load_from_checkpoint(path, suite=suite)
    images = torch.randn(2, 3, 4, 4)
    plain = again.merged.materialise()
    torch.testing.assert_close(plain(images), module.merged(images), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"suite": TinySuite(seed=1)}, r"learned on other models \(base: \w{12} in the checkpoint, \w{12} here; one: "),
        ({"coefficients": Coefficients("block")}, "coefficient rows are not those of this run; they differ in"),
    ],
)
def test_a_checkpoint_is_refused_elsewhere(checkpoint, kwargs, message):
    with pytest.raises(InputError, match=message):
        Adaptation.load_from_checkpoint(checkpoint[1], **{"suite": TinySuite(), **kwargs})


def test_a_foreign_checkpoint_is_refused(suite, tmp_path):
    torch.save({"state_dict": {}}, tmp_path / "other.ckpt")
    with pytest.raises(InputError, match="not written by an adaptation run"):
        Adaptation(suite).restore(tmp_path / "other.ckpt")
    with pytest.raises(InputError, match=r"no such checkpoint: .*nothing\.ckpt"):
        Adaptation(suite).restore(tmp_path / "nothing.ckpt")


def test_validation_equals_plain_scoring(suite, adapt):
    module, _ = adapt(steps=3)
    trainer = L.Trainer(accelerator="cpu", logger=False, enable_progress_bar=False)
    scores = trainer.validate(module, datamodule=Stream(eval_batch_size=7), verbose=False)
    datasets = {task: suite.dataset(task, "test") for task in suite.tasks}
    expected = accuracy(module, datasets)
    assert expected == pytest.approx({task: scores[0][f"accuracy/{task}"] for task in suite.tasks})
    assert scores[0]["accuracy"] == pytest.approx(sum(expected.values()) / 3)


def test_export_writes_the_merged_weights(checkpoint, tmp_path):
    from safetensors.torch import load_file

    module, _ = checkpoint
    saved = load_file(module.export(tmp_path / "merged.safetensors"))
    for name, value in module.merged.merged_state_dict().items():
        assert torch.equal(saved[name], value)
    with pytest.raises(InputError, match="MLP is no Hugging Face model"):
        module.export(tmp_path / "folder")


def test_accumulated_steps_take_further_batches(adapt, tmp_path):
    """Two halves of a batch, accumulated, and a resume in between."""
    _, trainer = adapt(steps=4, trainer={"accumulate_grad_batches": 2})
    trainer.save_checkpoint(tmp_path / "half.ckpt")
    whole, _ = adapt(steps=8, trainer={"accumulate_grad_batches": 2})
    resumed, _ = adapt(steps=8, trainer={"accumulate_grad_batches": 2}, ckpt_path=str(tmp_path / "half.ckpt"))
    assert torch.equal(learned(whole), learned(resumed))


def test_a_batch_that_processes_cannot_share_is_refused():
    trainer = SimpleNamespace(world_size=2, max_steps=5, accumulate_grad_batches=1, global_step=0)
    with pytest.raises(InputError, match="batch_size 3 does not divide by the 2 processes"):
        training_loader(trainer, StreamSteps({}, batch_size=3, seed=0), num_workers=0)


@pytest.mark.parametrize("name", ["type", "a.b", "keys"])
def test_task_names_that_torch_cannot_take(name):
    from modules import Head, Heads

    with pytest.raises(InputError, match="cannot be a task's name"):
        Heads({name: Head.linear(2, 2)})


def test_the_reference_objective_has_its_epsilon():
    logits = torch.randn(4, 5, dtype=torch.float64)
    p = logits.softmax(-1)
    torch.testing.assert_close(Entropy(1e-8)(SimpleNamespace(logits=logits)), -(p * (p + 1e-8).log()).sum(-1))


@pytest.mark.parametrize("accelerator", ["cpu", pytest.param("gpu", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("micro_batches", [False, True], ids=["one forward", "micro-batches"])
def test_mixed_precision_keeps_the_coefficients_in_float32(adapt, micro_batches, accelerator):
    exact, _ = adapt(steps=10)
    settings = {"accelerator": accelerator, "precision": "bf16-mixed"}
    half, _ = adapt(steps=10, trainer=settings, micro_batches=micro_batches)
    assert half.coefficients.raw.dtype == torch.float32
    torch.testing.assert_close(learned(half).cpu(), learned(exact), rtol=0, atol=5e-3)
    assert not torch.equal(learned(half).cpu(), learned(exact))


def test_coefficients_begin_at_the_usual_scale_of_the_suite(suite):
    suite.scale = 0.2
    module = Adaptation(suite)
    module.configure_model()
    assert (module.coefficients() == torch.tensor(0.2)).all()
    told = Adaptation(suite, Coefficients(init=0.4))
    told.configure_model()
    assert (told.coefficients() == torch.tensor(0.4)).all()


class Log(CSVLogger):
    """Keeps what it is given."""

    def log_metrics(self, metrics, step=None):
        self.rows = {**getattr(self, "rows", {}), step: dict(metrics)}


class Stop(L.Callback):
    """Ends a run after its fifth step."""

    def on_train_batch_end(self, trainer, *_):
        trainer.should_stop = trainer.global_step == 5


def test_logged_figures_are_those_of_their_step(adapt, tmp_path):
    rows = []
    for every, callbacks in ((1, []), (2, []), (2, [Stop()])):
        log = Log(tmp_path)
        adapt(7, trainer={"logger": log, "log_every_n_steps": every}, callbacks=callbacks)
        rows.append(log.rows)
    whole, some, stopped = rows
    assert list(whole) == list(range(7))
    assert {"loss", "loss/one", "entropy/two", "gradient_norm", "coefficients/mean"} <= set(whole[0])
    assert some == {step: whole[step] for step in (1, 3, 5)}
    assert stopped == {step: whole[step] for step in (1, 3, 4)}


@pytest.mark.parametrize("micro_batches", [False, True])
def test_a_run_keeps_its_memory_until_it_ends_or_fails(adapt, monkeypatch, micro_batches):
    events = []

    @contextmanager
    def kept():
        events.append("kept")
        yield
        events.append("freed")

    class Fails(L.Callback):
        def on_train_batch_end(self, *_):
            raise RuntimeError(f"after {len(events)} events")

    monkeypatch.setattr("trainers.keeping.kept", kept)
    adapt(2, micro_batches=micro_batches)
    with pytest.raises(RuntimeError, match=f"after {0 if micro_batches else 3} events"):
        adapt(2, micro_batches=micro_batches, callbacks=[Fails()])
    assert events == ([] if micro_batches else ["kept", "freed"] * 2)
