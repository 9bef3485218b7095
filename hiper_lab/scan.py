"""Solve ``y_t = b_t + c_t * y_{t+1}`` along the last axis: the one loop behind every estimator.

Nothing here knows about rewards, values or segments. `hiper_lab.credit` writes each level of
credit as such a recurrence, so making credit fast means making this one function fast.
"""

import math
from functools import cache
from importlib.util import find_spec
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
        method: ``"loop"`` (T steps, the definition), ``"doubling"`` (⌈log₂ T⌉ steps), ``"triton"``
            (one launch on a GPU) or ``"auto"``, which asks `choose_method`. They agree to 1e-6 in
            float32. Only doubling can be differentiated; ``"auto"`` knows.

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
    b, c = b.to(dtype), c.to(dtype)
    if method == "auto":
        needs_gradient = torch.is_grad_enabled() and (b.requires_grad or c.requires_grad)
        method = "doubling" if needs_gradient else choose_method(b.shape, b.device, dtype)
    if method == "loop":
        return _loop(b, c)
    if method == "doubling":
        return _doubling(b, c)
    if method == "triton":
        from hiper_lab import scan_triton  # needs a GPU: never import it without

        return scan_triton.reverse_scan(b, c)
    raise ValueError(f"method is {method!r}, expected 'auto', 'loop', 'doubling' or 'triton'")


def choose_method(
    shape: tuple[int, ...], device: torch.device, dtype: torch.dtype = torch.float32
) -> Literal["loop", "doubling", "triton"]:
    """Which method is used for a grid of this shape, on this device, in this precision.

    - A CUDA device, float32, at most 1,024 turns, triton installed: ``"triton"``. `reverse_scan`
      is then one launch, and so is the whole of `hiper_lab.credit.hae`.
    - Any other accelerator, or triton unfit: ``"doubling"``, for its ⌈log₂ T⌉ passes over the whole
      grid are few launches.
    - A CPU, from 256 trajectories on: ``"loop"``. It does the least arithmetic, T passes over one
      column each, in no memory but the result's.
    - A CPU, fewer trajectories: ``"doubling"``, since starting a pass costs more than the pass.

    The bounds are measured, see ``benchmarks/README.md``.

    >>> choose_method((128, 50), torch.device("cpu"))
    'doubling'
    >>> choose_method((4096, 50), torch.device("cpu"))
    'loop'
    """
    if device.type == "cpu":
        return "loop" if math.prod(shape[:-1]) >= 256 else "doubling"
    fits = device.type == "cuda" and dtype == torch.float32 and shape[-1] <= 1024
    return "triton" if fits and _has_triton() else "doubling"


@cache
def _has_triton() -> bool:
    return find_spec("triton") is not None


def _loop(b: Tensor, c: Tensor) -> Tensor:
    """The definition, one column after the other from the last to the first, in place."""
    result = b.clone(memory_format=torch.contiguous_format)
    y, c = result.unbind(-1), c.unbind(-1)
    for t in reversed(range(len(y) - 1)):
        y[t].addcmul_(c[t], y[t + 1])
    return result


def _doubling(b: Tensor, c: Tensor) -> Tensor:
    """Each pass doubles how many turns ahead y already sums: 1, 2, 4, ... columns."""
    y, step = b, 1
    while step < b.shape[-1]:
        y = y + c * pad(y[..., step:], (0, step))
        c = c * pad(c[..., step:], (0, step))
        step *= 2
    return y
