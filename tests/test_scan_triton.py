"""The GPU kernels against the loop: natively on a GPU, elsewhere in triton's interpreter.

CPU builds of torch come without triton; there these tests are skipped.
"""

from dataclasses import replace

import pytest
import torch
from test_credit import random_grid

from hiper_lab import scan
from hiper_lab.credit import CreditConfig, TurnGrid, Values, hae

pytest.importorskip("triton", reason="triton is not installed (CUDA builds of torch bring it)")
from hiper_lab import scan_triton  # after conftest.py has chosen the interpreter or the GPU

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SHAPES = [(1, 1), (5, 2), (7, 11), (3, 40)]
CLOSE = {"rtol": 1e-5, "atol": 2e-6}


@pytest.fixture(autouse=True)
def _small_tiles(monkeypatch):
    """So that small batches take several programs, of several rows or one."""
    monkeypatch.setattr(scan_triton, "TILE", 32)


@pytest.mark.parametrize("shape", [*SHAPES, (1, 1024)])
def test_scan_equals_the_loop(shape):
    b, c = torch.randn(shape), 2 * torch.rand(shape) - 1
    y = scan.reverse_scan(b.to(DEVICE), c.to(DEVICE), "triton").cpu()
    torch.testing.assert_close(y, scan.reverse_scan(b, c, "loop"), **CLOSE)


def test_scan_takes_any_number_of_axes_and_strides():
    b, c = torch.randn(4, 6, 2).movedim(-1, 0), torch.rand(2, 4, 6)
    y = scan.reverse_scan(b.to(DEVICE), c.to(DEVICE), "triton").cpu()
    torch.testing.assert_close(y, scan.reverse_scan(b, c, "loop"), **CLOSE)


@pytest.mark.parametrize("truncation", ["final_state", "own_state", "zero"])
@pytest.mark.parametrize("form", ["return", "value"])
@pytest.mark.parametrize("shape", SHAPES)
def test_all_three_levels_equal_the_loops(shape, form, truncation, monkeypatch):
    """Padding, which holds NaN here, and what is not read included."""
    config = CreditConfig(0.9, 0.8, 0.7, 0.6, switch_advantage=form, truncation=truncation)
    grid, values, _ = random_grid(sum(shape), *shape, dtype=torch.float32)
    values = values._replace(final=torch.where(grid.terminated, torch.nan, values.final))
    expected = hae(grid, values, config)
    grid = TurnGrid(*(x if x is None else x.to(DEVICE) for x in grid))
    values = Values(*(v.to(DEVICE) for v in values))
    monkeypatch.setattr("hiper_lab.credit.choose_method", lambda *_: "triton")
    for name, x, y in zip(expected._fields, hae(grid, values, config), expected, strict=True):
        torch.testing.assert_close(x.cpu(), y, msg=lambda m, name=name: f"{name}: {m}", **CLOSE)


@pytest.mark.parametrize("change", [
    {"lam_boundary": 0.0}, {"lam_boundary": 1.0, "lam_low": 1.0},
    {"lam_boundary": 0.0, "boundary_value": "low"}, {"lam_boundary": 0.6, "boundary_value": "low"},
])  # fmt: skip
def test_ends_of_the_boundary_lambda(change, monkeypatch):
    config = replace(CreditConfig.lab(), **change)
    grid, values, _ = random_grid(3, 4, 9, dtype=torch.float32)
    expected = hae(grid, values, config)
    grid = TurnGrid(*(x if x is None else x.to(DEVICE) for x in grid))
    monkeypatch.setattr("hiper_lab.credit.choose_method", lambda *_: "triton")
    credit = hae(grid, Values(*(v.to(DEVICE) for v in values)), config)
    torch.testing.assert_close(credit.low.cpu(), expected.low, **CLOSE)
    torch.testing.assert_close(credit.switch.cpu(), expected.switch, **CLOSE)


def test_too_many_turns_are_refused():
    with pytest.raises(ValueError, match="1025 turns, expected at most 1024"):
        scan_triton.reverse_scan(torch.zeros(1, 1025), torch.zeros(1, 1025))


@pytest.mark.gpu
def test_a_gpu_takes_the_kernel_by_itself():
    grid, values, _ = random_grid(0, 300, 50, dtype=torch.float32)
    expected = hae(grid, values, CreditConfig.lab())
    credit = hae(TurnGrid(*(x.cuda() for x in grid)), Values(*(v.cuda() for v in values)),
                 CreditConfig.lab())  # fmt: skip
    assert scan.choose_method((300, 50), torch.device("cuda")) == "triton"
    for x, y in zip(credit, expected, strict=True):
        torch.testing.assert_close(x.cpu(), y, **CLOSE)
