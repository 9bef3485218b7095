"""Solve ``y_t = b_t + c_t * y_{t+1}`` along the last axis: the one loop behind every estimator.

Nothing here knows about rewards, values or segments. `hiper_lab.credit` writes each level of
credit as such a recurrence, so making credit fast means making this one function fast.
"""

import math
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import pad


def reverse_scan(
    b: Float[Tensor, "*batch turn"],
    c: Float[Tensor, "*batch turn"],
    method: str = "auto",
) -> Float[Tensor, "*batch turn"]:
    """Run a linear recurrence backwards in time.

        yₜ = bₜ + cₜ yₜ₊₁        with y = 0 after the last column

    Args:
        b: What each turn adds, at times [0, T).
        c: How much of the next turn's result flows back into this one, at times [0, T).
            Zero cuts the flow; the last column has nothing to multiply and is never read.
        method: ``"loop"`` (T steps, the definition), ``"doubling"`` (⌈log₂ T⌉ steps) or
            ``"auto"``, which asks `choose_method`. They agree to 1e-6 in float32.

    Returns:
        y, in float32 or, if an input is float64, in float64.

    Raises:
        ValueError: If the shapes differ, there is no column, or the method is unknown.

    Example:
        A return with discount 0.5, cut between the second and the third turn.

        >>> b = torch.tensor([[1., 1., 0., 4.]])
        >>> c = torch.tensor([[.5, 0., .5, .5]])
        >>> reverse_scan(b, c)
        tensor([[1.5000, 1.0000, 2.0000, 4.0000]])

    References:
        Doubling is recursive doubling: Kogge & Stone 1973; Blelloch 1990 (prefix sums).
    """
    if b.shape != c.shape:
        raise ValueError(f"b has shape {tuple(b.shape)} and c {tuple(c.shape)}, expected equal")
    if b.shape[-1] == 0:
        raise ValueError("b and c have no turns, expected at least one column")
    dtype = torch.promote_types(torch.promote_types(b.dtype, c.dtype), torch.float32)
    if method == "auto":
        method = choose_method(tuple(b.shape), b.device)
    if method == "loop":
        return _loop(b.to(dtype), c.to(dtype))
    if method == "doubling":
        return _doubling(b.to(dtype), c.to(dtype))
    raise ValueError(f"method is {method!r}, expected 'auto', 'loop' or 'doubling'")


def choose_method(shape: tuple[int, ...], device: torch.device) -> Literal["loop", "doubling"]:
    """Pick the faster method for a grid of this shape on this device.

    The loop does the least arithmetic, T passes over one column each; doubling needs only
    ⌈log₂ T⌉ passes, over the whole grid. A pass has a fixed price (a kernel launch on a GPU),
    so doubling wins on a GPU, and on a CPU until columns are long enough to hide that price:
    measured on one core, at about 1,000 rows.

    >>> choose_method((128, 50), torch.device("cpu"))
    'doubling'
    >>> choose_method((4096, 50), torch.device("cpu"))
    'loop'
    """
    rows = math.prod(shape[:-1])
    return "loop" if device.type == "cpu" and rows >= 1024 else "doubling"


def _loop(b: Tensor, c: Tensor) -> Tensor:
    """The definition, one column after the other from the last to the first."""
    y, columns = torch.zeros_like(b[..., 0]), []
    for b_t, c_t in zip(reversed(b.unbind(-1)), reversed(c.unbind(-1)), strict=True):
        y = b_t + c_t * y
        columns.append(y)
    return torch.stack(columns[::-1], dim=-1)


def _doubling(b: Tensor, c: Tensor) -> Tensor:
    """Each pass doubles how many turns ahead y already sums: 1, 2, 4, ... columns."""
    y, step = b, 1
    while step < b.shape[-1]:
        y = y + c * pad(y[..., step:], (0, step))
        c = c * pad(c[..., step:], (0, step))
        step *= 2
    return y
