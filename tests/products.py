"""Record the matrix products that PyTorch is asked for, those of autograd's backward pass too.

with Products() as products:
    loss.backward()
of_size(products.seen, 50257)  # those with a matrix that is so large along one dimension
"""

from dataclasses import dataclass
from unittest import mock

from torch.utils._python_dispatch import TorchDispatchMode

from tetrad.kernels import launch

OPERANDS = {"mm": 0, "bmm": 0, "linear": 0, "matmul": 0, "addmm": 1, "addmm_": 1, "baddbmm": 1}


@dataclass(frozen=True)
class Matrix:
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    @property
    def leading_dimension(self) -> int:
        """How far rows, or columns, lie apart; 0 for a vector, which has but one."""
        strides = [s for s, n in zip(self.strides[-2:], self.shape[-2:]) if n > 1]
        return max(strides) if len(strides) == 2 else 0

    @property
    def contiguous(self) -> int:
        """The length of what lies side by side in memory; 0 for a vector."""
        sides = [n for s, n in zip(self.strides[-2:], self.shape[-2:]) if n > 1 and s == 1]
        return sides[0] if len(sides) == 1 and self.leading_dimension else 0


@dataclass(frozen=True)
class Product:
    name: str  # of the operator
    out: Matrix
    a: Matrix
    b: Matrix
    beta: float  # of what out held before; 0 when it was only written

    @property
    def matrices(self) -> tuple[Matrix, Matrix, Matrix]:
        return self.out, self.a, self.b


class Products(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Product] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        name = func.overloadpacket.__name__
        if name in OPERANDS:
            at = OPERANDS[name]
            matrices = [Matrix(tuple(x.shape), x.stride()) for x in (out, *args[at : at + 2])]
            self.seen.append(Product(name, *matrices, beta=kwargs.get("beta", 1) if at else 0))
        return out

    def __enter__(self) -> "Products":
        # our ops run as they do without a mode: not as one operator that hides its products
        self._as_ever = mock.patch.object(launch, "is_in_torch_dispatch_mode", lambda: False)
        self._as_ever.start()
        return super().__enter__()

    def __exit__(self, *exception) -> None:
        self._as_ever.stop()
        super().__exit__(*exception)


def of_size(products: list[Product], n: int) -> list[Product]:
    """Those with a matrix of n rows or columns, or more."""
    return [p for p in products if max(max(m.shape) for m in p.matrices) >= n]


def assert_aligned(products: list[Product]) -> None:
    """Rows of all operands and results start at multiples of 8 numbers, 16 bytes or more, and are
    so long, but for the few that are left over: what cuBLAS asks of its fast products."""
    assert products, "no product was recorded"
    for product in products:
        assert all(m.leading_dimension % 8 == 0 for m in product.matrices), product
        assert all(m.contiguous % 8 == 0 or m.contiguous < 8 for m in product.matrices), product
