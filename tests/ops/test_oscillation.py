"""`oscillation_`: a sequence worked out by hand, thresholds, groups, NaN, and what it rejects."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from olive import ops
from tests.ops.cpu_cases import DTYPES, strided

STATSQ, LSQ = 0.0, 0.5


class State(NamedTuple):
    codes: Tensor
    direction: Tensor
    frequency: Tensor


def _state(*shape: int, code: int = 0) -> State:
    codes = torch.full(shape, code, dtype=torch.int8)
    return State(codes, torch.zeros_like(codes), torch.zeros(shape))


def _one(values: list[float]) -> Tensor:
    return torch.tensor([values])


def test_a_sequence_by_hand() -> None:
    """Steps of 2, codes -2..1, momentum 1/4: what three weights do at five calls."""
    state = _state(1, 3)
    step = torch.tensor([[2.0]])
    calls: list[tuple[list[float], list[int], list[int], list[float]]] = [
        # weights, codes, directions, frequencies
        ([1.0, 3.0, -9.0], [0, 1, -2], [0, 1, -1], [0.0, 0.0, 0.0]),  # a first change is no oscillation
        ([-1.0, 1.9, -9.0], [-1, 0, -2], [-1, -1, -1], [0.0, 0.25, 0.0]),  # up, then down
        ([-3.0, 2.1, 9.0], [-2, 1, 1], [-1, 1, 1], [0.0, 0.4375, 0.25]),  # twice down is none; a jump is one
        ([-3.0, 2.1, 9.0], [-2, 1, 1], [-1, 1, 1], [0.0, 0.328125, 0.1875]),  # no change: they fade
        ([0.0, -0.0, 3.9], [0, 0, 1], [1, -1, 1], [0.25, 0.49609375, 0.140625]),
    ]
    for weight, codes, direction, frequency in calls:
        ops.oscillation_(_one(weight), step, STATSQ, -2, 1, 0.25, 0.0, *state)
        assert state.codes.tolist() == [codes]
        assert state.direction.tolist() == [direction]
        assert state.frequency.tolist() == [frequency]


def test_where_thresholds_are() -> None:
    weight = _one([-2.5, -2.0, -1.5, -1.0, -0.5, -0.25, 0.0, 0.25, 0.5, 1.0, 1.5, 7.0])
    state = _state(1, 12)
    near = ops.oscillation_(weight, torch.ones(1, 1), STATSQ, -2, 1, 0.1, 0.25, *state)
    assert state.codes.tolist() == [[-2, -2, -2, -1, -1, -1, 0, 0, 0, 1, 1, 1]]
    assert near.tolist() == [[False, False, False, True, False, True, True, True, False, True, False, False]]
    near = ops.oscillation_(weight, torch.ones(1, 1), LSQ, -2, 1, 0.1, 0.25, *state)
    assert state.codes.tolist() == [[-2, -2, -1, -1, 0, 0, 0, 0, 1, 1, 1, 1]]
    assert near.tolist() == [[False, False, True, False, True, True, False, True, True, False, False, False]]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("group_size", [-1, 16])
@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_codes_and_margins_are_those_of_statsq(bits: int, group_size: int, dtype: torch.dtype) -> None:
    weight = (3 * torch.randn(6, 2, 24)).to(dtype)
    codes, scale = ops.statsq_codes(weight, bits, group_size)
    half = 2 ** (bits - 1)
    state = _state(6, 2, 24)
    near = ops.oscillation_(weight, scale / half, STATSQ, -half, half - 1, 0.02, 0.1, *state)
    assert torch.equal(state.codes, codes)
    assert torch.equal(near, ops.statsq_margin(weight, bits, group_size) <= 0.1)


def test_codes_are_those_of_lsq() -> None:
    weight, scale = torch.randn(6, 50), 0.1 + torch.rand(6)
    state = _state(6, 50)
    ops.oscillation_(weight, scale[:, None], LSQ, -4, 3, 0.02, 0.0, *state)
    assert torch.allclose(state.codes * scale[:, None], ops.lsq(weight, scale, 3, True, 0))


def test_the_last_group_may_be_shorter_and_one_step_may_serve_all() -> None:
    weight = torch.randn(3, 10)
    step = torch.tensor([[1.0, 2.0, 3.0]]).repeat(3, 1)
    grouped, whole = _state(3, 10), _state(3, 10)
    ops.oscillation_(weight, step, STATSQ, -8, 7, 0.1, 0.1, *grouped)
    widths = torch.tensor([1.0, 1, 1, 1, 2, 2, 2, 2, 3, 3])
    ops.oscillation_(weight / widths, torch.ones(1, 1), STATSQ, -8, 7, 0.1, 0.1, *whole)
    assert torch.equal(grouped.codes, whole.codes)


def test_extremes_have_codes_in_range() -> None:
    nan, inf = float("nan"), float("inf")
    weight = _one([nan, inf, -inf, 1e38, -1e38, -0.0, 3e-45])
    state = _state(1, 7)
    near = ops.oscillation_(weight, torch.ones(1, 1), STATSQ, -8, 7, 0.1, 0.5, *state)
    assert state.codes.tolist() == [[0, 7, -8, 7, -8, 0, 0]]
    assert near.tolist() == [[False, False, False, False, False, True, True]]
    ops.oscillation_(weight, torch.ones(1, 1), STATSQ, 2, 7, 0.1, 0.5, *state)
    assert state.codes[0, 0] == 2  # the nearest to 0
    near = ops.oscillation_(weight, torch.zeros(1, 1), STATSQ, -8, 7, 0.1, 0.5, *state)
    assert state.codes.tolist() == [[0] * 7]
    assert near.tolist() == [[False] + [True] * 6]


def test_the_whole_range_of_codes_may_be_crossed() -> None:
    state = _state(1, 1)
    for weight, direction in ((200.0, 1), (-200.0, -1), (200.0, 1)):
        ops.oscillation_(_one([weight]), torch.ones(1, 1), STATSQ, -128, 127, 1.0, 0.0, *state)
        assert state.direction.item() == direction
    assert state.frequency.item() == 1.0


def test_tensors_need_not_be_contiguous() -> None:
    weight, step = torch.randn(5, 30), 0.5 + torch.rand(5, 3)
    dense, spread = _state(5, 30), State(*(strided(part) for part in _state(5, 30)))
    for turn in range(3):
        moved = weight + 0.3 * turn
        near = ops.oscillation_(moved, step, LSQ, -4, 3, 0.3, 0.1, *dense)
        other = ops.oscillation_(strided(moved), strided(step), LSQ, -4, 3, 0.3, 0.1, *spread)
        assert torch.equal(near, other) and other.is_contiguous()
    assert all(torch.equal(*pair) for pair in zip(dense, spread, strict=True))


def test_as_an_operator() -> None:
    arguments: tuple[Any, ...] = (torch.randn(4, 12), torch.full((4, 3), 0.4), 0.5, -4, 3, 0.1, 0.1)
    torch.library.opcheck(torch.ops.olive.oscillation_.default, (*arguments, *_state(4, 12)))


def test_weights_in_training_may_be_watched() -> None:
    weight, state = torch.randn(4, 12, requires_grad=True), _state(4, 12)
    near = ops.oscillation_(weight, torch.full((4, 1), 0.4), LSQ, -4, 3, 0.1, 0.1, *state)
    assert not near.requires_grad and not state.frequency.requires_grad
    (weight * ~near).sum().backward()
    assert torch.equal(weight.grad, (~near).float())


def test_bad_arguments() -> None:
    weight, step, state = torch.randn(4, 12), torch.ones(4, 1), _state(4, 12)

    def call(
        weight: Tensor = weight,
        step: Tensor = step,
        qmin: int = -4,
        qmax: int = 3,
        momentum: float = 0.1,
        state: tuple[Tensor, ...] = state,
    ) -> None:
        ops.oscillation_(weight, step, 0.0, qmin, qmax, momentum, 0.0, *state)

    with pytest.raises(TypeError, match=r"weight: expected float32, bfloat16 or float16, got torch\.float64"):
        call(weight.double())
    with pytest.raises(ValueError, match=r"weight: expected shape \[N, \.\.\.\], not empty, got \(12,\)"):
        call(weight[0])
    with pytest.raises(TypeError, match=r"step: expected torch\.float32, got torch\.float64"):
        call(step=step.double())
    for shape in ((4,), (3, 1), (4, 0), (4, 7)):  # seven groups of two columns would need fourteen
        with pytest.raises(ValueError, match=r"step: expected shape \[4, G\] for G groups of equal width"):
            call(step=torch.ones(shape))
    for qmin, qmax in ((-129, 3), (-4, 128), (3, 3)):
        with pytest.raises(ValueError, match="qmin, qmax: expected -128 <= qmin < qmax <= 127, got"):
            call(qmin=qmin, qmax=qmax)
    with pytest.raises(ValueError, match=r"momentum: expected 0 to 1, got 1\.5"):
        call(momentum=1.5)
    for position, name in enumerate(("codes", "direction", "frequency")):
        wrong = list(state)
        wrong[position] = torch.zeros(4, 12, dtype=torch.int32)
        with pytest.raises(TypeError, match=f"{name}: expected torch"):
            call(state=tuple(wrong))
        wrong[position] = state[position][:2]
        with pytest.raises(ValueError, match=rf"{name}: expected shape \(4, 12\), got \(2, 12\)"):
            call(state=tuple(wrong))
    with pytest.raises(ValueError, match="weight: expected every tensor on one device"):
        call(step=step.to("meta"))
