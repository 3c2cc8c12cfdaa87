"""What callers do to an op: inputs in any layout, no host sync, compilation, a CUDA graph."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from unittest import mock

import torch
from torch import Tensor
from triton.runtime.interpreter import GridExecutor

from tetrad.kernels import check

LAYOUTS = ("contiguous", "end", "transposed", "sliced")
# Columns of a vocabulary of 50 on each rank, of which 45 count: the second of two shards ends in
# padding, the third of three is nothing but padding, and no shard is as wide as another.
SHARDS = {2: [37, 13], 3: [20, 27, 3], 4: [13, 1, 30, 6]}
WAITS = {"item", "_local_scalar_dense", "is_nonzero", "nonzero", "masked_select", "unique"}


def laid_out(x: Tensor, layout: str) -> Tensor:
    """x in other memory: at the very end of an allocation and not aligned, transposed, with gaps.

    What lies between is NaN, and `Traffic` does not let a kernel touch it.
    """
    if layout == "transposed" and x.dim() > 1:
        return x.transpose(0, -1).contiguous().transpose(0, -1)
    if layout == "end":
        return x.new_empty(x.numel() + 3)[3:].view(x.shape).copy_(x)
    if layout == "sliced" and x.dim():
        return x.new_empty(*x.shape[:-1], 2 * x.shape[-1])[..., ::2].copy_(x)
    return x.clone()


@contextmanager
def no_host_sync() -> Iterator[None]:
    """Fail if the host reads what a tensor holds; ranges and bounds are read on the CPU alone."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    with mock.patch.multiple(check, check_bounds=mock.DEFAULT, check_values=mock.DEFAULT):
        with torch.profiler.profile(activities=activities) as profile:
            yield
    seen = {event.key.removeprefix("aten::").rstrip("2") for event in profile.key_averages()}
    assert "new_empty" in seen, "nothing was recorded"
    assert not seen & WAITS


# PyTorch's operators that launch nothing on a GPU, and those that only call others.
LAUNCH_NOTHING = {"empty", "new_empty", "empty_like", "empty_strided", "as_strided", "detach"}
LAUNCH_NOTHING |= {"view", "_unsafe_view", "reshape", "unbind", "select", "slice", "expand"}
LAUNCH_NOTHING |= {"to", "_to_copy", "contiguous"}


@contextmanager
def launches() -> Iterator[list[str]]:
    """What would be launched on a GPU: Triton's kernels, then PyTorch's operators."""
    seen: list[str] = []
    interpret = GridExecutor.__call__

    def marked(self, *args, **kwargs):
        seen.append(self.fn.__name__)
        with torch.profiler.record_function("interpreter"):  # which copies tensors
            return interpret(self, *args, **kwargs)

    torch.utils.deterministic.fill_uninitialized_memory = False  # each test's fixture asks for it
    activities = [torch.profiler.ProfilerActivity.CPU]
    with (
        mock.patch.object(GridExecutor, "__call__", marked),
        torch.profiler.profile(activities=activities) as profile,
    ):
        yield seen
    torch.utils.deterministic.fill_uninitialized_memory = True

    def names(event) -> Iterator[str]:
        yield event.name.removeprefix("aten::")
        if event.cpu_parent is not None:
            yield from names(event.cpu_parent)

    chains = [list(names(e)) for e in profile.events() if e.name.startswith("aten::")]
    ours = {chain[0] for chain in chains if "interpreter" not in chain}
    assert "new_empty" in ours, "nothing was recorded"
    seen += sorted(ours - LAUNCH_NOTHING)


def compiled(f: Callable, **options) -> Callable:
    """f, traced into one graph, forward and backward."""
    torch.compiler.reset()
    return torch.compile(f, backend="aot_eager", fullgraph=True, **options)


def replayed(f: Callable[..., tuple[Tensor, ...]], *inputs: Tensor) -> tuple[Tensor, ...]:
    """f(*inputs), from a CUDA graph that was captured while the inputs were zero."""
    static = [torch.zeros_like(x).requires_grad_(x.requires_grad) for x in inputs]
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        f(*static)  # compiles the kernels
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = f(*static)
    with torch.no_grad():
        for x, y in zip(static, inputs, strict=True):
            x.copy_(y)
    graph.replay()
    return outputs
