"""The axes of a method combine freely: a walk through their product, two steps each, on a transformer of two blocks."""

from functools import cache
from itertools import combinations, product

import pytest
import torch
from tiny_suite import TinySuite

from adamerge import InputError
from adamerge.deltas import dense
from adamerge.rules import ComPeft, ElectSign, Emr, Merged, Prune, Rebase, Trim, TruncatedSVD
from modules import (
    BlockRouter,
    Coefficients,
    Divergence,
    Diversity,
    Entropy,
    FeatureRouter,
    PseudoLabels,
    RepresentationL1,
    Sum,
    Supervised,
    Surgery,
    TaskBlock,
    TaskIdentity,
)
from trainers import Stream
from trainers.adaptation import Adaptation

TRANSFORMS = {
    "as they are": list,
    "trim, elect": lambda: [Trim(0.5), ElectSign()],
    "svd": lambda: [TruncatedSVD(0.25)],
    "prune": lambda: [Prune(0.5)],
    "rebase, svd": lambda: [Rebase(), TruncatedSVD(0.25)],
    "merged": lambda: [Merged([Trim(0.5), ElectSign()])],
    "emr": lambda: [Emr()],
    "signs": lambda: [ComPeft(0.5)],
}
COEFFICIENTS = {
    "tensor": lambda: Coefficients("tensor"),
    "block, clamp": lambda: Coefficients("block", "clamp"),
    "model, softmax": lambda: Coefficients("model", "softmax"),
    "tensor, sigmoid": lambda: Coefficients("tensor", "sigmoid"),
    "column": lambda: Coefficients("column", init="mean"),
    "tensor, simplex": lambda: Coefficients("tensor", "simplex"),
    "column, tanh, some": lambda: Coefficients("column", "tanh", only="pos|weight"),
}
ROUTERS = {
    "no router": lambda: None,
    "depth 0": lambda: BlockRouter(depth=0),
    "depth 1": lambda: BlockRouter(depth=1, pool="before"),
    "depth 2": lambda: BlockRouter(),
    "shared": lambda: BlockRouter(shared=True),
    "per batch": lambda: BlockRouter(per="batch"),
    "features": lambda: FeatureRouter(),
    "features, hard": lambda: FeatureRouter(hard=True, scope="mlp"),
}
CORRECTIONS = {
    "no correction": lambda: None,
    "surgery": lambda: Surgery(rank=3),
    "surgery of blocks": lambda: Surgery(rank=3, blocks=True),
    "task block": lambda: TaskBlock(),
}
OBJECTIVES = {
    "entropy": lambda: Entropy(),
    "entropy, filtered": lambda: Entropy(below=0.9),
    "entropy, diversity": lambda: Sum([Entropy(), Diversity()]),
    "pseudo-labels": lambda: PseudoLabels(filter=True),
    "kl": lambda: Divergence("kl", temperature=2.0),
    "js": lambda: Divergence(),
    "l1": lambda: RepresentationL1(),
    "l1 of blocks": lambda: RepresentationL1(blocks=True),
    "task identity": lambda: TaskIdentity(),
    "task identity, entropy": lambda: Sum([Entropy(), TaskIdentity()]),
    "labels": lambda: Supervised(),
}
HEADS = ("heads fixed", "heads learn")
MICRO = ("one forward", "micro-batches")
TURNS = ("all tasks", "a task a step")
PERMISSION = ("no labels allowed", "labels allowed")

#: The part of the product that is walked in full ...
CORE = (ROUTERS, CORRECTIONS, OBJECTIVES)
#: ... and the axes of which every value meets every value of every other axis.
OTHERS = (TRANSFORMS, COEFFICIENTS, HEADS, MICRO, TURNS, PERMISSION)


@cache
def walk() -> tuple[tuple[str, ...], ...]:
    """Every cell of the core once, with the values of the other axes that make the most pairs for the first time."""
    seen: dict[tuple[int, str, int, str], int] = {}

    def pairs(case: tuple[str, ...]) -> list[tuple[int, str, int, str]]:
        return [(i, case[i], j, case[j]) for i, j in combinations(range(len(case)), 2) if j >= len(CORE)]

    cases, others = [], list(product(*OTHERS))
    for number, cell in enumerate(product(*CORE)):
        some = others[number % 7 :: 7]
        case = min((cell + rest for rest in some), key=lambda case: sum(min(seen.get(p, 0), 3) for p in pairs(case)))
        for pair in pairs(case):
            seen[pair] = seen.get(pair, 0) + 1
        cases.append(case)
    return tuple(cases)


def wrong(router: str, correction: str, objective: str, heads: str, permission: str) -> str | None:
    """Why a combination is none: a pattern of the sentence."""
    if objective == "labels" and permission == "no labels allowed":
        return "^Supervised needs labels; set allow_labels"
    if objective.startswith("task identity") and not router.startswith("features"):
        return "needs a router that knows tasks, such as modules.FeatureRouter$"
    if objective == "task identity" and correction != "no correction":
        return "^correction cannot learn from TaskIdentity, .* has one too many$"
    if router == "features" and correction == "task block":
        return "^every layer of block .* is routed: nothing is left for a task to change$"
    if objective in ("l1", "l1 of blocks", "task identity") and heads == "heads learn":
        return "^heads cannot learn from (RepresentationL1|TaskIdentity), .* has one too many$"
    return None


def method(case: tuple[str, ...]) -> dict:
    """The arguments of a combination."""
    router, correction, objective, transforms, coefficients, heads, micro, _, permission = case
    kwargs = {"transforms": TRANSFORMS[transforms](), "coefficients": COEFFICIENTS[coefficients]()}
    kwargs |= {"router": ROUTERS[router](), "correction": CORRECTIONS[correction]()}
    parts = [part for part in ("coefficients", "router", "correction") if kwargs.get(part) is not None]
    kwargs["learn"] = [*parts, "heads"] if heads == "heads learn" else None
    kwargs |= {"objective": OBJECTIVES[objective](), "micro_batches": micro == "micro-batches"}
    return kwargs | {"allow_labels": permission == "labels allowed"}


def frozen(module: Adaptation) -> dict[str, torch.Tensor]:
    """Every tensor that no method may change."""
    inside = module.merged._frozen
    state = {f"base.{name}": value for name, value in inside.model.state_dict().items()}
    state |= {f"delta.{name}": dense(delta) for name, delta in inside.deltas.items()}
    state |= {f"teacher.{task}": head.weight for task, head in module.teachers.items()}
    learned = {name for name, _ in module.learned()}
    return state | {name: p for name, p in module.named_parameters() if name not in learned}


def constant(case: tuple[str, ...]) -> set[str]:
    """Parts that change nothing: shares that sum to one, of equal task vectors."""
    return {"coefficients"} if case[3] == "merged" and case[4].endswith("softmax") else set()


class Followed(Adaptation):
    """Keeps the losses and the parts whose gradient is not zero."""

    def training_step(self, batch, batch_idx):
        outputs = super().training_step(batch, batch_idx)
        self.seen = [*getattr(self, "seen", []), outputs["losses"]]
        return outputs

    def on_before_optimizer_step(self, optimizer):
        super().on_before_optimizer_step(optimizer)
        grads = {name: p.grad for name, p in self.learned() if p.grad is not None}
        assert all(bool(grad.isfinite().all()) for grad in grads.values())
        self.moving = getattr(self, "moving", set()) | {n.split(".")[0] for n, grad in grads.items() if grad.any()}


def run(adapt, case: tuple[str, ...]) -> None:
    """Two steps of a valid combination."""
    kwargs = method(case)
    module = Followed(TinySuite(images=12, vit=True), **kwargs)
    module.configure_model()
    fixed = {name: value.detach().clone() for name, value in frozen(module).items()}
    start = {name: p.detach().clone() for name, p in module.learned()}
    one = case[7] == "a task a step"
    adapt(steps=2, module=module, stream=Stream(4, tasks_per_step=1 if one else None))
    losses = torch.stack(module.seen)
    assert torch.equal(losses.isfinite().sum(1), torch.full((2,), 1 if one else 3))
    parts = {name.split(".")[0] for name in start}
    assert parts == set(kwargs["learn"] or [p for p in ("coefficients", "router", "correction") if kwargs[p]])
    moved = {name.split(".")[0] for name, p in module.learned() if not torch.equal(p, start[name])}
    assert moved == module.moving
    # All images may be filtered out of a batch, or all may be above a threshold: a gradient of zero.
    assert moved == parts or case[2] in ("entropy, filtered", "pseudo-labels") or moved == parts - constant(case)
    now = frozen(module)
    assert now.keys() == fixed.keys()
    assert [name for name, value in now.items() if not torch.equal(value, fixed[name])] == []


@pytest.mark.parametrize("correction", CORRECTIONS)
@pytest.mark.parametrize("router", ROUTERS)
def test_every_combination_runs_or_says_why_not(adapt, router, correction):
    """In full: routers × corrections × objectives; the other axes in turn, such that all pairs of values come."""
    for case in walk():
        if case[:2] != (router, correction):
            continue
        _, _, objective, _, _, heads, _, _, permission = case
        why = wrong(router, correction, objective, heads, permission)
        try:
            if why is None:
                run(adapt, case)
            else:
                with pytest.raises(InputError, match=why):
                    adapt(steps=2, suite=TinySuite(images=12, vit=True), **method(case))
        except BaseException as error:
            error.add_note(f"the combination: {', '.join(case)}")
            raise


def test_the_walk_meets_every_pair_of_values():
    axes = [*CORE, *OTHERS]
    for i, j in combinations(range(len(axes)), 2):
        assert {(case[i], case[j]) for case in walk()} == set(product(axes[i], axes[j]))


EACH = [*product(ROUTERS, ["no correction"]), *product(["no router", "depth 2"], list(CORRECTIONS)[1:])]


@pytest.mark.parametrize("objective", ["entropy, diversity", "l1 of blocks"])
@pytest.mark.parametrize(("router", "correction"), EACH)
def test_micro_batches_are_one_forward(adapt, monkeypatch, router, correction, objective):
    """After three steps of SGD, so that corrections are no longer the identity."""
    monkeypatch.setitem(ROUTERS, "features", lambda: FeatureRouter(dropout=0.0, scope="linear"))
    monkeypatch.setitem(ROUTERS, "features, hard", lambda: FeatureRouter(hard=True, scope="mlp", dropout=0.0))
    values = []
    for micro in MICRO:
        torch.manual_seed(0)
        case = (router, correction, objective, "as they are", "tensor", "heads fixed", micro, "all tasks", "")
        kwargs = method(case) | {"optimizer": lambda params: torch.optim.SGD(params, lr=0.05)}
        module, _ = adapt(steps=3, suite=TinySuite(images=12, vit=True), **kwargs)
        values.append({name: p.detach() for name, p in module.learned()})
    assert values[0].keys() == values[1].keys()
    for name, value in values[0].items():
        torch.testing.assert_close(values[1][name], value, rtol=0, atol=2e-6)
