"""Frank-Wolfe on coefficients: its corners by hand, the minimum of a quadratic, resumption, and what it refuses."""

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from tiny_suite import TinySuite
from torch.testing import assert_close

from adamerge import InputError
from modules import Coefficients, Entropy, Supervised
from modules.bounds import project
from trainers import Adaptation, FrankWolfe, Stream
from trainers.streams import StreamSteps

TASKS = ("a", "b", "c")


def rows(values, bound: str = "simplex") -> Coefficients:
    return Coefficients("tensor", bound, torch.tensor(values)).bind([str(i) for i in range(len(values))], TASKS)


def test_steps_by_hand():
    """λ ← (1 − γ) λ + γ e_s with γ = 1, 2/3, 1/2, each row to its own corner."""
    coefficients = rows([[0.2, 0.3, 0.5], [0.4, 0.4, 0.2]])
    optimizer = FrankWolfe(coefficients.parameters())
    seen = []
    for grads in ([[3, -1, 2], [1, 2, 3]], [[-5, 0, 0], [0, 1, -1]], [[1, 1, 0], [0, -2, 0]]):
        optimizer.zero_grad()
        (coefficients() * torch.tensor(grads)).sum().backward()
        optimizer.step()
        seen.append(coefficients().tolist())
    assert seen[0] == [[0, 1, 0], [1, 0, 0]]
    assert_close(torch.tensor(seen[1]), torch.tensor([[2 / 3, 1 / 3, 0], [1 / 3, 0, 2 / 3]]))
    assert_close(torch.tensor(seen[2]), torch.tensor([[1 / 3, 1 / 6, 1 / 2], [1 / 6, 1 / 2, 1 / 3]]))


@pytest.mark.parametrize("grad", [[0.0, 0.0, 0.0], [2.0, 2.0, 2.0], [1.0, 2.0, 0.5]])
def test_a_row_stays_where_no_corner_is_better(grad):
    coefficients = rows([[0, 0, 1.0]])
    (coefficients() * torch.tensor([grad])).sum().backward()
    FrankWolfe(coefficients.parameters()).step()
    assert coefficients().tolist() == [[0, 0, 1]]


@pytest.mark.parametrize(
    ("bound", "base", "nearest"),
    [
        ("simplex", False, lambda p: project(p[None])[0]),
        ("none", False, lambda p: project(p[None])[0]),
        ("clamp", True, lambda p: p.clamp(min=0)),  # its positive entries sum to less than one
    ],
)
def test_it_finds_the_nearest_point_of_the_hull(bound, base, nearest):
    """Of ‖λ − p‖²; after t steps the loss is at most 2 · curvature · diameter² / (t + 2) above the least."""
    target = torch.tensor([0.5, -0.2, 0.1])
    coefficients = rows([[0.25, 0.25, 0.5]], bound)
    optimizer, goal = FrankWolfe(coefficients.parameters(), base=base), nearest(target)
    for _ in range(2000):
        optimizer.zero_grad()
        (coefficients() - target).square().sum().backward()
        optimizer.step()
    loss, least = ((x - target).square().sum() for x in (coefficients()[0].detach(), goal))
    assert least - 1e-6 <= loss <= least + 2 * 2 * 2 / 2002
    assert_close(coefficients()[0].detach(), goal, rtol=0, atol=0.02)


def test_a_constant_step():
    coefficients = rows([[0.2, 0.3, 0.5]])
    (coefficients() * torch.tensor([[0.0, -1.0, 0.0]])).sum().backward()
    FrankWolfe(coefficients.parameters(), step=0.5).step()
    assert_close(coefficients(), torch.tensor([[0.1, 0.65, 0.25]]))


@pytest.mark.parametrize(
    ("coefficients", "kwargs"),
    [
        (lambda: Coefficients("tensor"), {"init": 0.9}),
        (lambda: Coefficients("tensor", "softmax"), {}),
        (lambda: Coefficients("tensor", "sigmoid"), {}),
        (lambda: Coefficients("tensor", "none", 0.2), {}),
    ],
)
def test_other_coefficients_are_refused(coefficients, kwargs):
    with pytest.raises(InputError, match="give them bound simplex, and let nothing else learn"):
        FrankWolfe(coefficients().bind(["w"], TASKS, **({"scale": 0.9} if kwargs else {})).parameters())


def test_other_parts_and_other_steps_are_refused(adapt):
    with pytest.raises(InputError, match="let nothing else learn"):
        adapt(coefficients=Coefficients("tensor", "simplex"), learn=["coefficients", "heads"], optimizer=FrankWolfe)
    with pytest.raises(InputError, match=r"step in \(0, 1\], got 2"):
        FrankWolfe(rows([[0.2, 0.3, 0.5]]).parameters(), step=2)
    FrankWolfe(rows([[0.2, 0.3, 0.1]], "clamp").parameters(), base=True)


def test_the_first_step_takes_every_tensor_of_the_expert_that_the_gradient_points_to(adapt):
    """⟨∂L/∂θ_l, τ_lk⟩ is taken at the mean of the experts, by autograd on the weights themselves."""
    suite = TinySuite()
    kwargs = {"objective": Supervised(), "allow_labels": True, "optimizer": FrankWolfe}
    module, _ = adapt(
        1, coefficients=Coefficients("tensor", "simplex"), stream=Stream(4, train_split="train"), **kwargs
    )
    vectors, state = suite.task_vectors(), module.merged.merged_state_dict()
    weights = {name: (base + vectors.deltas[name].mean(0)).requires_grad_() for name, base in vectors.base.items()}
    steps = StreamSteps({task: suite.dataset(task, "train") for task in suite.tasks}, 4, 0, labels=True)
    reference = Adaptation(suite)
    reference.configure_model()
    loss = 0
    for task, part in steps[0].items():
        features = torch.func.functional_call(suite.backbone(), weights, (part["images"],))
        loss = loss + torch.nn.functional.cross_entropy(reference.heads[task](features), part["labels"])
    chosen = set()
    for name, grad in zip(weights, torch.autograd.grad(loss, list(weights.values())), strict=True):
        expert = int((grad * vectors.deltas[name]).flatten(1).sum(1).argmin())
        assert_close(state[name], vectors.expert(suite.tasks[expert])[name])
        chosen.add(expert)
    assert len(chosen) > 1


@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")
def test_a_resumed_run_ends_where_an_undisturbed_one_ends(adapt, tmp_path):
    kwargs = {"optimizer": FrankWolfe, "objective": Entropy()}

    def coefficients() -> Coefficients:
        return Coefficients("tensor", "simplex")

    saving = ModelCheckpoint(tmp_path, every_n_train_steps=3, save_top_k=-1, filename="{step}")
    whole, _ = adapt(6, coefficients=coefficients(), callbacks=[saving], **kwargs)
    where = str(tmp_path / "step=3.ckpt")
    again, _ = adapt(6, coefficients=coefficients(), callbacks=[saving], ckpt_path=where, **kwargs)
    assert torch.equal(whole.coefficients(), again.coefficients())
