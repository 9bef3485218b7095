"""The recurrences of `hiper_lab.scan` on a GPU: one launch, one pass over memory.

Import this only where there is a GPU and triton (`hiper_lab.scan.choose_method` says so); nothing
else in the package needs either. With ``TRITON_INTERPRET=1`` it also runs, slowly, on a CPU.

A backward recurrence is a chain of affine maps, y_t = f_t(y_{t+1}), and composing maps is
associative: so the turns of a trajectory need no loop but a parallel prefix scan. The three levels
of HAE are one such chain, over the vector (high, low, switch), because low and switch only ever
look at the high level of the turn after.

Left out on purpose: float64, more than 1,024 turns, and gradients.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

MAX_TURNS = 1024
TILE = 1024  # turns per program: short trajectories share one
TRUNCATION = {"final_state": 0, "own_state": 1, "zero": 2}


def reverse_scan(b: Tensor, c: Tensor) -> Tensor:
    """`hiper_lab.scan.reverse_scan` of float32 tensors [..., turn]."""
    shape = b.shape
    b, c = (x.reshape(-1, shape[-1]).contiguous() for x in (b, c))
    y = torch.empty_like(b)
    grid, rows, columns = _tiles(*b.shape)
    with torch.cuda.device_of(b):
        _reverse_scan[grid](b, c, y, *b.shape, rows, columns)
    return y.reshape(shape)


def hae(
    reward: Tensor,
    boundary: Tensor,
    terminated: Tensor,
    length: Tensor,
    v_high: Tensor,
    v_low: Tensor,
    v_switch: Tensor,
    final: Tensor,
    *,
    gamma: float,
    lam_low: float,
    lam_high: float,
    lam_boundary: float,
    truncation: str,
    value_form: bool,
    low_boundary: bool,
) -> tuple[Tensor, ...]:
    """`hiper_lab.credit.hae` in one launch: the fields of a Credit, from float32 tensors.

    ``reward`` to ``length`` are those of a TurnGrid, ``v_high`` to ``final`` those of Values;
    ``value_form`` is ``switch_advantage == "value"``, ``low_boundary`` ``boundary_value == "low"``.
    """
    floats = [x.contiguous() for x in (reward, v_high, v_low, v_switch, final)]
    flags = [x.contiguous().view(torch.uint8) for x in (boundary, terminated)]
    out = torch.empty((6, *reward.shape), device=reward.device)
    grid, rows, columns = _tiles(*reward.shape)
    with torch.cuda.device_of(reward):
        _hae[grid](
            *floats, *flags, length.contiguous(), out, *reward.shape, reward.numel(), gamma,
            lam_low, lam_high, lam_boundary, TRUNCATION[truncation], value_form, low_boundary, rows,
            columns,
        )  # fmt: skip
    return out.unbind()


def _tiles(traj: int, turn: int) -> tuple[tuple[int], int, int]:
    """Launch grid, and rows and columns of the tile that each program takes."""
    if turn > MAX_TURNS:
        raise ValueError(f"trajectories have {turn} turns, expected at most {MAX_TURNS}")
    columns = triton.next_power_of_2(turn)
    rows = max(1, TILE // columns)
    return (triton.cdiv(traj, rows),), rows, columns


@triton.jit
def _after(b, c, b_now, c_now):
    """The map of this turn after that of all later ones: y = b_now + c_now (b + c y')."""
    return b_now + c_now * b, c_now * c


@triton.jit
def _after_three(h, hh, lo, ll, lh, s, ss, sh, h1, hh1, lo1, ll1, lh1, s1, ss1, sh1):
    """The same for (high, low, switch); ``lh`` is how much of high flows into low.

    First the later turns' map, then (with a 1) this turn's.
    """
    return (
        h1 + hh1 * h, hh1 * hh,
        lo1 + ll1 * lo + lh1 * h, ll1 * ll, ll1 * lh + lh1 * hh,
        s1 + ss1 * s + sh1 * h, ss1 * ss, ss1 * sh + sh1 * hh,
    )  # fmt: skip


@triton.jit
def _reverse_scan(b_in, c_in, y_out, traj, turn, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)[:, None]
    column = tl.arange(0, COLUMNS)[None, :]
    inside = (row < traj) & (column < turn)
    at = row * turn + column
    b = tl.load(b_in + at, inside, other=0.0)
    c = tl.load(c_in + at, inside & (column < turn - 1), other=0.0)
    y, _ = tl.associative_scan((b, c), 1, _after, reverse=True)
    tl.store(y_out + at, y, inside)


@triton.jit
def _hae(
    reward_in, high_in, low_in, switch_in, final_in, boundary_in, terminated_in, length_in, out,
    traj, turn, size, gamma, lam_low, lam_high, lam_boundary,
    TRUNCATION: tl.constexpr, VALUE_FORM: tl.constexpr, LOW_BOUNDARY: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)[:, None]
    column = tl.arange(0, COLUMNS)[None, :]
    at = row * turn + column
    length = tl.load(length_in + row, row < traj, other=0)
    terminated = tl.load(terminated_in + row, row < traj, other=1) != 0
    real, goes_on, last = column < length, column + 1 < length, column + 1 == length

    reward = tl.load(reward_in + at, real, other=0.0)
    v_high = tl.load(high_in + at, real, other=0.0)
    v_low = tl.load(low_in + at, real, other=0.0)
    v_switch = tl.load(switch_in + at, real, other=0.0)
    boundary = tl.load(boundary_in + at, real, other=0) != 0
    # The turn after, from the same lines of memory. (Values are not read where they may be NaN.)
    crossing = tl.load(boundary_in + at + 1, goes_on, other=0) != 0
    inside = goes_on & (crossing == 0)
    high_next = tl.load(high_in + at + 1, crossing, other=0.0)
    low_next = tl.load(low_in + at + 1, inside, other=0.0)

    # What stands for the future where a limit cut the episode.
    cut_high, cut_low = tl.zeros_like(reward), tl.zeros_like(reward)
    cut = last & (terminated == 0)
    if TRUNCATION == 0:
        cut_high = tl.load(final_in + row + 0 * column, cut, other=0.0)
        cut_low = cut_high
    if TRUNCATION == 1:
        opens = tl.max(tl.where(boundary, column, 0), 1)[:, None]
        opened = tl.sum(tl.where(column == opens, tl.where(boundary, v_high, 0.0), 0.0), 1)[:, None]
        cut_high, cut_low = tl.where(cut, opened, 0.0), tl.where(cut, v_low, 0.0)

    # One affine map per turn: constants, and what flows in from the turn after.
    beyond = high_next
    if LOW_BOUNDARY:
        beyond = tl.load(low_in + at + 1, crossing, other=0.0)
    arrival = tl.where(crossing, gamma * (1 - lam_boundary) * beyond, 0.0)
    from_high = tl.where(crossing, gamma * lam_boundary, 0.0)
    h = reward + gamma * (cut_high + tl.where(crossing, (1 - lam_high) * high_next, 0.0))
    hh = tl.where(inside, gamma, tl.where(crossing, gamma * lam_high, 0.0))
    lo = reward + gamma * (low_next + cut_low) + arrival - v_low
    ll = tl.where(inside, gamma * lam_low, 0.0)
    s = reward + gamma * cut_high + arrival
    ss = tl.where(inside, gamma, 0.0)
    h, _, low, _, _, target_switch, _, _ = tl.associative_scan(
        (h, hh, lo, ll, from_high, s, ss, from_high), 1, _after_three, reverse=True
    )

    high = tl.where(boundary, h - v_high, 0.0)
    if VALUE_FORM:
        target_switch = tl.where(boundary, v_high, v_low)
    switch = target_switch - v_switch
    if VALUE_FORM:
        switch = tl.where(column == 0, 0.0, switch)
    shown = (row < traj) & (column < turn)
    tl.store(out + at, high, shown)
    tl.store(out + at + size, tl.where(real, low, 0.0), shown)
    tl.store(out + at + 2 * size, tl.where(real, switch, 0.0), shown)
    tl.store(out + at + 3 * size, tl.where(boundary, h, 0.0), shown)
    tl.store(out + at + 4 * size, tl.where(real, low + v_low, 0.0), shown)
    tl.store(out + at + 5 * size, tl.where(real, target_switch, 0.0), shown)
