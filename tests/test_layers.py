"""A module imports only from modules below it. A new file has to be given its place here."""

import ast
from pathlib import Path

import pytest

LAYERS = """
    scan_triton scan grid flat credit protocol trajectory records
    envs envs.base envs.household envs.games envs.catalogue envs.shop envs.webshop envs.shopper
    envs.alfworld envs.express envs.pool envs.probes
    policy sampling rollout objective vllm_sampler parallel memory config worlds folder train
    truth warmstart budget
    stats results figures pages widgets launcher sweeps runs
""".split()
PACKAGE = Path(__file__).parents[1] / "hiper_lab"
BANNED = {
    "figures": {"torch"},
    "stats": {"transformers"},
    "results": {"transformers"},
    "widgets": {"transformers"},
}


def problems(name: str, source: str) -> list[str]:
    """What this module imports although it must not; also imports inside functions."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            imported = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            if node.level:
                found.append(f"{name} has a relative import")
            imported = [node.module or ""]
            if node.module in ("hiper_lab", "hiper_lab.envs"):  # from hiper_lab import credit
                imported += [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        for module in imported:
            top, _, inner = module.partition(".")
            if top in BANNED.get(name, ()):
                found.append(f"{name} imports {top}")
            # (hiper_lab.__version__ and the like are no modules)
            if top == "hiper_lab" and inner in LAYERS[LAYERS.index(name) :]:
                found.append(f"{name} imports {inner}, which is not below it")
    return found


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__")


MODULES = sorted(path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py")


@pytest.mark.parametrize("path", MODULES, ids=module_name)
def test_imports_point_down(path):
    assert module_name(path) in LAYERS, f"{path.name} is new: give it a place in LAYERS"
    assert problems(module_name(path), path.read_text()) == []


def test_the_package_itself_imports_nothing():
    """So that `import hiper_lab` is instant, and `figures` does not pull in a model."""
    tree = ast.parse((PACKAGE / "__init__.py").read_text())
    assert not [node for node in ast.walk(tree) if isinstance(node, ast.Import | ast.ImportFrom)]


@pytest.mark.parametrize(
    ("name", "source", "expected"),
    [
        ("credit", "from hiper_lab.scan import reverse_scan", 0),
        ("credit", "import hiper_lab\nimport torch\nfrom hiper_lab import __version__", 0),
        ("credit", "from hiper_lab.train import train", 1),
        ("credit", "from hiper_lab import train, scan", 1),
        ("credit", "def later():\n    import hiper_lab.policy", 1),
        ("envs.household", "from hiper_lab.envs import games", 1),
        ("envs.games", "from hiper_lab.envs.household import load_game", 0),
        ("scan", "from . import credit", 1),
        ("scan", "from hiper_lab.scan import reverse_scan", 1),
        ("figures", "from torch import nn", 1),
        ("figures", "import torch.nn", 1),
        ("widgets", "import transformers", 1),
    ],
)
def test_the_checker_finds_what_is_wrong(name, source, expected):
    assert len(problems(name, source)) == expected
