"""What gets installed: a wheel with `adamerge` alone, and a clone whose other folders import from anywhere."""

import shutil
import subprocess
import sys
import tomllib
import zipfile
from email import message_from_string
from pathlib import Path

import pytest

import adamerge

ROOT = Path(__file__).resolve().parents[1]
TOP = ("adamerge", "modules", "trainers", "configs", "tests", "benchmarks")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> zipfile.ZipFile:
    """The wheel, built from a copy, so that no leftover of an earlier build gets in and the checkout stays clean."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for folder in TOP:
        shutil.copytree(ROOT / folder, source / folder, ignore=shutil.ignore_patterns("__pycache__"))
    for file in ("pyproject.toml", "README.md", "LICENSE", "train.py"):
        shutil.copy(ROOT / file, source)
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", out, source]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    (path,) = out.iterdir()
    with zipfile.ZipFile(path) as archive:
        yield archive


def test_the_wheel_carries_adamerge_alone(wheel):
    top = {name.split("/")[0] for name in wheel.namelist()}
    assert top == {"adamerge", f"adamerge-{adamerge.__version__}.dist-info"}


def test_the_wheel_carries_every_file_of_adamerge(wheel):
    package = ROOT / "adamerge"
    files = {path.relative_to(ROOT).as_posix() for path in package.rglob("*") if path.is_file()}
    files = {name for name in files if "__pycache__" not in name}
    assert {name for name in wheel.namelist() if name.startswith("adamerge/")} == files
    assert "adamerge/py.typed" in files


def test_the_wheel_says_what_it_is(wheel):
    folder = f"adamerge-{adamerge.__version__}.dist-info"
    metadata = message_from_string(wheel.read(f"{folder}/METADATA").decode())
    assert metadata["Version"] == adamerge.__version__
    assert metadata["License-Expression"] == "Apache-2.0"
    assert f"{folder}/licenses/LICENSE" in wheel.namelist()
    assert "adamerge = adamerge.__main__:main" in wheel.read(f"{folder}/entry_points.txt").decode()


def test_dependencies_have_lower_bounds_and_no_upper_ones():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = [
        *project["dependencies"],
        *(name for names in project["optional-dependencies"].values() for name in names),
    ]
    for requirement in wanted:
        assert ">=" in requirement, requirement
        assert not any(sign in requirement for sign in ("<", "==", "~=", "!=")), requirement


def test_the_clone_imports_from_another_directory(tmp_path):
    """`pip install -e .`, which made this environment, puts the clone on the path; generic names and all."""
    code = "import adamerge, modules, trainers; print(adamerge.__file__, modules.__file__, trainers.__file__)"
    command = [sys.executable, "-I", "-c", code]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert [Path(name).parent for name in done.stdout.split()] == [ROOT / name for name in TOP[:3]]
