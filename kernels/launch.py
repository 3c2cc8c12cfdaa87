"""What every op needs: where it can run, in what blocks, and its registration with PyTorch."""

import functools
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
import triton
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils._python_dispatch import is_in_torch_dispatch_mode
from triton.runtime.errors import InterpreterError

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # as Triton does: fixed at import
MAX_BLOCK = 4096  # columns: 32 per thread of 4 warps; wider blocks spill registers
MAX_PROGRAMS = 1024  # that leave partial sums: whoever joins them reads them all
_tickets: dict[tuple[torch.device, int], Tensor] = {}  # of a device and its stream, at rest
_thread = threading.local()  # .dispatched: whether PyTorch's dispatcher called the op that runs


def runs_kernel(x: Tensor) -> bool:
    """Whether a Triton kernel can run on `x`: it is on a GPU, or Triton is interpreted."""
    return x.is_cuda or INTERPRETED


def row_block(n_columns: int) -> int:
    """Columns per block, a power of two, for 4 warps that walk rows of `n_columns`."""
    return min(max(triton.next_power_of_2(n_columns), 128), MAX_BLOCK)


def programs(units: int) -> tuple[int]:
    """Grid of the kernels that leave partial sums: one program at least, which writes zeros."""
    return (max(1, min(units, MAX_PROGRAMS)),)


@contextmanager
def ticket(device: torch.device) -> Iterator[Tensor]:
    """A counter () int32 of the programs of one launch, 0; the last of them must write 0 again.

    A stream keeps its own, so a launch needs no fill of its own: those of one stream follow each
    other, those of two share nothing. It is taken away while it is in use and comes back after a
    launch that did not raise: one that was interrupted leaves nothing behind.
    What a graph replays has a counter that the graph itself allocates and fills: its memory is the
    graph's, and may hold something else between two replays. PyTorch says so while it captures, but
    not while it warms up for a graph of compiled code (mode="reduce-overhead"), which has memory of
    its own too; hence a fill for whatever the dispatcher calls.
    """
    owned = getattr(_thread, "dispatched", False)
    stream = 0
    if device.type == "cuda":
        owned = owned or torch.cuda.is_current_stream_capturing()
        stream = triton.runtime.driver.active.get_current_stream(device.index)  # it launches there
    counter = None if owned else _tickets.pop((device, stream), None)
    if counter is None:
        counter = torch.zeros((), dtype=torch.int32, device=device)
    yield counter
    if not owned:
        _tickets[device, stream] = counter


def real_dtype(*tensors: Tensor) -> torch.dtype:
    """The type of the arithmetic: fp64 when any input is, else fp32."""
    return torch.float64 if any(x.dtype == torch.float64 for x in tensors) else torch.float32


def wants_gradient(*tensors: Tensor | None) -> bool:
    """Whether autograd will ask for the gradient of any of them."""
    return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)


def refuse_gradients(**tensors: Tensor | None) -> None:
    """Say so, rather than cut the graph silently."""
    for name, x in tensors.items():
        if wants_gradient(x):
            raise ValueError(f"{name} requires grad, and is a constant here: detach it")


def number_or_tensor(x: float | Tensor | None) -> tuple[float, Tensor | None]:
    """A number, or the tensor in its place, as a registered op takes them; 0 for None."""
    return (0.0, x) if isinstance(x, Tensor) else (float(x or 0), None)


def group_name(group: dist.ProcessGroup | None) -> str | None:
    """The process group as a registered op can take it."""
    return None if group is None else group.group_name


def group_of(name: str) -> dist.ProcessGroup:
    """The process group of that name."""
    return dist.distributed_c10d._resolve_process_group(name)  # type: ignore[arg-type]


def all_gather(x: Tensor, group: str) -> Tensor:
    """x of every rank of the group, stacked in the order of the ranks: one collective."""
    size = group_of(group).size()
    ranks = x.new_empty(size * x.numel())
    dist.all_gather_into_tensor(ranks, x.contiguous().view(-1), group=group_of(group))
    return ranks.view(size, *x.shape)


def all_reduce(x: Tensor, group: str) -> None:
    """Sum x over the ranks of the group, in place."""
    dist.all_reduce(x, group=group_of(group))


def _first_order(gradient: Callable) -> Callable:
    """A backward function whose results raise where they are differentiated again.

    once_differentiable does so where an upstream gradient has a graph, and detaches where it has
    none, as the 1 of `backward(create_graph=True)`. What depends on the inputs would be lost.
    """
    refusing = once_differentiable(gradient)

    def backward(ctx, *upstream):
        if torch.is_grad_enabled():  # create_graph
            upstream = tuple(
                x.detach().requires_grad_() if isinstance(x, Tensor) else x for x in upstream
            )
        return refusing(ctx, *upstream)

    return backward


class Op:
    """An op that torch.compile and torch.export see as one node, torch.ops.tetrad.name.

    `outputs` takes the same arguments and allocates the results: PyTorch's fake kernel. The body
    runs on the device of its first tensor (Triton launches on the current one) and without
    autocast (its arithmetic is what it says). Called eagerly, it goes around the registration: the
    dispatcher would cost 60 us of host time a call, several times a small kernel.
    """

    def __init__(self, function: Callable, outputs: Callable, name: str | None = None) -> None:
        @functools.wraps(function)
        def run(*args):
            x = next(y for y in args if isinstance(y, Tensor))
            try:
                with torch.cuda.device_of(x):
                    if not torch.is_autocast_enabled(x.device.type):
                        return function(*args)
                    with torch.autocast(x.device.type, enabled=False):
                        return function(*args)
            except InterpreterError as error:
                if "0-dimensional" not in str(error):
                    raise
                raise RuntimeError(
                    "Triton 3.6 interprets (TRITON_INTERPRET=1) with NumPy before 2.4 alone: "
                    "install triton>=3.7 or numpy<2.4"
                ) from error

        @functools.wraps(function)
        def dispatched(*args):
            before, _thread.dispatched = getattr(_thread, "dispatched", False), True
            try:
                return run(*args)
            finally:
                _thread.dispatched = before

        self.eager: Callable = run
        name = f"tetrad::{name or function.__name__.removeprefix('_')}"
        self.registered = torch.library.custom_op(name, dispatched, mutates_args=())
        self.registered.register_fake(outputs)

    def __call__(self, *args):
        if torch.compiler.is_compiling() or is_in_torch_dispatch_mode():
            return self.registered(*args)
        return self.eager(*args)

    def differentiate(self, setup_context: Callable, gradient: Callable) -> None:
        """Give it a gradient, by the signatures of torch.library.register_autograd.

        It is a constant of autograd: to differentiate it again raises.
        """
        gradient = _first_order(gradient)
        self.registered.register_autograd(gradient, setup_context=setup_context)
        run = self.eager

        class Eager(torch.autograd.Function):
            @staticmethod
            def forward(ctx, *args):
                output = run(*args)
                setup_context(ctx, args, output)
                return output

            backward: Callable = staticmethod(gradient)

        self.eager = Eager.apply


def op(outputs: Callable, name: str | None = None) -> Callable[[Callable], Op]:
    """Decorator: make `_name(tensors and numbers) -> tensors` the Op torch.ops.tetrad.name."""
    return lambda function: Op(function, outputs, name)
