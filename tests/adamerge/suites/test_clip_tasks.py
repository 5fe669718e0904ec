"""The words of the usual tasks: number, form, and what becomes of a data set's own class names."""

import pytest

from adamerge import InputError
from adamerge.suites.clip_tasks import DEFAULT_TEMPLATES, prompt_names, usual_templates

EIGHT = {"sun397": 2, "cars": 8, "resisc45": 18, "eurosat": 3, "svhn": 1, "gtsrb": 3, "mnist": 1, "dtd": 8}
MORE = {
    "oxford_flowers102": 1, "pcam": 1, "fer2013": 6, "oxford-iiit-pet": 1, "stl10": 2, "cifar100": 18,
    "cifar10": 18, "food101": 1, "fashion_mnist": 2, "emnist_letters": 1, "kmnist": 1, "rendered-sst2": 1,
}  # fmt: skip
EUROSAT = ["AnnualCrop", "Forest", "HerbaceousVegetation", "Highway", "Industrial", "Pasture", "PermanentCrop"]
EUROSAT += ["Residential", "River", "SeaLake"]


@pytest.mark.parametrize(("task", "count"), (EIGHT | MORE).items())
def test_twenty_tasks_have_templates(task, count):
    templates = usual_templates(task)
    assert len(set(templates)) == len(templates) == count
    assert all(template.count("{}") == 1 and "  " not in template.replace("{}", "x") for template in templates)


def test_other_spellings_and_other_tasks():
    assert usual_templates("stanford-cars") == usual_templates("Stanford_Cars") == usual_templates("cars")
    assert usual_templates("my own") == DEFAULT_TEMPLATES
    assert "a black and white photo of the {}." in usual_templates("cifar10")
    assert "a photo of the big {}." in usual_templates("cifar100")
    assert "aerial view of a {}." in usual_templates("resisc45")


@pytest.mark.parametrize(
    ("task", "count"),
    [("gtsrb", 43), ("eurosat", 10), ("mnist", 10), ("pcam", 2), ("emnist", 26), ("kmnist", 10), ("sst2", 2)],
)
def test_numbered_classes_get_names_by_position(task, count):
    names = prompt_names(task, [str(i) for i in range(count)])
    assert len(set(names)) == count
    assert prompt_names(task, names) == names


def test_numbers_stay_where_the_table_does_not_fit():
    assert prompt_names("svhn", list("0123456789")) == tuple("0123456789")
    assert prompt_names("gtsrb", ["0", "1"]) == ("0", "1")


def test_classes_keep_the_order_of_the_data():
    assert prompt_names("eurosat", EUROSAT) == prompt_names("eurosat", list("0123456789"))
    assert prompt_names("eurosat", EUROSAT[::-1]) == prompt_names("eurosat", EUROSAT)[::-1]
    assert prompt_names("eurosat", ["Annual Crop", "Sea Lake"]) == ("annual crop land", "lake or sea")
    assert prompt_names("mnist", ["1 - one", "0 - zero"]) == ("1", "0")
    faces = ["Angry", "Disgust", "Fear", "Happy", "Sad", "Surprise", "Neutral"]
    assert prompt_names("fer2013", faces) == ("angry", "disgusted", "fearful", "happy", "sad", "surprised", "neutral")
    assert prompt_names("kmnist", ["wo", "o"]) == ("を", "お")


def test_faces_without_names_are_not_guessed():
    with pytest.raises(InputError, match=r"'fer2013'.*class_names"):
        prompt_names("fer2013", list("0123456"))


def test_own_names_are_only_tidied():
    assert prompt_names("resisc45", ["baseball_diamond", "sea_ice"]) == ("baseball diamond", "sea ice")
    assert prompt_names("sun397", ["apse/indoor", "airplane_cabin"]) == ("apse indoor", "airplane cabin")
    assert prompt_names("cars", ["Ram C/V Cargo Van Minivan 2012"]) == ("Ram C/V Cargo Van Minivan 2012",)
    assert prompt_names("dtd", ["polka-dotted"]) == ("polka-dotted",)
    assert prompt_names("my own", ["red_apple", "0"]) == ("red apple", "0")
