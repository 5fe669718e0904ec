"""Vocabularies that differ: refused, matched by token, or the base's beyond what is common."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, models

from adamerge import InputError, differences, merge
from adamerge.recipes import job, parse
from adamerge.rules import Mean

BASE_TOKENS = ["<s>", "a", "b", "c", "d"]
#: Without "c", with "d" in its place, and with a token that the base does not have.
EXPERT_TOKENS = ["<s>", "a", "b", "d", "new", "newer"]
HEAD, EMBEDDING, INNER = "lm_head.weight", "model.embed_tokens.weight", "model.layers.0.w"


def write(folder: Path, tokens: list[str], rows: int, offset: float, tokenizer: str = "words") -> None:
    """A model whose row r is offset + r, and its tokenizer."""
    folder.mkdir()
    values = (offset + torch.arange(float(rows)))[:, None].expand(-1, 2).contiguous()
    state = {EMBEDDING: values, HEAD: values + 100, INNER: torch.full((2,), offset)}
    save_file(state, folder / "model.safetensors")
    if tokenizer == "words":
        model = models.WordLevel({token: row for row, token in enumerate(tokens)}, unk_token="<s>")
    else:
        model = models.Unigram([(token, -float(row)) for row, token in enumerate(tokens)], 0, False)
    Tokenizer(model).save(str(folder / "tokenizer.json"))


@pytest.fixture(params=["words", "scores"])
def folder(request, tmp_path) -> Path:
    write(tmp_path / "base", BASE_TOKENS, 6, 0.0, request.param)  # one row more than tokens
    write(tmp_path / "expert", EXPERT_TOKENS, 8, 10.0, request.param)
    return tmp_path


def asked(folder: Path, policy: str):
    return job(parse({"base": "base", "experts": {"x": "expert"}, "rules": ["Mean"], "vocabulary": policy}), folder)


def test_another_size_is_refused_with_both_sizes_and_what_can_be_done(folder):
    words = r"expert 'x' has 8 rows in lm_head\.weight, the base has 6: .*'intersect'.*'base'"
    with pytest.raises(InputError, match=words):
        asked(folder, "refuse")


@pytest.mark.parametrize("piece", [1, 4, 2**18])
def test_rows_are_matched_by_token(folder, monkeypatch, piece):
    monkeypatch.setattr(differences, "PIECE", piece)
    found = asked(folder, "intersect")
    merged = merge(found.task_vectors, found.rules)
    # <s>, a and b are in the same rows; c is unknown to the expert, d is in its row 3; the last row is no token's.
    assert merged[EMBEDDING][:, 0].tolist() == [10, 11, 12, 3, 13, 5]
    assert merged[HEAD][:, 1].tolist() == [110, 111, 112, 103, 113, 105]
    assert merged[INNER].tolist() == [10, 10]
    assert found.notes == ("expert 'x' has 4 of the base's 6 rows; the others stay the base's",)


def test_rows_beyond_the_common_ones_are_the_bases(folder):
    write(folder / "short", BASE_TOKENS[:4], 4, 20.0)
    values = {"base": "base", "experts": {"x": "short"}, "rules": ["Mean"], "vocabulary": "base"}
    found = job(parse(values), folder)
    assert merge(found.task_vectors, found.rules)[EMBEDDING][:, 0].tolist() == [20, 21, 22, 23, 4, 5]
    longer = asked(folder, "base")
    assert merge(longer.task_vectors, longer.rules)[EMBEDDING][:, 0].tolist() == [10, 11, 12, 13, 14, 15]


def test_tokens_are_needed_to_match_by_them(folder):
    (folder / "expert" / "tokenizer.json").unlink()
    with pytest.raises(InputError, match=r"expert.tokenizer\.json cannot be read: rows are matched by its tokens"):
        asked(folder, "intersect")


def test_a_tokenizer_for_other_rows_than_the_merge_has_is_refused(folder):
    recipe = {"base": "base", "experts": {"x": "expert"}, "vocabulary": "base", "tokenizer": "x"}
    with pytest.raises(InputError, match="the merge has the base's vocabulary, and that of expert 'x' is another"):
        job(parse(recipe), folder)


def test_the_same_size_with_other_tokens_is_said_and_matched_if_asked(tmp_path):
    write(tmp_path / "base", BASE_TOKENS, 5, 0.0)
    write(tmp_path / "expert", ["<s>", "b", "a", "c", "d"], 5, 10.0)
    by_place = asked(tmp_path, "refuse")
    assert by_place.notes == ("expert 'x' has other tokens than the base in 2 rows: consider 'intersect'",)
    assert merge(by_place.task_vectors, [Mean()])[EMBEDDING][:, 0].tolist() == [10, 11, 12, 13, 14]
    by_token = asked(tmp_path, "intersect")
    assert merge(by_token.task_vectors, [Mean()])[EMBEDDING][:, 0].tolist() == [10, 12, 11, 13, 14]


def test_the_same_vocabulary_needs_no_view(tmp_path):
    write(tmp_path / "base", BASE_TOKENS, 7, 0.0)
    write(tmp_path / "expert", BASE_TOKENS, 7, 10.0)
    for policy in ("refuse", "intersect", "base"):
        found = asked(tmp_path, policy)
        assert found.notes == ()
        assert merge(found.task_vectors, [Mean()])[EMBEDDING][:, 0].tolist() == [10, 11, 12, 13, 14, 15, 16]


def test_another_shape_elsewhere_is_refused_whatever_the_policy(folder):
    state = {EMBEDDING: torch.zeros(6, 2), HEAD: torch.zeros(6, 2), INNER: torch.zeros(3)}
    save_file(state, folder / "expert" / "model.safetensors")
    with pytest.raises(InputError, match=r"layers\.0\.w has shape \[3\], the base has \[2\]"):
        asked(folder, "base")
