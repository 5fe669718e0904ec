"""Experts that come and go while a run goes on."""

import json
from types import SimpleNamespace

import lightning as L
import pytest
import torch
from test_continual import AtSix, adam
from tiny_suite import TinySuite
from torch.testing import assert_close

from adamerge import InputError
from adamerge.suites import Subset
from modules import BlockRouter, Coefficients, ConcreteMask, Entropy, FeatureRouter, Fuser, Surgery
from trainers import AdaMMS, Adaptation, BiLevel, Experts, Guard, Joining, MovingAverage, Reset, Stream
from trainers.pools import relaid
from trainers.report import Report
from trainers.traces import Snapshots

FIRST, ALL = ("one", "three"), ("one", "two", "three")
COMES = {0: ["three", "one"], 6: None}


class Watch(L.Callback):
    """What was learned, and the optimiser's state of it, after every step, before experts change and after."""

    def __init__(self, seen):
        self.seen = seen

    def on_train_batch_end(self, trainer, module, *_):
        kept = [each.state_dict()["state"] for each in trainer.optimizers]
        self.seen[trainer.global_step] = self.copy(module.state_dict()), self.copy(kept[0]), module.merged.tasks

    def copy(self, state):
        return {k: self.copy(v) if isinstance(v, dict) else v.clone() for k, v in state.items()}


def watched(adapt, schedule, steps=8, **kwargs):
    """What there was after every step, before the experts changed and after."""
    before, after = {}, {}
    run, _ = adapt(steps, optimizer=adam, callbacks=[Watch(before), Experts(schedule), Watch(after)], **kwargs)
    return run, before, after


def test_one_that_comes_starts_anew_and_the_others_go_on(adapt):
    run, before, after = watched(adapt, COMES)
    (old, moments, was), (new, moved, now) = before[6], after[6]
    assert (was, now, run.merged.tasks) == (FIRST, ALL, ALL)
    assert torch.equal(new["coefficients.raw"][:, [0, 2]], old["coefficients.raw"])
    assert torch.equal(new["coefficients.raw"][:, 1], torch.full_like(old["coefficients.raw"][:, 0], 0.3))
    for key in ("exp_avg", "exp_avg_sq"):
        assert torch.equal(moved[0][key][:, [0, 2]], moments[0][key])
        assert not bool(moved[0][key][:, 1].any())
    assert moved[0]["step"] == moments[0]["step"] == 6
    last = after[8][0]["coefficients.raw"]
    assert bool((last != new["coefficients.raw"]).any(0).all()), "all of them learn afterwards"


def test_one_that_goes_takes_its_own_along(adapt):
    run, before, after = watched(adapt, {4: ["three", "two"]})
    (old, moments, was), (new, moved, now) = before[4], after[4]
    assert (was, now) == (ALL, ("two", "three"))
    assert torch.equal(new["coefficients.raw"], old["coefficients.raw"][:, 1:])
    assert torch.equal(moved[0]["exp_avg"], moments[0]["exp_avg"][:, 1:])
    assert set(run.merged.fingerprints) == {"base", "two", "three"}
    assert list(run.heads) == list(ALL)
    assert run.merged.delta(run.coefficients.rows[0]).shape[0] == 2


def test_what_a_program_kept_of_other_experts_is_forgotten(adapt):
    given = {"elements": ConcreteMask(), "learn": ["elements"], "program": BiLevel(stale=True)}
    run, before, after = watched(adapt, {3: ["one", "two"]}, steps=5, **given)
    assert run.phase.stepper._last.shape[1] == 2
    name = next(name for name in after[5][0] if name.startswith("elements."))
    assert not torch.equal(after[5][0][name], before[3][0][name]), "it learns on"


def test_until_it_comes_nothing_is_known_of_an_expert(adapt):
    """The run up to the change is that of a suite without it."""
    _, _, after = watched(adapt, COMES)
    alone, _ = adapt(5, optimizer=adam, suite=Subset(TinySuite(), experts={name: name for name in FIRST}))
    assert_close(after[5][0]["coefficients.raw"], alone.coefficients.raw.detach(), rtol=0, atol=1e-6)


PARTS = {
    "router": lambda: {"router": BlockRouter(scope="linear")},
    "constants": lambda: {"router": BlockRouter(depth=0, scope="linear")},
    "features": lambda: {"router": FeatureRouter(layers=1)},
    "ensemble": lambda: {"router": Fuser(layers=0, dropout=0.0), "learn": ["router"]},
    "elements": lambda: {"elements": ConcreteMask()},
    "correction, heads": lambda: {"correction": Surgery(2), "learn": ["coefficients", "correction", "heads"]},
}


@pytest.mark.parametrize("parts", list(PARTS))
def test_what_belongs_to_no_expert_goes_on_whatever_learns(adapt, parts):
    run, before, after = watched(adapt, COMES, **PARTS[parts]())
    (old, moments, _), (new, moved, _) = before[6], after[6]
    names = [name for name, _ in run.learned()]
    pairs = {name: (old[name], new[name]) for name in new}
    pairs |= {f"moments of {names[n]}": (moments[n]["exp_avg"], moved[n]["exp_avg"]) for n in moments}
    assert moments.keys() == moved.keys()
    assert len(moments) > 0
    for name, (was, now) in pairs.items():
        grown = [axis for axis, sizes in enumerate(zip(was.shape, now.shape, strict=True)) if len(set(sizes)) > 1]
        assert grown == sorted(run.expert_axes().get(name.removeprefix("moments of "), ())), name
        for axis in grown:
            now = now.unflatten(axis, (3, -1)).index_select(axis, torch.tensor([0, 2])).flatten(axis, axis + 1)
        assert torch.equal(now, was), name


def test_parts_along_two_axes_go_where_both_experts_are():
    value, fresh = torch.arange(16.0).view(2, 8), -torch.ones(3, 12)
    found = relaid(value, fresh, (0, 1), ("a", "b"), ("b", "c", "a"))
    assert torch.equal(found[1], fresh[1])
    assert torch.equal(found[0], torch.tensor([12.0, 13, 14, 15, -1, -1, -1, -1, 8, 9, 10, 11]))
    assert relaid(value[:, :7], fresh, (0, 1), ("a", "b"), ("b", "c", "a")).shape == (2, 7), "left for others to refuse"


def test_what_is_looked_up_is_computed_anew(adapt):
    """Only heads learn: every image goes through the backbone once, and once more when that changes."""
    run, _ = adapt(6, callbacks=[Experts({3: ["two"]})], learn=["heads"])
    assert run.merged.tasks == ("two",)
    index = torch.arange(4)
    images = run.suite.dataset("one", "test").batch(index)[0]
    with torch.no_grad():
        assert_close(run.known("merged", "one", {"index": index})[0], run.merged(images))


# -- resumed -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("change", [3, 6, 8])
@pytest.mark.parametrize("parts", ["router", "elements", "correction, heads"])
def test_resumed_runs_end_as_undisturbed_ones(adapt, tmp_path, change, parts):
    """A checkpoint from before, at and after the change."""
    saved, schedule = str(tmp_path / "part.ckpt"), {0: ["one"], 2: ["one", "two"], change: ["two", "three"]}
    torch.manual_seed(0)
    whole, _ = adapt(11, optimizer=adam, callbacks=[Experts(schedule)], **PARTS[parts]())
    torch.manual_seed(0)
    adapt(9, optimizer=adam, callbacks=[Experts(schedule), AtSix(saved)], **PARTS[parts]())
    torch.manual_seed(0)
    torch.rand(1)  # of a process that did something else before, with the same seed
    resumed, _ = adapt(11, optimizer=adam, callbacks=[Experts(schedule)], ckpt_path=saved, **PARTS[parts]())
    assert resumed.merged.tasks == ("two", "three")
    state = whole.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in resumed.state_dict().items())


def test_a_run_that_ends_where_one_comes_goes_on_with_it(adapt, tmp_path):
    saved = str(tmp_path / "end.ckpt")
    ended, trainer = adapt(6, optimizer=adam, callbacks=[Experts(COMES)])
    trainer.save_checkpoint(saved)
    assert ended.merged.tasks == FIRST, "nothing would be learned for it any more"
    whole, _ = adapt(9, optimizer=adam, callbacks=[Experts(COMES)])
    longer, _ = adapt(9, optimizer=adam, callbacks=[Experts(COMES)], ckpt_path=saved)
    assert torch.equal(longer.coefficients.raw, whole.coefficients.raw)


def small():
    return Subset(TinySuite(), experts={name: name for name in FIRST})


def test_a_suite_to_which_an_expert_was_added_takes_up_a_run_where_that_is_asked_for(adapt, tmp_path):
    saved = str(tmp_path / "small.ckpt")
    before, trainer = adapt(5, optimizer=adam, callbacks=[Experts()], suite=small())
    trainer.save_checkpoint(saved)
    wanted = {"callbacks": [Experts()], "ckpt_path": saved}
    with pytest.raises(InputError, match=r"other models \(two: absent .* or add trainers.Experts to the callbacks"):
        adapt(6, optimizer=adam, suite=TinySuite(), ckpt_path=saved)
    seen = {}
    after, _ = adapt(6, optimizer=adam, suite=TinySuite(), **{**wanted, "callbacks": [Experts(), Watch(seen)]})
    assert after.merged.tasks == ALL
    assert bool(after.coefficients.raw[:, 1].sub(0.3).abs().max() > 0)
    assert_close(after.coefficients.raw[:, [0, 2]], before.coefficients.raw, atol=0.03, rtol=0)
    assert not torch.equal(after.coefficients.raw[:, 0], torch.full_like(after.coefficients.raw[:, 0], 0.3))
    with pytest.raises(InputError, match=r"other models \(.*one: .* in the checkpoint, .* it was made with$"):
        adapt(6, optimizer=adam, suite=TinySuite(seed=1), **wanted)
    fewer, _ = adapt(5, optimizer=adam, suite=Subset(TinySuite(), experts={"three": "three"}), **wanted)
    assert torch.equal(fewer.coefficients.raw[:, 0], before.coefficients.raw[:, 1])


def test_what_some_experts_learned_is_restored_with_them(adapt, tmp_path):
    saved = str(tmp_path / "some.ckpt")
    run, trainer = adapt(8, optimizer=adam, callbacks=[Experts({2: ["two", "one"]})])
    trainer.save_checkpoint(saved)
    other = Adaptation(TinySuite()).restore(saved)
    assert other.merged.tasks == ("one", "two")
    images = other.suite.dataset("one", "test").batch(torch.arange(4))[0]
    assert torch.equal(other.eval()(images, "one"), run.eval()(images, "one"))
    _, trainer = adapt(1, callbacks=[Experts()])
    trainer.save_checkpoint(saved)
    assert other.restore(saved).merged.tasks == ALL


# -- beside other callbacks --------------------------------------------------------------------------------------------


def test_averages_and_episodes_move_along(adapt):
    average, reset = MovingAverage(0.5), Reset(every=4)
    run, _ = adapt(7, optimizer=adam, callbacks=[average, Experts({3: ["two"], 5: None})])
    assert average.average["coefficients.raw"].shape == run.coefficients.raw.shape
    run, _ = adapt(4, optimizer=adam, callbacks=[Experts({2: ["two", "one"]}), reset])
    assert reset.resets == [4]
    assert torch.equal(run.coefficients.raw, torch.full_like(run.coefficients.raw, 0.3))


@pytest.mark.parametrize("order", [None, Joining()])
def test_a_guard_compares_what_was_learned_with_the_same_experts(adapt, order):
    guard = Guard(every=2, keep="information")
    stream = Stream(batch_size=6, order=order)
    run, _ = adapt(8, optimizer=adam, stream=stream, callbacks=[guard, Experts({4: ["two", "one"]})])
    assert run.merged.tasks == ("one", "two")
    assert guard.seen.best["coefficients.raw"].shape == run.coefficients.raw.shape
    assert order is not None or sorted(guard.seen.scores) == [6, 8]


@pytest.mark.filterwarnings("ignore:.*smaller than the logging interval")
def test_the_report_follows_experts_that_come_and_go(adapt, tmp_path):
    schedule = {0: ["one", "two"], 4: ["two", "three"], 8: None}
    stream = Stream(batch_size=6, order=Joining())
    report = Report(every=5)
    adapt(100, optimizer=adam, stream=stream, callbacks=[report, Experts(schedule)])
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["experts"] == {"0": ["one", "two"], "4": ["two", "three"], "8": ["one", "two", "three"]}
    rows = {row["method"]: row["accuracy"] for row in results["rows"]}
    assert all(list(rows[name]) == list(ALL) for name in ("this run, start", "this run, adapted", "this run, online"))
    steps, values, names = report.snapshots.table()
    assert names == ("one", "two", "three")
    assert values.shape == (len(steps), 4, 3)
    assert steps == [0, 4, 5, 8, 10, 12], "a snapshot of the step from which there are others"
    gone = [[step for step, row in zip(steps, values[:, 0, k], strict=True) if row.isnan()] for k in range(3)]
    assert gone == [[4, 5], [], [0]]
    assert {path.name for path in (tmp_path / "figures").iterdir()} >= {
        "coefficients.png",
        "coefficients_over_steps.png",
    }


def test_snapshots_of_an_older_checkpoint_are_of_the_experts_there_are():
    snapshots = Snapshots(5)
    snapshots.load_state_dict({"snapshots": {0: torch.zeros(2, 2), 5: torch.ones(2, 2)}})
    snapshots.add(10, torch.ones(2, 2), ("a", "b"))
    snapshots.add(12, torch.ones(2, 1), ("b",))
    assert snapshots.experts == {0: ["a", "b"], 12: ["b"]}
    steps, values, names = snapshots.table()
    assert (steps, names) == ([0, 5, 10, 12], ("b", "a"))
    assert torch.equal(values.isnan()[:, 0], torch.tensor([[False, False]] * 3 + [[False, True]]))


# -- what cannot be ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("schedule", "kwargs", "message"),
    [
        ({3: ["two", "four"]}, {}, "from step 3 on, expert 'four' is to be merged; the suite has one, two, three"),
        ({3: []}, {}, "at step 3 no expert would be left: name one or more, or null for all"),
        ({-1: None}, {}, "begins at step 0, not -1"),
        ({3: ["one"]}, {"task_id": "inferred", "router": FeatureRouter()}, "task 'two' has none"),
        ({3: ["one"]}, {"program": AdaMMS()}, "AdaMMS searches for one pool: its experts cannot change"),
        ({3: ["one"]}, {"coefficients": Coefficients(init=[0.1, 0.2, 0.3])}, r"init has shape \[3\]"),
        ({3: ["one"]}, {"optimizer": lambda p: torch.optim.LBFGS(p)}, "in a form that has no part for each expert"),
    ],
)
def test_what_cannot_be_is_said_before_work_starts(adapt, schedule, kwargs, message):
    with pytest.raises(InputError, match=message):
        adapt(5, callbacks=[Experts(schedule)], objective=None if "program" in kwargs else Entropy(), **kwargs)


def test_several_processes_change_their_experts_where_they_resume():
    run = Adaptation(TinySuite())
    trainer = SimpleNamespace(global_step=3, max_steps=9, world_size=2)
    with pytest.raises(InputError, match=r"only where they resume: end the run with trainer\.max_steps=6"):
        Experts(COMES).on_train_start(trainer, run)
