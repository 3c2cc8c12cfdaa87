"""Triton's interpreter, made to compute what a GPU would. `install()` once, before kernels run.

As shipped it is silently wrong for bf16 (arithmetic on the bit pattern, casts that truncate), keeps
Python floats in fp64, ignores device_assert and integer overflow, and gives 0 where a masked load
says nothing. It also walks generic scans element by element; here they take log(n) steps, in
another order of association, so that a combine function which is not associative shows.
"""

import dataclasses
import types
from collections.abc import Callable

import numpy as np
import triton.language as tl
import triton.runtime.interpreter as stock
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle
from triton.runtime.jit import _normalize_ty

BF16_NAN = 0x7FC0


def install() -> None:
    """Change Triton's interpreter in this process, for good."""
    np.seterr(all="ignore")  # a GPU does not warn of NaN and Inf
    builder = stock.interpreter_builder
    builder.options = dataclasses.replace(builder.options, debug=True)  # asserts and overflow raise

    InterpreterBuilder.cast_impl = _cast(InterpreterBuilder.cast_impl)
    InterpreterBuilder.create_fp_to_fp = lambda self, x, dtype, _rounding: self.cast_impl(x, dtype)
    InterpreterBuilder.get_bf16 = lambda self, value: _narrow(self.get_fp32(value))
    for name in ("binary_op", "unary_op", "ternary_op", "create_fma", "create_dot"):
        setattr(InterpreterBuilder, name, _in_fp32(getattr(InterpreterBuilder, name)))
    InterpreterBuilder.create_masked_load = _poisoned(InterpreterBuilder.create_masked_load)
    stock._implicit_cvt = _floats_as_fp32(stock._implicit_cvt)
    stock._patch_lang_tensor = _with_index(stock._patch_lang_tensor)
    stock.GridExecutor.__call__ = _marking_doubles(stock.GridExecutor.__call__)

    for operation in (stock.ReduceOps, stock.ScanOps):
        operation.apply_impl = _refusing_bf16(operation.apply_impl)
    stock.ScanOps.generic_scan = _generic_scan
    stock.ReduceOps.generic_reduce = _generic_reduce

    # A jitted function called from a kernel patches triton.language anew at each call. Patch all of
    # it once, when the kernel is launched.
    everything = types.SimpleNamespace(__globals__={"tl": tl, "core": tl.core})
    patch_language = stock._patch_lang
    stock._patch_lang = lambda _function: patch_language(everything)
    stock.InterpretedFunction.__call__ = lambda self, *args, **kwargs: self.rewrite()(
        *args, **kwargs
    )


def _is_bf16(x: TensorHandle) -> bool:
    return x.dtype.scalar == tl.bfloat16


def _widen(x: TensorHandle) -> TensorHandle:
    """bf16 bits (uint16) to fp32."""
    bits = x.data.astype(np.uint32) << np.uint32(16)
    return TensorHandle(bits.view(np.float32), tl.float32)


def _narrow(x: TensorHandle) -> TensorHandle:
    """fp32 to bf16 bits, to nearest, ties to even."""
    bits = np.ascontiguousarray(x.data, dtype=np.float32).view(np.uint32)
    odd = (bits >> np.uint32(16)) & np.uint32(1)
    rounded = ((bits + np.uint32(0x7FFF) + odd) >> np.uint32(16)).astype(np.uint16)
    rounded = np.where(np.isnan(x.data), np.uint16(BF16_NAN), rounded)
    return TensorHandle(rounded, tl.bfloat16)


def _cast(stock_cast: Callable) -> Callable:
    def cast(self, x: TensorHandle, dtype: tl.dtype) -> TensorHandle:
        if x.dtype.scalar == dtype.scalar:
            return x
        x = _widen(x) if _is_bf16(x) else x
        if dtype.scalar == tl.bfloat16:
            return _narrow(stock_cast(self, x, tl.float32))
        return stock_cast(self, x, dtype)

    return cast


def _in_fp32(operation: Callable) -> Callable:
    """Operate on bf16 operands in fp32; the result takes the type of the last operand.

    A comparison has truth values, which as shipped are typed like what was compared.
    """

    def operate(self, *args):
        operands = [x for x in args if isinstance(x, TensorHandle)]
        args = [_widen(x) if isinstance(x, TensorHandle) and _is_bf16(x) else x for x in args]
        result = operation(self, *args)
        if result.data.dtype == bool:
            return TensorHandle(result.data, tl.int1)
        return _narrow(result) if _is_bf16(operands[-1]) else result

    return operate


def _poisoned(stock_load: Callable) -> Callable:
    """What a masked load leaves undefined reads as NaN, or as the largest integer."""

    def load(self, pointers: TensorHandle, mask, other, *args) -> TensorHandle:
        if other is None:
            element = pointers.get_element_ty()
            dtype = stock._get_np_dtype(element)
            value = BF16_NAN if element == tl.bfloat16 else True
            if dtype.kind == "f":
                value = np.nan
            elif element != tl.bfloat16 and dtype.kind in "iu":
                value = np.iinfo(dtype).max
            other = TensorHandle(np.full(pointers.data.shape, value, dtype), element)
        return stock_load(self, pointers, mask, other, *args)

    return load


class _Double(float):
    """A Python float for a parameter that is annotated tl.float64."""


def _marking_doubles(stock_launch: Callable) -> Callable:
    def launch(self, *args, **kwargs):
        annotations = self.fn.__annotations__.items()
        doubles = {name for name, x in annotations if _normalize_ty(x) == "fp64"}

        def marked(name: str, x: object) -> object:
            return _Double(x) if name in doubles and isinstance(x, float) else x

        args = [marked(*pair) for pair in zip(self.arg_names, args)]
        return stock_launch(self, *args, **{name: marked(name, x) for name, x in kwargs.items()})

    return launch


def _floats_as_fp32(stock_convert: Callable) -> Callable:
    """What the launcher of a GPU makes of a Python float: fp32, or fp64 where annotated so."""

    def convert(argument):
        if isinstance(argument, float):
            double = isinstance(argument, _Double)
            dtype, kind = (np.float64, tl.float64) if double else (np.float32, tl.float32)
            return tl.tensor(TensorHandle(np.array([argument], dtype=dtype), kind), kind)
        return stock_convert(argument)

    return convert


def _refusing_bf16(stock_apply: Callable) -> Callable:
    def apply(self, inputs):
        if any(x.dtype.scalar == tl.bfloat16 for x in inputs):
            raise TypeError("reduce or scan of bf16: accumulate in fp32")
        return stock_apply(self, inputs)

    return apply


def _combine(function, left: list[np.ndarray], right: list[np.ndarray], dtypes) -> list[np.ndarray]:
    """The combine function on whole arrays of pairs, whatever their shape."""

    def tensor(x: np.ndarray, dtype: tl.dtype) -> tl.tensor:
        flat = np.ascontiguousarray(x).reshape(-1)
        return tl.tensor(TensorHandle(flat, dtype.scalar), tl.block_type(dtype.scalar, [flat.size]))

    operands = [tensor(*pair) for side in (left, right) for pair in zip(side, dtypes, strict=True)]
    results = function.fn(*operands)
    results = results if isinstance(results, (tuple, tl.tuple)) else (results,)
    return [y.handle.data.reshape(x.shape) for x, y in zip(left, results, strict=True)]


def _generic_scan(self, inputs: tuple) -> list:
    """Hillis and Steele 1986: after step k each element holds the scan of the 2k before it."""
    values = [np.array(x.handle.data) for x in inputs]
    dtypes = [x.dtype for x in inputs]
    length = values[0].shape[self.axis]
    place = np.arange(length).reshape([-1 if i == self.axis else 1 for i in range(values[0].ndim)])
    step = 1
    while step < length:
        before = [np.roll(x, step, axis=self.axis) for x in values]
        both = _combine(self.combine_fn, before, values, dtypes)
        values = [np.where(place >= step, new, old) for new, old in zip(both, values, strict=True)]
        step *= 2
    return [self.to_tensor(x, dtype) for x, dtype in zip(values, dtypes, strict=True)]


def _generic_reduce(self, inputs: tuple) -> list:
    """Fold the axis, a power of two long, in halves: like a GPU's warp, out of order."""
    flat, axis = self.unravel(inputs, self.axis)
    values = [np.array(x.handle.data) for x in flat]
    dtypes = [x.dtype for x in inputs]
    while values[0].shape[axis] > 1:
        halves = [np.split(x, 2, axis=axis) for x in values]
        values = _combine(
            self.combine_fn, [left for left, _ in halves], [right for _, right in halves], dtypes
        )
    if self.axis is None:
        shape = (1,) * inputs[0].handle.data.ndim if self.keep_dims else ()
        values = [x.reshape(shape) for x in values]
    elif not self.keep_dims:
        values = [x.squeeze(axis) for x in values]
    return [
        self.to_tensor(x if x.shape else x.item(), dtype)
        for x, dtype in zip(values, dtypes, strict=True)
    ]


def _with_index(stock_patch: Callable) -> Callable:
    """Bounds of range(): Triton 3.6 asks NumPy for int() of an array (1,), refused since 2.4."""

    def patch(tensor: type, scope) -> None:
        stock_patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    return patch
