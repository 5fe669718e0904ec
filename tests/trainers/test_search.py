"""Searches find known optima without a backward pass, stop by themselves and resume exactly."""

import json
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from tiny_suite import TinySuite

from adamerge import InputError, merge
from adamerge.rules import ElectSign, Merged, Trim
from modules import Coefficients, Entropy, GivenTask, Mistakes, Objective, Surgery
from trainers import CMAES, M2N2, MAP, AdaMMS, Adaptation, GridSearch, Joint, LMCocktail, Static, Stream, evolution
from trainers.evolution import attraction, competition, crossover
from trainers.pareto import Quadratic, undominated
from trainers.phases import Phase
from trainers.report import Report

#: By name: a search, the coefficients that it suits, and the steps after which a run of six ends.
SEARCHES = {
    "cma_es": (lambda: CMAES(population=4), {"grain": "model", "bound": "clamp"}, 6),
    "cma_es, diagonal": (lambda: CMAES(population=4), {"grain": "tensor", "bound": "softmax"}, 6),
    "adamms": (lambda: AdaMMS(batches=4), {"grain": "model"}, 4),
    "grid": (lambda: GridSearch(batches=4), {"grain": "model"}, 4),
    "lm_cocktail": (lambda: LMCocktail(base=True, batches=4), {"grain": "block"}, 4),
    "map": (lambda: MAP(points=5, batches=4), {"grain": "model"}, 5),
    "m2n2": (lambda: M2N2(population=5, children=2, batches=5), {"grain": "tensor"}, 5),
}


@pytest.fixture(params=SEARCHES)
def search(request, monkeypatch):
    program, coefficients, steps = SEARCHES[request.param]
    if "diagonal" in request.param:
        monkeypatch.setattr(evolution, "_MANY", 5)
    return lambda: {"program": program(), "coefficients": Coefficients(**coefficients)}, steps


class Bowl(Objective):
    """‖λ − target_t‖², a mean over groups, whatever the images."""

    def __init__(self, *targets: list[float]) -> None:
        super().__init__()
        self.targets = torch.tensor(targets)

    def forward(self, view):
        values = view._pass.merged.coefficients()
        target = self.targets[view.number % len(self.targets)]
        return (values - target).square().sum(1).mean().expand(len(view.part["images"]))


class ForwardAlone(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        raise RuntimeError("no way back")


class OneWaySuite(TinySuite):
    def backbone(self):
        model = super().backbone()
        model.register_forward_hook(lambda module, args, output: ForwardAlone.apply(output))
        return model


def state(module) -> list:
    return [module.coefficients.raw.detach(), *module.phases[0].stepper.state_dict().values()]


def same(one, other) -> bool:
    alike = (torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b for a, b in zip(one, other, strict=True))
    return all(alike)


# -- what all searches have in common ----------------------------------------------------------------------------------


def test_a_model_without_a_way_back_is_adapted(adapt, search):
    make, steps = search
    module, trainer = adapt(suite=OneWaySuite(), **make())
    assert trainer.global_step == steps
    assert not torch.equal(module.coefficients(), Adaptation(TinySuite(), make()["coefficients"]).merged.coefficients())
    with pytest.raises(RuntimeError, match="no way back"):
        adapt(suite=OneWaySuite(), program=Joint())


@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")
def test_a_search_resumes_bit_for_bit(adapt, search, tmp_path):
    make, steps = search
    whole, _ = adapt(**make())
    keep = ModelCheckpoint(tmp_path, save_last=True, every_n_train_steps=3)
    adapt(steps=3, callbacks=[keep], **make())
    resumed, trainer = adapt(ckpt_path=str(tmp_path / "last.ckpt"), callbacks=[keep], **make())
    assert trainer.global_step == steps
    assert same(state(whole), state(resumed))


def test_a_complete_search_stands_still_when_resumed(adapt, tmp_path):
    module, trainer = adapt(program=LMCocktail(batches=2))
    trainer.save_checkpoint(tmp_path / "end.ckpt")
    again, trainer = adapt(program=LMCocktail(batches=2), ckpt_path=str(tmp_path / "end.ckpt"))
    assert trainer.global_step == 3
    assert same(state(module), state(again))


def test_a_second_run_of_the_same_module_searches_anew(adapt, search):
    make, steps = search
    module, _ = adapt(**make())
    before = module.phases[0].stepper.state_dict()["steps"]
    _, trainer = adapt(module=module)
    assert (trainer.global_step, module.phases[0].stepper.state_dict()["steps"]) == (steps, before)


def test_a_phase_follows_a_search_that_is_complete(adapt):
    phases = [Phase(Entropy(), ["coefficients"], 0.5, LMCocktail()), Phase(Entropy(), ["coefficients"])]
    after_search, trainer = adapt(steps=2, phases=phases)
    module, trainer = adapt(steps=8, phases=phases)
    assert trainer.global_step == 8
    assert not torch.equal(module.coefficients.raw, after_search.coefficients.raw)


def test_micro_batches_score_alike(adapt):
    one, other = (adapt(program=LMCocktail(), micro_batches=micro)[0] for micro in (False, True))
    torch.testing.assert_close(one.coefficients(), other.coefficients())


def test_a_run_that_ends_early_is_reported(adapt, tmp_path):
    report = Report(every=10, references=False)
    adapt(steps=50, callbacks=[report], program=MAP(points=4, batches=2))
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["steps"] == 3
    assert sorted(report.snapshots.values) == sorted(report.accuracies) == [0, 3]
    assert {"pareto_front.png", "coefficients.png"} <= {path.name for path in (tmp_path / "figures").iterdir()}


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: {"program": CMAES(), "learn": ["heads"]}, r"CMAES moves the coefficients alone.*not \['heads'\]"),
        (lambda: {"program": CMAES(), "correction": Surgery(2)}, r"set learn to \[coefficients\]"),
        (
            lambda: {"program": M2N2(), "coefficients": Coefficients(bound="softmax")},
            "M2N2 needs coefficients of bound none or clamp, not softmax",
        ),
        (lambda: {"program": AdaMMS(path="interpolation")}, "between two experts, not 3"),
        (
            lambda: {"program": AdaMMS([0.0, 1.0, 2.0]), "coefficients": Coefficients(bound="clamp")},
            r"leaves \[0, 1\]",
        ),
        (lambda: {"program": MAP(preference={"four": 1.0})}, "preference names 'four'; tasks are one, two, three"),
        (lambda: {"program": MAP(preference={"one": -1.0})}, "weights of at least 0"),
        (lambda: {"program": MAP(high=2.0), "coefficients": Coefficients(bound="clamp")}, r"high 2\.0 leaves"),
        (lambda: {"program": CMAES(), "trainer": {"accumulate_grad_batches": 2}}, "CMAES takes whole batches"),
        (lambda: {"program": MAP(), "stream": Stream(4, tasks_per_step=1)}, "leave tasks_per_step out"),
    ],
)
def test_runs_that_a_search_does_not_suit(adapt, make, message):
    with pytest.raises(InputError, match=message):
        adapt(**make())


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: CMAES(sigma=0), "sigma > 0"),
        (lambda: CMAES(population=3), "population of 4 or more"),
        (lambda: AdaMMS([0.0, 1.0]), "three numbers in rising order"),
        (lambda: AdaMMS([0.0, 2.0, 1.0]), "rising order"),
        (lambda: AdaMMS(batches=0), "at least one batch"),
        (lambda: LMCocktail(temperature=0), "temperature must be positive"),
        (lambda: MAP(merges=1), "needs two merges"),
        (lambda: M2N2(population=1), "population of two"),
    ],
)
def test_impossible_settings(make, message):
    with pytest.raises(InputError, match=message):
        make()


# -- each for itself ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("grain", "many", "steps"), [("model", 100, 50), ("tensor", 5, 80)], ids=["full", "diagonal"])
def test_cma_es_finds_the_bottom_of_a_bowl(adapt, monkeypatch, grain, many, steps):
    monkeypatch.setattr(evolution, "_MANY", many)
    target = torch.tensor([0.5, 0.1, -0.2])
    module, _ = adapt(steps=steps, program=CMAES(), objective=Bowl(target.tolist()), coefficients=Coefficients(grain))
    assert float((module.coefficients() - target).abs().max()) < 0.02


def test_cma_es_keeps_the_mean_and_not_the_best(adapt):
    program = CMAES()
    module, _ = adapt(steps=5, program=program, objective=Bowl([0.5, 0.1, -0.2]))
    torch.testing.assert_close(module.coefficients.raw.flatten().double(), torch.from_numpy(program._sampler.mean))


def test_cma_es_goes_on_with_its_own_population_only(adapt, tmp_path):
    _, trainer = adapt(steps=2, program=CMAES(population=5))
    trainer.save_checkpoint(tmp_path / "two.ckpt")
    with pytest.raises(InputError, match="another population than 6"):
        adapt(steps=4, program=CMAES(population=6), ckpt_path=str(tmp_path / "two.ckpt"))


def fake(k: int = 3) -> SimpleNamespace:
    """As much of a run as a search asks for whose scores are given."""
    coefficients = Coefficients("model").bind(["w"], "abc"[:k])
    return SimpleNamespace(coefficients=coefficients, suite=SimpleNamespace(tasks=tuple("abc"[:k]), scale=0.3))


def test_adamms_takes_the_merge_that_agrees_most_with_its_neighbours(monkeypatch):
    #          λ:   0             0.25          0.5           0.75          1
    classes = [[1, 1, 1, 1], [1, 1, 1, 1], [2, 2, 2, 2], [2, 2, 2, 3], [2, 2, 3, 3]]
    search, run = AdaMMS([0, 0.25, 0.5, 0.75, 1.0]), fake()
    monkeypatch.setattr(
        search, "score", lambda run, batch, point, of: {"a": torch.tensor(classes[round(4 * float(point))])}
    )
    search.step(run, {"a": {}})
    assert search.kept["apart"].tolist() == [0, 1, 0.25, 0.25]  # the first and last merge have one neighbour
    assert run.coefficients().tolist() == [[0.75] * 3]
    classes[1:3] = [[1, 1, 1, 2], [1, 2, 2, 2]]
    search.step(run, {"a": {}})
    assert search.kept["apart"].tolist() == [0.25, 1.5, 0.75, 0.5]  # batches add up
    assert run.coefficients().tolist() == [[0.75] * 3]


def test_adamms_interpolates_between_two(monkeypatch):
    search, run, seen = AdaMMS([0.2, 0.5, 1.0], "interpolation"), fake(2), []
    monkeypatch.setattr(search, "score", lambda run, batch, point, of: seen.append(point) or {"a": torch.zeros(2)})
    search.step(run, {"a": {}})
    torch.testing.assert_close(torch.stack(seen), torch.tensor([[0.8, 0.2], [0.5, 0.5], [0, 1]], dtype=torch.float64))
    assert run.coefficients().tolist() == [[0.5, 0.5]]


@pytest.mark.parametrize("base", [False, True])
def test_lm_cocktail_is_the_mean_of_the_tasks_own(monkeypatch, base):
    search, run = LMCocktail(temperature=0.5, base=base), fake()
    losses = torch.rand(2, 3 + base, 2, dtype=torch.float64)  # of batches, models and the two tasks seen
    rows = iter(losses.flatten(0, 1))
    monkeypatch.setattr(search, "score", lambda *_: dict(zip("ac", next(rows)[:, None], strict=True)))
    for _ in range(2):
        search.step(run, {"a": {}, "c": {}})
    each = (-losses.mean(0) / 0.5).exp()
    expected = (each / each.sum(0)).mean(1)[:3]
    torch.testing.assert_close(run.coefficients()[0].double(), expected)


def test_lm_cocktail_of_equals_is_their_mean(adapt):
    module, _ = adapt(program=LMCocktail(), objective=Bowl([0.2, 0.2, 0.2]))
    torch.testing.assert_close(module.coefficients(), torch.full((4, 3), 1 / 3))


def quadratic(t: int = 2, k: int = 3) -> Quadratic:
    roots = torch.randn(t, k, k, dtype=torch.float64)
    return Quadratic(
        torch.randn(t, dtype=torch.float64), torch.randn(t, k, dtype=torch.float64), roots @ roots.mT + torch.eye(k)
    )


def test_a_quadratic_is_found_from_its_values():
    true, points = quadratic(), 0.4 * torch.rand(20, 3, dtype=torch.float64)
    for fitted, given in zip(Quadratic.fit(points, true(points), 0.4), true, strict=True):
        torch.testing.assert_close(fitted, given)
    few = Quadratic.fit(points[:6], true(points[:6]), 0.4)  # of 10 numbers
    torch.testing.assert_close(few(points[:6]), true(points[:6]))


def test_weighted_sums_of_quadratics_are_minimised_within_the_box():
    surrogate = quadratic()
    weights = torch.tensor([[1.0, 0.0], [0.3, 0.7]], dtype=torch.float64)
    inside = surrogate._replace(slope=-(surrogate.curvature @ torch.full((3,), 0.5, dtype=torch.float64)))
    found = inside.minimise(weights, torch.rand(2, 3, dtype=torch.float64), 1.0)
    torch.testing.assert_close(found, torch.full_like(found, 0.5))
    found = surrogate.minimise(weights, torch.rand(2, 3, dtype=torch.float64), 1.0)
    lowest = (surrogate(torch.rand(4000, 3, dtype=torch.float64)) @ weights.T).amin(0)
    assert bool(((surrogate(found) * weights).sum(1) <= lowest).all())


def test_a_front_is_what_nothing_else_beats():
    losses = torch.tensor([[0.0, 3], [1, 1], [3, 0], [1, 2], [3, 3], [1, 1]])
    assert undominated(losses).tolist() == [True, True, True, False, False, True]


@pytest.mark.parametrize(("preference", "middle"), [({}, 1 / 3), ({"one": 4.0}, 4 / 6)])
def test_map_finds_the_best_trade_off(adapt, preference, middle):
    """Of bowls around the corners λ = e_t / 2, the optimum is their mean, weighted by the preference."""
    program = MAP(high=0.8, preference=preference, batches=2, points=8)
    corners = (0.5 * torch.eye(3)).tolist()
    module, trainer = adapt(program=program, objective=Bowl(*corners))
    assert trainer.global_step == 3
    rest = (1 - middle) / 2
    torch.testing.assert_close(module.coefficients()[0], 0.5 * torch.tensor([middle, rest, rest]), atol=1e-4, rtol=0)
    torch.testing.assert_close(program.kept["promised"], program.kept["true"], atol=1e-5, rtol=0)
    assert len(program.kept["front"]) == 9
    torch.testing.assert_close(program.kept["front"].sum(1), torch.full((9,), 0.5, dtype=torch.float64))


def test_images_are_shared_out():
    scores = torch.rand(4, 10, dtype=torch.float64)
    torch.testing.assert_close(competition(scores).sum(), torch.tensor(10.0, dtype=torch.float64))
    twins = competition(torch.cat([scores, scores[:1]]))
    assert twins[0] == twins[4] < competition(scores)[0]
    niche = torch.tensor([[1.0, 1, 1, 0], [1, 1, 1, 0], [0, 0, 0, 1]])  # what others cannot do is worth a life
    torch.testing.assert_close(competition(niche), torch.tensor([1.5, 1.5, 1.0]))


def test_what_attracts_is_strength_where_the_other_is_weak():
    scores = torch.tensor([[1.0, 0, 0.5], [1, 0, 0.5], [0, 1, 0.5], [0.5, 0.5, 0.5]])
    assert attraction(scores, 0).argsort(descending=True)[:2].tolist() == [2, 3]
    assert attraction(scores, 0)[:2].tolist() == [0, 0]


def test_children_mix_rows_on_both_sides_of_the_split():
    first, second = torch.zeros(5, 3), torch.ones(5, 3)
    assert torch.equal(crossover(first, second, 1.0, 5), first)
    assert torch.equal(crossover(first, second, 1.0, 0), second)
    assert crossover(first, second, 0.75, 2)[:, 0].tolist() == [0.25, 0.25, 0.75, 0.75, 0.75]


def test_natural_niches_keep_what_each_expert_is_good_at(adapt):
    """Of bowls around the experts, the best mixture is their mean; a sum of squares of 2/3 away from each of them."""
    program = M2N2(population=8, children=4, batches=30)
    module, trainer = adapt(steps=60, program=program, objective=Bowl(*torch.eye(3).tolist()))
    assert trainer.global_step == 30
    assert float((module.coefficients() - 1 / 3).square().sum(1).mean()) < 0.03  # 2/3 for an expert, 1/3 for the base
    assert float(program.kept["merges"].sum(2).max()) <= 1 + 1e-9  # within the span of base and experts
    assert len(program.kept["merges"]) == 8


# -- static merges -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("router", [None, GivenTask], ids=["merge", "task given"])
def test_nothing_moves_where_nothing_learns(adapt, tmp_path, router):
    module, trainer = adapt(
        coefficients=Coefficients("model", init=0.7), router=router and router(), program=Static(), callbacks=[Report()]
    )
    assert trainer.global_step == 1
    assert torch.equal(module.coefficients(), torch.full((1, 3), 0.7))
    found = json.loads((tmp_path / "results.json").read_text())
    assert (found["learned_parameters"], found["information"]) == (0, [])
    start, end = (
        [row for row in found["rows"] if row["method"] == f"this run, {name}"] for name in ("start", "adapted")
    )
    assert start[0]["accuracy"] == end[0]["accuracy"]


def test_the_scale_of_a_static_merge_is_its_coefficient(adapt):
    rules = [Trim(0.5), ElectSign()]
    module, _ = adapt(transforms=[Merged(rules)], coefficients=Coefficients("model", init=0.4), program=Static())
    expected = merge(TinySuite().task_vectors(), rules, 0.4)
    for name, value in module.merged.merged_state_dict().items():
        torch.testing.assert_close(value, expected[name])


def test_the_scale_of_least_loss_is_found(adapt):
    grid = [0.1, 0.3, 0.45, 0.9]
    module, _ = adapt(
        coefficients=Coefficients("model"), objective=Bowl([0.5], [0.2]), program=GridSearch(grid, batches=2)
    )
    # Two tasks want 0.5 and one wants 0.2: their mean is 0.4.
    assert torch.equal(module.coefficients(), torch.full((1, 3), 0.45))


def test_the_scale_of_most_hits_is_found(adapt):
    settings = {"objective": Mistakes(), "program": GridSearch(batches=1), "allow_labels": True, "steps": 1}
    module, trainer = adapt(coefficients=Coefficients("model"), stream=Stream(batch_size=23), **settings)
    hits, suite = {}, TinySuite()
    for n in range(1, 11):
        scale = suite.scale * n / 5
        with module.coefficients.at(torch.full((1, 3), scale)), torch.no_grad():
            parts = [trainer.datamodule.eval_tasks()[task].batch(torch.arange(23)) for task in suite.tasks]
            hits[scale] = sum(
                float((module(images, task).argmax(1) == labels).double().mean())
                for task, (images, labels) in zip(suite.tasks, parts, strict=True)
            )
    best = max(hits, key=lambda scale: hits[scale])
    assert len(set(hits.values())) > 1
    torch.testing.assert_close(module.coefficients(), torch.full((1, 3), best))


@pytest.mark.parametrize(
    ("program", "bound", "message"),
    [
        (lambda: GridSearch([]), "none", "grid is empty: name some scales"),
        (lambda: GridSearch([0.5, 1.5]), "clamp", r"grid \[0.5, 1.5\] leaves \[0, 1\]"),
        (lambda: GridSearch(), "softmax", "GridSearch needs coefficients of bound none or clamp"),
    ],
)
def test_grids_that_cannot_be_searched_are_refused(adapt, program, bound, message):
    with pytest.raises(InputError, match=message):
        adapt(coefficients=Coefficients("model", bound), program=program())


def test_accuracy_takes_labels_and_says_so(adapt):
    with pytest.raises(InputError, match="Mistakes needs labels; set allow_labels"):
        adapt(coefficients=Coefficients("model"), objective=Mistakes(), program=GridSearch())
