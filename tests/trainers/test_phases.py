"""Phases: who learns when, what is looked up instead of computed, and runs that go on in the middle of one."""

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from tiny_suite import TinySuite
from torch.utils.data import Dataset

from adamerge import InputError
from adamerge.rules import Prune
from modules import (
    BlockRouter,
    Coefficients,
    Divergence,
    Entropy,
    FeatureRouter,
    PseudoLabels,
    RepresentationL1,
    Sum,
    Surgery,
    TaskBlock,
    TaskIdentity,
)
from trainers import Adaptation, Stream
from trainers.phases import ExpertOutputs, Phase, boundaries
from trainers.streams import StreamSteps

EXISTS = "ignore:Checkpoint directory .* exists and is not empty"


class Followed(Adaptation):
    """Keeps, by step, the losses and the parts that moved."""

    def on_train_start(self):
        self.seen, self.moves = [], []

    def training_step(self, batch, batch_idx):
        self.before = {name: p.detach().clone() for name, p in self.learned()}
        outputs = super().training_step(batch, batch_idx)
        self.seen.append(outputs["losses"])
        return outputs

    def on_train_batch_end(self, *_):
        moved = {name.split(".")[0] for name, p in self.learned() if not torch.equal(p, self.before[name])}
        self.moves.append(sorted(moved))


def surgery(blocks: bool = False, share: float = 0.5, seed: int = 0) -> dict:
    """AdaMerging, then Surgery, which begins at random."""
    torch.manual_seed(seed)
    phases = [Phase(Entropy(), ["coefficients"], share), Phase(RepresentationL1(blocks), ["correction"])]
    return {"coefficients": Coefficients("tensor"), "correction": Surgery(rank=3, blocks=blocks), "phases": phases}


def values(module: Adaptation) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in module.learned()}


def test_boundaries_share_out_the_steps():
    def ends(steps, *shares):
        return boundaries([Phase(Entropy(), share=share) for share in shares], steps)

    assert ends(10, 0.3, 1.0) == [3, 10]
    assert ends(10, 1.0) == [10]
    assert ends(1000, 0.1, 0.2, 0.7) == [100, 300, 1000]
    assert ends(1, 0.5, 1.0) == [0, 1]


@pytest.mark.parametrize("shares", [(1.0, 1.0), (0.0, 1.0), (0.6, 0.6, 1.0)])
def test_shares_that_leave_a_phase_nothing_are_refused(shares):
    module = Adaptation(TinySuite(), phases=[Phase(Entropy(), share=share) for share in shares])
    with pytest.raises(InputError, match="shares must be positive and sum to less than 1, got"):
        module.configure_model()


def test_parts_move_in_their_phase_alone(adapt):
    phases = [
        Phase(Entropy(), ["coefficients"], 0.25),
        Phase(RepresentationL1(), ["correction"], 0.25),
        Phase(PseudoLabels(), ["heads"], 0.25),
        Phase(Divergence(), ["coefficients", "heads"]),
    ]
    module = Followed(TinySuite(vit=True), correction=Surgery(rank=3), phases=phases)
    adapt(steps=8, module=module)
    assert module.moves == [
        *[["coefficients"]] * 2, *[["correction"]] * 2, *[["heads"]] * 2, *[["coefficients", "heads"]] * 2,
    ]  # fmt: skip


def test_weight_decay_and_momentum_stop_with_the_phase(adapt):
    module = Followed(TinySuite(vit=True), **surgery(), optimizer=lambda params: torch.optim.AdamW(params, lr=1e-2))
    adapt(steps=6, module=module)
    assert module.moves == [*[["coefficients"]] * 3, *[["correction"]] * 3]


def test_what_is_frozen_computes_as_in_evaluation(adapt):
    """No dropout in a router that has learned; validation on the way changes nothing."""

    def run(**trainer):
        torch.manual_seed(0)
        phases = [Phase(TaskIdentity(), ["router"], 0.5), Phase(Entropy(), ["coefficients"])]
        router = FeatureRouter(dropout=0.5, scope="mlp")
        return adapt(steps=8, suite=TinySuite(vit=True), router=router, phases=phases, trainer=trainer)[0]

    plain, validated = run(), run(val_check_interval=3, limit_val_batches=1.0)
    assert not plain.router.training
    for name, value in values(plain).items():
        assert torch.equal(values(validated)[name], value)


def test_learning_rates_by_part(adapt):
    """Adam's first step is as long as its learning rate."""
    rates = {"router": 1e-2, "heads": 1e-5}
    module = Followed(
        TinySuite(vit=True), router=BlockRouter(), learn=["coefficients", "router", "heads"], learning_rates=rates
    )
    adapt(steps=1, module=module)
    for part, rate in {"coefficients": 1e-3, **rates}.items():
        steps = [(p - module.before[n]).abs().max().item() for n, p in module.learned() if n.startswith(part)]
        assert max(steps) == pytest.approx(rate, rel=0.05), part


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"learn": ["router"]}, "'router' cannot learn: this run has no router"),
        ({"learn": ["weights"]}, "'weights' cannot learn: parts are coefficients, elements, router, correction, heads"),
        ({"learn": []}, "learn is empty: name some of coefficients, heads"),
        ({"learning_rates": {"head": 0.1}}, "learning_rates has 'head': parts are"),
    ],
)
def test_a_wrong_list_of_parts_is_refused(kwargs, message):
    with pytest.raises(InputError, match=message):
        Adaptation(TinySuite(), **kwargs).configure_model()


def test_objective_and_phases_are_one_too_many():
    with pytest.raises(InputError, match="give objective, learn and program, or phases, not both"):
        Adaptation(TinySuite(), objective=Entropy(), phases=[Phase(Entropy())])


def test_what_the_backbone_lacks_is_said_before_a_step():
    with pytest.raises(InputError, match="MLP has no stack of blocks"):
        Adaptation(TinySuite(), objective=RepresentationL1(blocks=True)).configure_model()


@pytest.mark.parametrize("micro", [False, True])
def test_a_phase_that_cannot_teach_says_so(adapt, micro):
    phases = [Phase(Entropy(), ["coefficients"], 0.5), Phase(RepresentationL1(), ["heads"])]
    with pytest.raises(InputError, match=r"^heads cannot learn from RepresentationL1, which does not depend on it"):
        adapt(steps=2, phases=phases, micro_batches=micro)


# -- going on ------------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings(EXISTS)
@pytest.mark.parametrize("blocks", [False, True], ids=["surgery", "surgery of blocks"])
@pytest.mark.parametrize("at", [4, 10, 15], ids="saved at {}".format)
def test_resuming_in_any_phase_goes_on_bit_for_bit(adapt, tmp_path, at, blocks):
    suite = TinySuite(vit=True)
    whole, _ = adapt(steps=20, suite=suite, **surgery(blocks))
    keep = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=at, save_top_k=-1)
    adapt(steps=20, suite=suite, callbacks=[keep], **surgery(blocks))
    path = tmp_path / f"step={at}.ckpt"
    assert torch.load(path, weights_only=True)["global_step"] == at
    resumed, _ = adapt(steps=20, suite=suite, ckpt_path=str(path), callbacks=[keep], **surgery(blocks, seed=1))
    for name, value in values(whole).items():
        assert torch.equal(values(resumed)[name], value), name


@pytest.mark.filterwarnings(EXISTS)
def test_resuming_draws_the_same_dropout(adapt, tmp_path):
    def twin():
        torch.manual_seed(7)
        return {"router": FeatureRouter(), "learn": ["router"], "objective": TaskIdentity()}

    whole, _ = adapt(steps=9, **twin())
    _, trainer = adapt(steps=4, **twin())
    trainer.save_checkpoint(tmp_path / "part.ckpt")
    arguments = twin()
    resumed, _ = adapt(steps=9, ckpt_path=str(tmp_path / "part.ckpt"), **arguments)
    for name, value in values(whole).items():
        assert torch.equal(values(resumed)[name], value), name


@pytest.mark.filterwarnings(EXISTS)
def test_a_longer_run_keeps_its_first_boundary(adapt, tmp_path):
    _, trainer = adapt(steps=10, suite=TinySuite(vit=True), **surgery(share=0.4))
    trainer.save_checkpoint(tmp_path / "short.ckpt")
    module = Followed(TinySuite(vit=True), **surgery(share=0.4))
    adapt(steps=30, module=module, ckpt_path=str(tmp_path / "short.ckpt"))
    assert module.ends() == [4, 30]
    assert module.moves == [["correction"]] * 20


def test_a_checkpoint_of_other_phases_is_not_resumed(adapt, tmp_path):
    _, trainer = adapt(steps=2, phases=[Phase(Entropy(), share=0.5), Phase(Entropy())])
    trainer.save_checkpoint(tmp_path / "two.ckpt")
    with pytest.raises(InputError, match="a run of 2 phases, this one has 1"):
        adapt(steps=4, ckpt_path=str(tmp_path / "two.ckpt"))


def test_a_second_run_of_one_module_looks_up_what_it_needs(adapt):
    """The first one's tables hold three steps' images, the second one needs those of twelve."""
    both, fresh = (Followed(TinySuite(vit=True), **surgery()) for _ in range(2))
    adapt(steps=3, module=both)
    fresh.configure_model()
    fresh.load_state_dict(both.state_dict())
    adapt(steps=12, module=both)
    adapt(steps=12, module=fresh)
    assert both.ends() == [6, 12]
    for name, value in values(fresh).items():
        assert torch.equal(values(both)[name], value), name


# -- known vectors -------------------------------------------------------------------------------------------------

LOOKED_UP = {
    "features": lambda: {"correction": Surgery(rank=3), "learn": ["correction"], "objective": RepresentationL1()},
    "features under heads": lambda: {"learn": ["heads"], "objective": PseudoLabels()},
    "features of a routed model": lambda: {
        "router": BlockRouter(per="batch"), "learn": ["heads"], "objective": Entropy(),
    },
    "features of a task's own block": lambda: {
        "correction": TaskBlock(),
        "phases": [Phase(Entropy(), ["correction"], 0.5), Phase(PseudoLabels(), ["heads"])],
    },
    "features of a trained router": lambda: {
        "router": FeatureRouter(),
        "phases": [Phase(TaskIdentity(), ["router"], 0.5), Phase(Entropy(), ["heads"])],
    },
    "shared features": lambda: {"router": FeatureRouter(), "learn": ["router"], "objective": TaskIdentity()},
    "nothing, two objectives": lambda: {
        "router": FeatureRouter(), "learn": ["heads"], "objective": Sum([Entropy(), TaskIdentity()]),
    },
}  # fmt: skip


@pytest.mark.parametrize("turns", [None, 1], ids=["all tasks", "a task a step"])
@pytest.mark.parametrize("micro", [False, True], ids=["one forward", "micro-batches"])
@pytest.mark.parametrize("name", LOOKED_UP)
def test_looking_up_is_computing(adapt, monkeypatch, name, micro, turns):
    """30 images a task in batches of 4: look-ups cross epochs, and tables are filled in chunks of other sizes."""

    def run():
        torch.manual_seed(3)
        module = Followed(TinySuite(images=30, vit=True), **LOOKED_UP[name](), micro_batches=micro)
        adapt(steps=12, module=module, stream=Stream(4, eval_batch_size=7, tasks_per_step=turns))
        return module

    fast = run()
    assert fast.known.has("merged") or fast.known.has("shared") or name.startswith("nothing")
    monkeypatch.setattr(Adaptation, "_looks_up", lambda self, phase: None)
    slow = run()
    assert not slow.known.has("merged")
    assert not slow.known.has("shared")
    torch.testing.assert_close(torch.stack(fast.seen), torch.stack(slow.seen), rtol=0, atol=1e-6, equal_nan=True)
    for key, value in values(slow).items():
        # A gradient that is nothing but rounding makes Adam move, by its whole rate, in either direction.
        torch.testing.assert_close(values(fast)[key], value, rtol=0, atol=2e-5 if "heads" in key else 1e-3)


class Counting(Dataset):
    """Counts the images that are taken from a data set."""

    def __init__(self, dataset: Dataset) -> None:
        self.dataset, self.labels, self.count = dataset, dataset.labels, 0

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int):
        self.count += 1
        return self.dataset[index]


class CountedSuite(TinySuite):
    def dataset(self, task, split):
        self.sets = getattr(self, "sets", {})
        if (task, split) not in self.sets:
            self.sets[task, split] = Counting(super().dataset(task, split))
        return self.sets[task, split]

    def decoded(self) -> int:
        return sum(data.count for data in self.sets.values())


def test_steps_that_look_up_decode_no_image(adapt):
    """23 images a task: 10 steps of 4 would decode 120; the tables take every image once for each of two models."""
    suite = CountedSuite(vit=True)
    adapt(steps=10, suite=suite, correction=Surgery(rank=3), learn=["correction"], objective=RepresentationL1())
    assert suite.decoded() == 2 * 3 * 23 + 1  # and one for the shapes inside the model
    suite = CountedSuite()
    adapt(steps=10, suite=suite, router=FeatureRouter(scope="linear"), learn=["router"], objective=TaskIdentity())
    assert suite.decoded() == 3 * 23
    suite = CountedSuite()
    adapt(steps=2, suite=suite)
    assert suite.decoded() == 2 * 3 * 4


@pytest.mark.parametrize("workers", [0, 2])
def test_workers_and_accumulation_change_nothing(adapt, workers):
    plain, _ = adapt(steps=8, suite=TinySuite(vit=True), **surgery(), trainer={"accumulate_grad_batches": 2})
    stream = Stream(batch_size=4, num_workers=workers)
    other, _ = adapt(
        steps=8, suite=TinySuite(vit=True), **surgery(), trainer={"accumulate_grad_batches": 2}, stream=stream
    )
    for name, value in values(plain).items():
        assert torch.equal(values(other)[name], value)


@pytest.mark.parametrize("blocks", [False, True])
def test_the_teacher_is_the_expert(adapt, blocks):
    suite = TinySuite(vit=True)
    module, _ = adapt(steps=6, suite=suite, objective=RepresentationL1(blocks))
    for task in suite.tasks:
        expert, means = suite.backbone(), []
        expert.load_state_dict(suite.task_vectors().expert(task))
        for block in expert.blocks if blocks else ():
            block.register_forward_hook(lambda block, args, tokens, means=means: means.append(tokens.mean(1)))
        index = looked_up(module, task)
        features = expert(suite.dataset(task, "test").batch(index)[0])
        found = module.known("expert", task, {"index": index})
        torch.testing.assert_close(found, [features, *means], rtol=0, atol=1e-6)


def looked_up(module: Adaptation, task: str) -> torch.Tensor:
    """The images of a task that the first six steps take."""
    steps = StreamSteps({t: module.suite.dataset(t, "test") for t in module.suite.tasks}, 4, 0)
    return torch.cat([steps.indices(task, step) for step in range(6)])


def test_the_teacher_has_the_original_experts_and_heads(adapt):
    """Whatever happens to the task vectors, and to the heads that learn."""
    suite = TinySuite()
    module, _ = adapt(
        steps=6,
        suite=suite,
        transforms=[Prune(0.1)],
        objective=PseudoLabels(),
        learn=["coefficients", "heads"],
        learning_rates={"heads": 1.0},
    )
    experts = ExpertOutputs(suite, False, torch.device("cpu"))
    index = looked_up(module, "two")
    images, _ = suite.dataset("two", "test").batch(index)
    found = module.known("expert", "two", {"index": index})
    torch.testing.assert_close(found[0], experts("two", images)[0], rtol=0, atol=1e-6)
    assert torch.equal(module.teachers["two"].weight, suite.head("two").weight)
    assert not torch.equal(module.heads["two"].weight, suite.head("two").weight)
