"""What every test shares: one thread, no network, fixed seeds, notebook comparison by content."""

import os
import random
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # for notebook kernels and subprocesses too
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import numpy as np
import pytest
import torch
from jaxtyping import install_import_hook

torch.set_num_threads(1)
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when triton is first imported
# Check shapes and dtypes where a wrong one would still give a number; an int may stand for a float.
install_import_hook(
    [f"hiper_lab.{module}" for module in ("scan", "grid", "flat", "credit", "policy", "objective")],
    "beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True))",
)
SKIP_COMPARE = ("text/html", "application/vnd.plotly.v1+json")


class _Notebooks:
    """nbval compares text; pictures are never evidence (print the numbers below them instead)."""

    def pytest_collectstart(self, collector: pytest.Collector) -> None:
        if hasattr(collector, "skip_compare"):  # nbval's notebook file
            collector.skip_compare += SKIP_COMPARE


def pytest_configure(config: pytest.Config) -> None:
    # registered by hand: a hook of this file itself would only see what lies under tests/
    if config.pluginmanager.hasplugin("nbval"):
        config.pluginmanager.register(_Notebooks(), "hiper_lab_notebooks")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available():
        reason = pytest.mark.skip(reason="needs a CUDA device")
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(reason)


@pytest.fixture(autouse=True)
def _cpu_unless_asked(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is exact, or as large as memory is pretended to be, is so on a CPU only."""
    if torch.cuda.is_available() and not request.node.get_closest_marker("gpu"):
        monkeypatch.setattr("hiper_lab.policy.fastest_device", lambda: "cpu")


@pytest.fixture(autouse=True)
def _seeds() -> None:
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def root() -> Path:
    """The repository."""
    return Path(__file__).parents[1]


@pytest.fixture(scope="session")
def shared(root: Path) -> Path:
    """The folder of large material beside the repository; without it the test is skipped."""
    path = root.parent / "shared"
    if not path.is_dir():
        pytest.skip("no shared/ folder beside the repository")
    return path
