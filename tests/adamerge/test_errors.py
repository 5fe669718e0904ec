import pytest

from adamerge.errors import did_you_mean

KEYS = ["model.init_args.eps", "trainer.max_steps", "trainer.min_steps", "model.init_args.optimizer.lr"]


@pytest.mark.parametrize(
    ("word", "known", "end"),
    [
        ("Trimm", ["Ties", "Trim"], ": did you mean 'Trim'?"),
        ("TRIM", ["Ties", "Trim"], ": did you mean 'Trim'?"),
        ("whatever", ["Ties", "Trim"], "; there are Ties, Trim"),
        ("whatever", [], ": it takes none"),
        ("trainer.min_step", KEYS, ": did you mean 'trainer.min_steps'?"),
        ("steps", KEYS, ": did you mean 'trainer.max_steps'?"),  # not eps, which is in it
        ("--lr", KEYS, ": did you mean 'model.init_args.optimizer.lr'?"),
    ],
)
def test_the_nearest_name_is_named(word, known, end):
    assert did_you_mean(word, known) == end


def test_a_long_list_need_not_be_given():
    assert did_you_mean("whatever", KEYS, ": --help lists all") == ": --help lists all"
