"""Recipes: what a YAML file may say, and one sentence for what it may not."""

from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import save_file

from adamerge import InputError
from adamerge.recipes import Recipe, job, locate, parse, parse_size, read
from adamerge.rule_specs import build_rules
from adamerge.rules import ElectSign, Matrices, Mean, PerTensor, Trim

MINIMAL = {"base": "base.safetensors", "experts": {"a": "a.safetensors"}}


class Noise(PerTensor[None]):
    """A rule of one's own, which takes a seed."""

    def __init__(self, amount: float = 0.1, seed: int = 0) -> None:
        self.amount, self.seed = amount, seed

    def tensor(self, name, deltas, statistics):
        return deltas


@pytest.fixture
def folder(tmp_path) -> Path:
    save_file({"w": torch.zeros(3)}, tmp_path / "base.safetensors")
    save_file({"w": torch.ones(3)}, tmp_path / "a.safetensors")
    return tmp_path


def test_what_is_left_out_has_defaults(folder):
    asked = job(parse(MINIMAL), folder)
    assert [type(rule).__name__ for rule in asked.rules] == ["TaskArithmetic"]
    assert (asked.scale, asked.exclude, asked.dtype, asked.copy_from) == (1.0, (), None, None)
    assert asked.shard_size == 5 * 10**9
    assert asked.sources == {"base": folder / "base.safetensors", "a": folder / "a.safetensors"}


@pytest.mark.parametrize(
    "spec",
    [
        [{"Trim": {"keep": 0.4}}, "ElectSign"],
        [{"Trim": {"keep": 0.4}}, {"ElectSign": None}],
        [{"class_path": "adamerge.rules.Trim", "init_args": {"keep": 0.4}}, {"class_path": "ElectSign"}],
        [{"adamerge.rules.ties.Trim": {"keep": 0.4}}, {"ElectSign": {}}],
    ],
)
def test_rules_in_all_their_forms(spec):
    trim, elect = build_rules(spec)
    assert isinstance(trim, Trim)
    assert trim.keep == 0.4
    assert isinstance(elect, ElectSign)


@pytest.mark.parametrize("name", ["IsoC", "TsvM", "Star", "Svc", {"IsoC": {"matrices": {"average": "embed"}}}])
def test_arguments_that_are_objects_are_built(name):
    (rule,) = build_rules([name])
    assert rule.matrices == Matrices(average="embed" if isinstance(name, dict) else None)


def test_rules_inside_rules_take_the_same_forms_and_the_seed():
    (rebase,) = build_rules([{"Rebase": {"rule": {"KnOts": {"rules": [{"Dare": {"drop": 0.5}}, "ElectSign"]}}}}], 7)
    (dare,) = rebase.rule._transforms
    assert (dare.drop, dare.seed, type(rebase.rule._rule)) == (0.5, 7, ElectSign)
    with pytest.raises(InputError, match="no rule 'Meen': did you mean 'Mean'"):
        build_rules([{"Rebase": {"rule": "Meen"}}])


def test_a_recipes_seed_is_for_rules_that_have_none():
    own = f"{__name__}.Noise"
    first, second, mean = build_rules([own, {own: {"seed": 3}}, "Mean"], seed=7)
    assert (first.seed, second.seed) == (7, 3)
    assert isinstance(mean, Mean)
    assert build_rules([own])[0].seed == 0


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("Trimm", "there is no rule 'Trimm': did you mean 'Trim'?"),
        ("trim", "there is no rule 'trim': did you mean 'Trim'?"),
        ("PerTensor", "there is no rule 'PerTensor'"),
        ("../.x", "'../.x' is no rule: expected Name or package.module.Name"),
        ("no.such.Rule", "rule no.such.Rule: No module named 'no'"),
        ({"Trim": {"kep": 0.2}}, "Trim has no argument 'kep': did you mean 'keep'?"),
        ({"Mean": {"keep": 0.2}}, "Mean has no argument 'keep': it takes none"),
        ({"Trim": {"keep": "much"}}, '"keep": Expected a float. Got value: much'),
        ({"Trim": {"keep": 7}}, "expected 0 < keep <= 1 in Trim, got 7"),
        ({"ElectSign": {"combine": "max"}}, "Got value: max"),
        ({"class_path": "Trim", "args": {}}, "a rule has class_path and init_args, and no 'args'"),
        ({"Trim": {}, "Mean": {}}, "is no rule: expected Name"),
        (["Trim"], "is no rule: expected Name"),
        ({"class_path": "Trim", "init_args": [0.2]}, "is no rule: expected Name"),
        ({"Trim": {"keep": None}}, "Trim: 'keep' has no value; give one, or leave it out"),
        ({"Prune": {"only": "("}}, "Prune: '(' is no regular expression"),
        ({"Dare": {"only": "("}}, "Dare: '(' is no regular expression"),
        ({"class_path": "pathlib.Path"}, "there is no rule 'pathlib.Path'"),
    ],
)
def test_rules_that_are_none(spec, words):
    with pytest.raises(InputError) as error:
        build_rules([spec])
    assert words in str(error.value)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"scales": 0.3}, "a recipe has no key 'scales': did you mean 'scale'?"),
        ({"whatever": 1}, "a recipe has no key 'whatever'; there are base, experts, rules"),
        ({"scale": "big"}, "the recipe: "),
        ({"scale": None}, "the recipe: 'scale' has no value"),
        ({"rules": "Trim"}, "the recipe: expected rules to be a list, got 'Trim'"),
        ({"rules": [{"class_path": "pathlib.Path", "init_args": [1]}]}, "is no rule: expected Name"),
        ({"dtype": "float8"}, "the recipe: "),
        ({"vocabulary": "union"}, "the recipe: "),
        ({"experts": {}}, "no expert given"),
        ({"experts": {"a": "b.safetensors"}}, "no such checkpoint"),
        ({"tokenizer": "b"}, "tokenizer is 'b'"),
        ({"experts": {1: "a.safetensors"}}, "an expert cannot be called 1: give it another name, or put it in quotes"),
        ({"experts": MINIMAL["experts"] | {"base": "a.safetensors"}}, "an expert cannot be called 'base'"),
        ({"device": "gpu"}, "device 'gpu' cannot be used: Expected one of cpu, cuda"),
        ({"device": "meta"}, "device 'meta' cannot be used"),
        ({"shard_size": "inf"}, "shard_size is 'inf': expected bytes"),
        ({"shard_size": "5 apples"}, "shard_size is '5 apples': expected bytes, or a size such as 5GB"),
    ],
)
def test_recipes_that_make_no_sense(folder, changes, words):
    with pytest.raises(InputError) as error:
        job(parse(MINIMAL | changes), folder)
    assert words in str(error.value)


@pytest.mark.parametrize("key", ["base", "experts"])
def test_models_are_wanted(key):
    with pytest.raises(InputError, match=f"the recipe names no {key}"):
        parse({name: value for name, value in MINIMAL.items() if name != key})


def test_scales_of_every_kind(folder):
    for scale in (0.3, [0.1, 0.5], {"w": 0.5}, {"w": [0.1, 0.2], ".*": 1}):
        assert job(parse(MINIMAL | {"scale": scale}), folder).scale == scale


def test_a_recipe_is_read_from_yaml_with_paths_beside_it(folder):
    (folder / "r.yaml").write_text(yaml.safe_dump(MINIMAL | {"rules": ["Mean"], "exclude": ["w"]}))
    asked = read(folder / "r.yaml")
    assert asked.exclude == ("w",)
    assert asked.recipe["rules"] == ["Mean"]
    assert parse(asked.recipe) == Recipe(**MINIMAL, rules=["Mean"], exclude=["w"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rules": ["Trm"]}, "there is no rule 'Trm': did you mean 'Trim'"),
        ({"scales": 1}, "a recipe has no key 'scales'"),
        ({"base": "gone.safetensors"}, r"no such checkpoint: .*gone\.safetensors"),
    ],
)
def test_errors_name_the_recipe(folder, change, message):
    (folder / "merge.yaml").write_text(yaml.safe_dump(MINIMAL | change))
    with pytest.raises(InputError, match=rf"^{folder}/merge\.yaml: {message}"):
        read(folder / "merge.yaml")


def test_a_recipe_that_is_not_there(folder):
    (folder / "merge.yaml").touch()
    with pytest.raises(InputError, match=r"^there is no recipe \S+/mrge\.yaml: did you mean 'merge\.yaml'\?$"):
        read(folder / "mrge.yaml")
    with pytest.raises(InputError, match=r"^there is no recipe \S+/nothere\.yaml$"):
        read(folder / "nothere.yaml")


@pytest.mark.parametrize(
    ("size", "expected"),
    [(7, 7), ("7", 7), ("200 MB", 2 * 10**8), ("1.5gb", 15 * 10**8), ("3K", 3000), ("1TB", 10**12)],
)
def test_sizes(size, expected):
    assert parse_size(size) == expected


def test_where_models_are(folder, monkeypatch):
    monkeypatch.setattr("adamerge.recipes.hub_folder", lambda name: Path("hub") / name)
    (folder / "org").mkdir()
    assert locate("someone/model", folder) == Path("hub/someone/model")
    assert locate("org/model", folder) == folder / "org/model"
    assert locate("models/x.safetensors", folder) == folder / "models/x.safetensors"
    assert locate("/absolute/model", folder) == Path("/absolute/model")


@pytest.mark.parametrize("name", ["y" * 300, "org/" + "y" * 300, "y" * 300 + ".safetensors"])
@pytest.mark.parametrize("place", ["base", "a"])
def test_a_name_that_no_file_can_have_is_that_of_no_model(folder, monkeypatch, name, place):
    monkeypatch.setattr("adamerge.recipes.hub_folder", lambda name: Path(name))
    values = MINIMAL | ({"base": name} if place == "base" else {"experts": {"a": name}})
    with pytest.raises(InputError, match=r"no such checkpoint: .*yyy"):
        job(parse(values), folder)


def test_paths_that_rules_take_are_beside_the_recipe_too(folder, monkeypatch):
    monkeypatch.setenv("HOME", str(folder / "home"))
    specs = [
        {"RegMean": {"statistics": "grams"}},
        {"RegMean": {"statistics": "~/grams"}},
        {"RegMean": {"statistics": "/grams"}},
        {"Rebase": {"rule": {"RegMean": {"statistics": "grams"}}}},
        "RegMean",
    ]
    here, home, absolute, inner, none = build_rules(specs, folder=folder)
    assert [here.statistics, home.statistics] == [str(folder / "grams"), str(folder / "home" / "grams")]
    assert [absolute.statistics, none.statistics] == ["/grams", None]
    assert inner.rule.statistics == str(folder / "grams")
    assert build_rules(specs)[0].statistics == "grams"
    with pytest.raises(InputError, match=str(folder / "measured")):
        job(parse(MINIMAL | {"rules": [{"RegMean": {"statistics": "measured"}}]}), folder).rules[0].check(("a",))
