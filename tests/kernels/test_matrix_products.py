"""Products that are cut where a length is odd are still whole."""

import pytest
import torch

from tests.products import Products, assert_aligned
from tetrad.kernels.products import add_product, aligned, matmul, write_product

# M, K, N: each odd alone and all of them; empty; smaller than what is cut off
SIZES = [
    (16, 24, 32), (17, 24, 32), (16, 25, 32), (16, 24, 33), (41, 43, 45), (0, 24, 33), (5, 3, 7),
    (16, 4097, 24),
]  # fmt: skip
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def matrix(rows: int, columns: int, dtype: torch.dtype, transposed: bool) -> torch.Tensor:
    """Random, in aligned rows, or in aligned columns."""
    if transposed:
        return matrix(columns, rows, dtype, False).t()
    x = aligned(rows, columns, dtype, torch.device(DEVICE))
    return x.copy_(torch.randn(rows, columns))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("a_transposed", [False, True])
@pytest.mark.parametrize("b_transposed", [False, True])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_as_exact_as_one_product(size, a_transposed, b_transposed, dtype, assert_as_exact) -> None:
    M, K, N = size
    a, b = matrix(M, K, dtype, a_transposed), matrix(K, N, dtype, b_transposed)
    truth, plain = a.double() @ b.double(), a.float() @ b.float()
    with Products() as products:
        product = matmul(a, b)
    if dtype == torch.float32:  # a CPU converts bf16, and lays it out anew
        assert_aligned(products.seen)
    assert product.shape == (M, N)
    floor = max(2e-6, K * 2**-24)  # fp32 may add K terms in any order
    assert_as_exact(product, plain, truth, floor=floor)
    total = product.clone()
    add_product(total, a, b, factor=-0.5)
    assert_as_exact(total, 0.5 * plain, 0.5 * truth, floor=2 * floor)
    rounded = torch.full((M, N), torch.nan, dtype=dtype, device=DEVICE)
    write_product(rounded, a, b)
    assert_as_exact(rounded, plain.to(dtype), truth, floor=floor)


def test_what_lies_between_rows_is_not_touched() -> None:
    room = torch.full((4, 64), torch.nan, device=DEVICE)
    out, a, b = room[:, :33], matrix(4, 8, torch.float32, False), torch.ones(8, 33, device=DEVICE)
    write_product(out, a, b)
    assert out.isfinite().all() and room[:, 33:].isnan().all()
