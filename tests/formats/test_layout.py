"""Shapes of stored tensors: groups, the ragged last group, the pad column of an odd K."""

from __future__ import annotations

import pytest
import torch

from olive.formats import GROUP_SIZES, check_group_size, codes_shape, groups_per_row, scale_shape
from olive.formats.layout import expand_scale, pad_columns


def test_known_group_sizes_pass() -> None:
    assert [check_group_size(size) for size in GROUP_SIZES] == [-1, 0, 32, 64, 128]


@pytest.mark.parametrize("size", [1, 16, 31, 100, 256, -2])
def test_unknown_group_size_is_rejected(size: int) -> None:
    with pytest.raises(ValueError, match=rf"group_size: expected one of -1 \(per channel\).*, got {size}"):
        check_group_size(size)


@pytest.mark.parametrize("size", [128.0, "128", None, True])
def test_group_size_of_another_type_is_rejected(size: object) -> None:
    with pytest.raises(TypeError, match=f"g: expected int, got {type(size).__name__}"):
        check_group_size(size, "g")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("columns", "group_size", "groups"),
    [(128, 128, 1), (129, 128, 2), (200, 128, 2), (1, 32, 1), (96, 32, 3), (97, -1, 1), (97, 0, 1)],
)
def test_last_group_may_be_short(columns: int, group_size: int, groups: int) -> None:
    assert groups_per_row(columns, group_size) == groups
    assert scale_shape(5, columns, group_size) == (1 if group_size == 0 else 5, groups)


def test_codes_shape_rounds_odd_k_up() -> None:
    assert codes_shape(3, 8) == (3, 4)
    assert codes_shape(3, 7) == (3, 4)
    assert codes_shape(3, 1) == (3, 1)
    assert codes_shape(3, 7, bits=8) == (3, 8)


def test_pad_columns_keeps_what_needs_no_padding() -> None:
    matrix = torch.ones(2, 3)
    assert pad_columns(matrix, 3) is matrix
    assert torch.equal(pad_columns(matrix, 2), torch.tensor([[1.0, 1, 1, 0], [1, 1, 1, 0]]))


def test_expand_scale_repeats_each_group_over_its_columns() -> None:
    scale = torch.tensor([[1, 2], [3, 4]], dtype=torch.int16)
    expanded = expand_scale(scale, 2, 35, 32)
    assert expanded.dtype == torch.int16
    assert expanded.shape == (2, 36)
    assert torch.equal(expanded[1], torch.tensor([3] * 32 + [4] * 4, dtype=torch.int16))
    assert torch.equal(
        expand_scale(scale[:, :1], 2, 3, -1), torch.tensor([[1] * 4, [3] * 4], dtype=torch.int16)
    )
    assert torch.equal(expand_scale(scale[:1, :1], 2, 3, 0), torch.ones(2, 4, dtype=torch.int16))
    # K = 33: the pad column belongs to the second group
    assert torch.equal(expand_scale(scale, 2, 33, 32)[0, 31:], torch.tensor([1, 2, 2], dtype=torch.int16))
