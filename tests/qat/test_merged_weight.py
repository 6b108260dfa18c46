"""`MergedWeight`: both projections multiplied and on levels, their gradients, and entries that freeze."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from olive.ops import statsq, statsq_codes, statsq_margin
from olive.qat.latent import latent_weights
from olive.qat.merged import MergedWeight
from olive.qat.weight_quantizers import StatsQ

COLUMNS, SIZE = 10, 3


def merged(heads: int = 4, groups: int = 2, bits: int = 3, group_size: int = -1) -> MergedWeight:
    query, key = nn.Linear(COLUMNS, heads * SIZE), nn.Linear(COLUMNS, groups * SIZE)
    return MergedWeight(query, key, heads, SIZE, StatsQ(bits, group_size))


def parameters(weight: MergedWeight) -> tuple[nn.Linear, nn.Linear]:
    return weight._projections


def product(weight: MergedWeight, query: Tensor, key: Tensor) -> Tensor:
    """The definition, head by head."""
    group = weight.heads * SIZE // key.shape[0]
    blocks = []
    for head in range(weight.heads):
        rows = query[head * SIZE : (head + 1) * SIZE]
        first = head // group * SIZE
        blocks.append(rows.t() @ key[first : first + SIZE])
    return torch.cat(blocks)


def equal(got: Tensor, expected: Tensor) -> bool:
    """Sums of three float32 products in any order."""
    return bool(((got - expected).abs() <= 1e-6 * (1 + expected.abs().max())).all())


@pytest.mark.parametrize(("heads", "groups"), [(4, 4), (4, 2), (4, 1), (1, 1)])
@pytest.mark.parametrize("group_size", [-1, 4])
def test_it_is_the_quantized_product(heads: int, groups: int, group_size: int) -> None:
    weight = merged(heads, groups, group_size=group_size)
    query, key = parameters(weight)
    latent = weight.latent()
    assert latent.shape == (heads * COLUMNS, COLUMNS)
    assert not latent.requires_grad
    assert equal(latent, product(weight, query.weight, key.weight).detach())
    assert torch.equal(weight(), statsq(latent, 3, group_size))
    assert weight.grid().step.shape == statsq_codes(latent, 3, group_size)[1].shape


def test_the_bias_of_queries_is_seen_by_each_key() -> None:
    weight = merged()
    query, key = parameters(weight)
    found = weight.key_bias()
    for head in range(4):
        rows = slice(head // 2 * SIZE, head // 2 * SIZE + SIZE)
        bias = query.bias[head * SIZE : (head + 1) * SIZE]
        assert equal(found[head], key.weight[rows].t() @ bias)
    query.bias = None
    assert weight.key_bias() is None


@pytest.mark.parametrize("groups", [4, 2])
@pytest.mark.parametrize("freeze", [False, True])
def test_gradients_are_those_of_the_product_through_free_entries(groups: int, freeze: bool) -> None:
    weight = merged(4, groups)
    frozen = torch.rand(4 * COLUMNS, COLUMNS) < (0.5 if freeze else 0)
    if freeze:
        weight.hold(frozen)
    grad = torch.randn(4 * COLUMNS, COLUMNS)
    (weight() * grad).sum().backward()
    query, key = (one.weight.detach().requires_grad_() for one in parameters(weight))
    (product(weight, query, key) * grad * ~frozen).sum().backward()
    for one, other in zip(parameters(weight), (query, key), strict=True):
        assert bool(((one.weight.grad - other.grad).abs() <= 1e-5).all())


def test_frozen_entries_stay_to_the_last_bit_while_the_others_train() -> None:
    weight = merged()
    optimizer = torch.optim.AdamW([one.weight for one in parameters(weight)], lr=0.05, weight_decay=0.1)
    frozen: Tensor | None = None
    history: list[tuple[Tensor, Tensor]] = []
    for _ in range(4):
        optimizer.zero_grad()
        weight().sin().sum().backward()
        chosen = statsq_margin(weight.latent(), 3, -1) > 0.3
        before = weight.latent()
        weight.hold(chosen)
        assert torch.equal(weight.latent(), before)  # freezing itself changes nothing
        frozen = chosen if frozen is None else frozen | chosen
        assert torch.equal(weight.frozen, frozen)
        history.append((frozen, before))
        optimizer.step()
        weight.restore()
        for places, values in history:
            assert torch.equal(weight.latent()[places], values[places])
    assert not frozen.all()
    assert not equal(weight.latent()[~frozen], history[0][1][~frozen])
    query, key = parameters(weight)
    assert not equal(product(weight, query.weight, key.weight)[frozen], weight.latent()[frozen])


def test_frozen_entries_do_not_thaw_and_their_gradient_is_zero() -> None:
    weight = merged()
    weight.hold(torch.ones(4 * COLUMNS, COLUMNS, dtype=torch.bool))
    weight.hold(torch.zeros(4 * COLUMNS, COLUMNS, dtype=torch.bool))
    assert bool(weight.frozen.all())
    weight().square().sum().backward()
    assert all(not one.weight.grad.any() for one in parameters(weight))


def test_writing_freezes_at_the_given_values() -> None:
    weight = merged()
    before = weight.latent()
    where, values = torch.rand_like(before) < 0.3, torch.randn_like(before)
    weight.write(where, values)
    assert torch.equal(weight.latent(), torch.where(where, values, before))
    assert torch.equal(weight.frozen, where)
    weight.write(where, -values)
    assert torch.equal(weight.latent(), torch.where(where, -values, before))


def test_buffers_begin_with_freezing_and_are_saved() -> None:
    weight = merged()
    assert dict(weight.named_parameters()) == {}
    assert weight.state_dict() == {}
    weight.begin_freezing()
    assert not weight.frozen.any()
    weight.hold(torch.rand(4 * COLUMNS, COLUMNS) < 0.5)
    weight.begin_freezing()
    assert bool(weight.frozen.any())
    other = merged()
    other.load_state_dict(weight.state_dict())
    assert torch.equal(other.frozen, weight.frozen)
    assert torch.equal(other.latent()[other.frozen], weight.latent()[weight.frozen])
    again = copy.deepcopy(weight)
    again.hold(torch.ones_like(weight.frozen))
    assert not weight.frozen.all()


def test_autocast_and_half_precision_change_no_code() -> None:
    weight = merged()
    expected = weight()
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(weight(), expected)
        assert weight.key_bias().dtype is torch.float32
    for one in parameters(weight):
        one.bfloat16()
    assert weight().dtype is weight.latent().dtype is torch.float32


def test_zero_and_huge_projections_stay_finite() -> None:
    weight = merged()
    for size in (0.0, 1e15):
        for one in parameters(weight):
            nn.init.constant_(one.weight, size)
        assert bool(weight().isfinite().all())
    nn.init.zeros_(parameters(weight)[0].weight)
    assert not weight().any()


def test_it_is_a_latent_weight_of_the_model() -> None:
    model = nn.Module()
    model.attention = nn.Module()
    model.attention.merged_weight = merged()
    assert list(latent_weights(model)) == ["attention.merged_weight.weight"]


def test_other_shapes_are_refused() -> None:
    quantizer = StatsQ(4)
    with pytest.raises(ValueError, match=r"query: expected 4 \* 3 rows, got 9"):
        MergedWeight(nn.Linear(10, 9), nn.Linear(10, 6), 4, 3, quantizer)
    for rows, columns in ((7, 10), (9, 10), (6, 8)):
        with pytest.raises(ValueError, match=rf"key: expected .* got \({rows}, {columns}\)"):
            MergedWeight(nn.Linear(10, 12), nn.Linear(columns, rows), 4, 3, quantizer)
