"""The benchmark of spectral rules has a row for each rule, and counts what a block has."""

import adamerge.rules
from benchmarks.spectral import RULES, main, shapes

#: Rules over the factors of adapters decompose no matrix of this size.
NAMES = ("Cart", "Doge", "Drm", "IsoC", "IsoCts", "KnOts", "LoRe", "Opcm", "Star", "Stf", "Svc", "TsvM", "Wudi")


def test_every_spectral_rule_has_a_row():
    timed = {type(step).__name__ for steps, _ in RULES.values() for step in steps}
    assert set(NAMES) <= timed
    assert all(hasattr(adamerge.rules, name) for name in NAMES)


def test_a_tower_has_the_parameters_of_its_matrices():
    count = sum(number * rows * columns for (rows, columns), number in shapes(768, 12).items())
    assert count == 12 * 12 * 768**2


def test_the_table_says_ratios(capsys):
    main(["--width", "16", "--rules", "Iso-C", "DRM"])
    out = capsys.readouterr().out
    assert "Iso-C" in out
    assert "DRM" in out
    assert "times 48, 12, 12" in out
