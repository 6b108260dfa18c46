"""`ovp_compensate`: the kernels against the definition, what errors mean, and bad arguments."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from olive import ops
from olive.formats import CODEBOOKS, ovp4_decode, pack_scale
from olive.formats.codebooks import IDENTIFIER, Codebook
from olive.ops.compensate import ovp_compensate_cpu, ovp_compensate_reference
from tests.ops.cpu_cases import ISAS


def _factor(columns: int, seed: int = 0) -> Tensor:
    """U of correlated inputs."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(4 * columns, columns, generator=generator, dtype=torch.float64)
    x = x @ torch.randn(columns, columns, generator=generator, dtype=torch.float64)
    h = x.T @ x / len(x) + 0.05 * columns * torch.eye(columns, dtype=torch.float64)
    return torch.linalg.cholesky(torch.linalg.inv(h), upper=True).float()


def compensation_case(
    rows: int, columns: int, codebook: str, rule: str, per_pair: bool
) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(rows + columns)
    values = torch.randn(rows, columns, generator=generator)
    values = values / torch.rand(rows, columns, generator=generator).clamp(min=0.02).sqrt()
    values[0] = 0
    book = CODEBOOKS[codebook]
    shape = (rows, columns // 2 if per_pair else 1)
    scale = (0.5 + torch.rand(shape, generator=generator)) * 2.5 / book.normal[7]
    plain = torch.zeros(shape, dtype=torch.bool)
    if rule != "pair" and book.has_plain:
        plain = torch.rand(shape, generator=generator) < (0.5 if rule == "mixed" else 2.0)
        scale = torch.where(
            plain, scale * (book.normal[7] / 127) * torch.where(scale < scale.mean(), -1.0, 1.0), scale
        )
    return values, pack_scale(scale, plain), _factor(columns), book.tensor()


def assert_compensated_alike(found: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> None:
    """Nearly all rows alike: a sum that is fused now and then rounds a value onto the other side of a
    threshold, and from there a row goes another way, to about the same loss."""
    same = (found[0] == expected[0]).all(1)
    assert float(same.double().mean()) >= 0.9
    assert torch.allclose(
        found[1][same], expected[1][same], rtol=1e-3, atol=1e-4 * float(expected[1].abs().max())
    )
    assert torch.allclose(found[2][same], expected[2][same], rtol=1e-4)
    assert float(found[2].sum()) == pytest.approx(float(expected[2].sum()), rel=0.01)


def assert_errors_are_those_of_the_codes(case: tuple[Tensor, ...], found: tuple[Tensor, ...]) -> None:
    """values - decoded = e U, whatever was chosen."""
    values, scale, factor, table = case
    codes, errors, loss = found
    book, columns = Codebook.from_tensor(table), values.shape[1]
    if scale.shape[1] == 1:
        decoded = ovp4_decode(codes, scale, book, columns, -1)
    else:
        pairs = [
            ovp4_decode(codes[:, i : i + 1], scale[:, i : i + 1], book, 2, -1) for i in range(columns // 2)
        ]
        decoded = torch.cat(pairs, dim=1)
    assert torch.allclose(values - decoded, errors @ factor, rtol=1e-4, atol=1e-4 * float(values.abs().max()))
    assert torch.allclose(loss, errors.square().sum(1), rtol=1e-5)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("codebook", ["int4", "flint4", "nf4", "adaptive"])
@pytest.mark.parametrize("rule", ["pair", "mixed", "plain"])
@pytest.mark.parametrize(
    ("rows", "columns", "per_pair"), [(37, 128, False), (16, 30, True), (1, 2, False), (5, 64, True)]
)
def test_kernels_equal_the_definition(
    isa: str, codebook: str, rule: str, rows: int, columns: int, per_pair: bool
) -> None:
    case = compensation_case(rows, columns, codebook, rule, per_pair)
    assert_compensated_alike(ovp_compensate_cpu(*case, isa=isa), ovp_compensate_reference(*case))


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("codebook", ["nf4", "adaptive"])
def test_errors_are_those_of_the_codes(isa: str, codebook: str) -> None:
    case = compensation_case(21, 64, codebook, "mixed", False)
    assert_errors_are_those_of_the_codes(case, ovp_compensate_cpu(*case, isa=isa))


@pytest.mark.parametrize("compensate", [ovp_compensate_reference, ovp_compensate_cpu])
def test_outliers_take_over_part_of_what_their_victims_lose(compensate) -> None:  # type: ignore[no-untyped-def]
    # Nearest to 27.5 is the outlier 24; its victim 1.4, correlated by 0.9, moves the best value to 28.76: 32.
    h = torch.tensor([[1.0, 0.9], [0.9, 1.0]])
    factor = torch.linalg.cholesky(torch.linalg.inv(h), upper=True)
    values = torch.tensor([[27.5, 1.4]])
    one = pack_scale(torch.ones(1, 1), torch.zeros(1, 1, dtype=torch.bool))
    codes, _, loss = compensate(values, one, factor, CODEBOOKS["int4"].tensor())
    assert codes.tolist() == [[4 | IDENTIFIER << 4]]  # of 12 16 24 32
    error = values[0] - torch.tensor([32.0, 0.0])
    assert float(loss) == pytest.approx(float(error @ h @ error), rel=1e-4)


def test_as_an_operator() -> None:
    case = compensation_case(6, 32, "adaptive", "mixed", True)
    torch.library.opcheck(torch.ops.olive.ovp_compensate.default, case)
    before = [one.clone() for one in case]
    ops.ovp_compensate(*case)
    assert all(torch.equal(one, other) for one, other in zip(case, before, strict=True))


def test_bad_arguments() -> None:
    values, scale, factor, table = compensation_case(4, 8, "nf4", "pair", False)
    with pytest.raises(ValueError, match=r"values: expected shape \[R, n\] with R >= 1 and n even"):
        ops.ovp_compensate(values[:, :7], scale, factor, table)
    with pytest.raises(TypeError, match=r"values: expected torch\.float32"):
        ops.ovp_compensate(values.double(), scale, factor, table)
    with pytest.raises(ValueError, match=r"factor: expected shape \(8, 8\)"):
        ops.ovp_compensate(values, scale, factor[:4], table)
    with pytest.raises(ValueError, match=r"scale: expected shape \(4, 4\)"):
        ops.ovp_compensate(values, scale.expand(4, 3), factor, table)
    with pytest.raises(ValueError, match=r"codebook: expected shape \(32,\)"):
        ops.ovp_compensate(values, scale, factor, table[:3])
