"""The scan against its own definition; nothing about RL."""

from importlib.util import find_spec

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hiper_lab.scan import choose_method, reverse_scan

METHODS = ["loop", "doubling"]


def random_pair(shape, seed, dtype=torch.float32):
    """b from a normal; c in [-1, 1] with a quarter of it cut to 0, as at segment ends."""
    generator = torch.Generator().manual_seed(seed)
    b = torch.randn(shape, generator=generator, dtype=dtype)
    c = 2 * torch.rand(shape, generator=generator, dtype=dtype) - 1
    return b, torch.where(torch.rand(shape, generator=generator) < 0.25, 0, c)


@pytest.mark.parametrize("method", ["auto", *METHODS])
def test_hand_numbers(method):
    b = torch.tensor([1.0, 2.0, 3.0, 4.0])
    c = torch.tensor([0.5, 0.0, 2.0, 9.0])  # the last one multiplies nothing
    # y3 = 4, y2 = 3 + 2*4, y1 = 2 + 0*11, y0 = 1 + .5*2
    assert reverse_scan(b, c, method).tolist() == [2.0, 2.0, 11.0, 4.0]


@pytest.mark.parametrize("method", METHODS)
def test_one_column_is_b(method):
    b, c = random_pair((3, 1), 0)
    assert torch.equal(reverse_scan(b, c, method), b)


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 2**32), st.integers(1, 9), st.integers(1, 70))
def test_methods_agree(seed, traj, turn):
    b, c = random_pair((traj, turn), seed)
    scale = reverse_scan(b.abs(), c.abs(), "loop").clamp(min=1)
    gap = (reverse_scan(b, c, "loop") - reverse_scan(b, c, "doubling")).abs()
    assert (gap / scale).max() <= 1e-6


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("shape", [(7,), (2, 16), (2, 3, 17)])
def test_every_turn_satisfies_the_recurrence(method, shape):
    b, c = random_pair(shape, 1, torch.float64)
    y = reverse_scan(b, c, method)
    torch.testing.assert_close(y[..., :-1], b[..., :-1] + c[..., :-1] * y[..., 1:])
    torch.testing.assert_close(y[..., -1], b[..., -1])


@pytest.mark.parametrize("method", METHODS)
def test_inputs_are_left_alone(method):
    b, c = random_pair((2, 9), 2)
    before = b.clone(), c.clone()
    reverse_scan(b, c, method)
    assert torch.equal(b, before[0]) and torch.equal(c, before[1])


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    "given_dtype, computed",
    [
        (torch.bfloat16, torch.float32),
        (torch.float16, torch.float32),
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
    ],
)
def test_at_least_float32(method, given_dtype, computed):
    b, c = (x.to(given_dtype) for x in random_pair((2, 30), 3))
    y = reverse_scan(b, c, method)
    assert y.dtype == computed
    torch.testing.assert_close(y, reverse_scan(b.double(), c.double(), method).to(computed))


def test_choice_is_a_method():
    for shape in [(5,), (1, 1), (128, 50), (4096, 50), (2, 3, 4)]:
        assert choose_method(shape, torch.device("cpu")) in METHODS
    # what cannot be one launch of the kernel: too long, double precision, no CUDA
    cuda = torch.device("cuda")
    assert choose_method((4096, 1025), cuda) == "doubling"
    assert choose_method((4096, 50), cuda, torch.float64) == "doubling"
    assert choose_method((4096, 50), torch.device("mps")) == "doubling"
    assert choose_method((4096, 50), cuda) == ("triton" if find_spec("triton") else "doubling")


def test_gradients_flow_whatever_the_size():
    """The loop works in place and has none, so `auto` must not take it."""
    b, c = random_pair((300, 6), 4, torch.float64)
    b.requires_grad_()
    (gradient,) = torch.autograd.grad(reverse_scan(b, c)[0, 0], b)
    expected = torch.cat([torch.ones(1), c[0, :-1].cumprod(0)])
    torch.testing.assert_close(gradient[0], expected)
    assert not gradient[1:].any()


def test_errors():
    b = torch.zeros(2, 3)
    with pytest.raises(ValueError, match="method is 'fast', expected 'auto', 'loop', 'doubling'"):
        reverse_scan(b, b, "fast")
    with pytest.raises(ValueError, match="no turns"):
        reverse_scan(b[:, :0], b[:, :0])
