"""Files that nobody should trust, and what is asked of whoever reads them."""

import json
import random
import resource
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, Phase, assume, given, settings
from hypothesis import strategies as st

from adamerge import InputError

#: Examples of every kind of file: a few wherever the tests run, many where there is time.
COUNTS = [pytest.param(40, id="40"), pytest.param(2000, id="2000", marks=pytest.mark.slow)]
#: Memory that reading them may take in all, in MB.
MOST = 400

#: Makes a folder `caught`, if somebody builds it.
CALL = {"class_path": "os.mkdir", "init_args": {"path": "caught"}}
SHELL = {"class_path": "os.system", "init_args": {"command": "mkdir caught"}}
POPEN = {"class_path": "subprocess.Popen", "init_args": {"args": ["mkdir", "caught"]}}
EVAL = {"class_path": "builtins.eval", "init_args": {"source": "__import__('os').mkdir('caught')"}}
PICKLED = "!!python/object/apply:os.mkdir [caught]"
LAUGHS = "a0: &a0 [x, x]\n" + "".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 30))
MERGED = "a0: &a0 {x: 1}\n" + "".join(f"a{n}: &a{n} {{<<: [{', '.join([f'*a{n - 1}'] * 9)}]}}\n" for n in range(1, 30))

_JUNK: list[Any] = [
    None, True, -1, 0, 3, 2**40, 2**63, 10**400, -0.5, float("nan"), float("inf"), "", "x", "\0", "é\n", "y" * 300,
    "../../etc/passwd", "/etc/passwd", ".", "cpu", [], {}, [[]], [1, 2], ["x", None], {"x": {}}, CALL, SHELL, POPEN,
    EVAL,
]  # fmt: skip


def altered(rng: random.Random, value: Any) -> Any:
    """The value with something in it replaced, left out or added."""
    if isinstance(value, dict) and value and rng.random() < 0.8:
        key = rng.choice(list(value))
        what = rng.random()
        if what < 0.12:
            return {name: inner for name, inner in value.items() if name != key}
        if what < 0.2:
            return {**value, rng.choice(["x", "", "é", key * 2 if isinstance(key, str) else "y"]): rng.choice(_JUNK)}
        return {**value, key: altered(rng, value[key])}
    if isinstance(value, list) and value and rng.random() < 0.7:
        place = rng.randrange(len(value))
        return [*value[:place], altered(rng, value[place]), *value[place + 1 :]]
    if rng.random() < 0.04:
        for _ in range(rng.choice([50, 3000])):
            value = [value]
        return value
    return rng.choice(_JUNK)


def broken(rng: random.Random, content: bytes) -> bytes:
    """Bytes with some cut off, changed, put in or doubled."""
    for _ in range(rng.randint(1, 4)):
        at, size = rng.randrange(len(content) + 1), rng.choice([1, 2, 8, 40])
        what = rng.random()
        if what < 0.25:
            content = content[:at]
        elif what < 0.6:
            content = content[:at] + rng.randbytes(size) + content[at + size :]
        elif what < 0.8:
            content = content[:at] + rng.randbytes(size) + content[at:]
        else:
            content = content[:at] + content[at : at + size] * 2 + content[at + size :]
    return content


def as_json(value: Any) -> bytes:
    return _shallow(value, lambda: json.dumps(value).encode())


def as_yaml(value: Any) -> bytes:
    return _shallow(value, lambda: yaml.safe_dump(value).encode())


def _shallow(value: Any, write: Callable[[], bytes]) -> bytes:
    """What is nested too deep to be written as usual, in brackets alone."""
    try:
        return write()
    except RecursionError:
        return b'{"x": ' + b"[" * 100_000 + b"]" * 100_000 + b"}"


def as_safetensors(header: Any, data: bytes) -> bytes:
    text = as_json(header)
    return struct.pack("<Q", len(text)) + text + data


def files(valid: Any, write: Callable[[Any], bytes], more: tuple[bytes, ...] = ()) -> st.SearchStrategy[bytes]:
    """Files like a valid one: its values altered, its bytes broken, or some that are given."""

    def make(rng: random.Random) -> bytes:
        value = valid
        for _ in range(rng.randint(1, 3)):
            value = altered(rng, value)
        content = write(value) if rng.random() < 0.7 else write(valid)
        return content if rng.random() < 0.6 else broken(rng, content)

    made = st.integers(0, 2**64 - 1).map(lambda seed: make(random.Random(seed)))
    return st.one_of(made, made, made, made, st.sampled_from(more)) if more else made


def refuses(
    read: Callable[[Path], object],
    content: st.SearchStrategy[bytes],
    path: Path,
    count: int,
    errors: tuple[type[Exception], ...] = (InputError,),
) -> dict[str, int]:
    """Read so many different files; raise AssertionError for errors not of ours, and for what they leave behind.

    Returns how many were read and how many refused.
    """
    found = {"read": 0, "refused": 0}
    folder, began = path.parent, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    before = _listing(folder) | {path.name}
    passed: set[int] = set()

    # Files are made from a seed: a smaller one is no simpler file, so that shrinking would only take time.
    @settings(
        max_examples=count,
        phases=[Phase.generate],
        derandomize=True,
        deadline=None,
        database=None,
        suppress_health_check=[*HealthCheck],
    )
    @given(content)
    def holds(written: bytes) -> None:
        assume(hash(written) not in passed)
        path.write_bytes(written)
        said = None
        try:
            read(path)
        except errors as error:
            said = str(error)
        found["read" if said is None else "refused"] += 1
        assert said is None or 0 < len(said) < 20_000, "nobody reads that"
        assert _listing(folder) == before
        passed.add(hash(written))

    holds()
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - began) / 1e3
    assert grown < MOST, f"{grown:.0f} MB"
    assert found["refused"] > 0.5 * count, found
    assert found["read"] > 0, "what is whole is not read either"
    return found


def _listing(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}
