"""The device of a run: CUDA with NCCL, or the CPU with gloo.

megatron.core names CUDA in its source. On a machine without a GPU, `install` rewrites the syntax
trees of its modules while they are imported, so that they name the CPU; torch is not touched:

    "cuda"  ->  "cpu"                       "torch.cuda.FloatTensor"  ->  "torch.FloatTensor"
    torch.cuda  ->  `cuda` below            x.is_cuda  ->  True
    x.cuda(), x.pin_memory(), x.record_stream()  ->  x        pin_memory=True  ->  False
    torch.distributed._coalescing_manager  ->  `_coalescing_manager` below

Where CUDA is present `install` rewrites nothing.
"""

import ast
import importlib
import importlib.abc
import importlib.machinery
import logging
import math
import sys
import types
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import distributed_c10d

PACKAGE = "megatron.core"


def device() -> torch.device:
    """The device that models of this rank live on."""
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else CPU


def backend() -> str:
    """The torch.distributed backend that serves `device`."""
    return "nccl" if torch.cuda.is_available() else "gloo"


def total_memory() -> float:
    """Bytes of this rank's GPU; without one, as many as one likes."""
    return torch.cuda.mem_get_info()[1] if torch.cuda.is_available() else math.inf


def peak_memory() -> int:
    """The most bytes of the GPU that were allocated at once so far; 0 without a GPU."""
    return torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0


def synchronize() -> None:
    """Wait for all that was launched; copies on streams of their own may go on."""
    if torch.cuda.is_available():
        torch.cuda.current_stream().synchronize()


@lru_cache
def apex_norms():
    """NVIDIA apex's module of fused norms, or None. The apex of PyPI is another package."""
    name = "apex.normalization.fused_layer_norm"
    try:
        return importlib.import_module(name)
    except ImportError:
        return None


def install() -> None:
    """Adapt megatron.core to this machine, and have PyTorch do without cuDNN's attention. Call it
    before anything imports megatron.core."""
    warnings.filterwarnings("ignore", module="megatron")  # five remarks on packages not installed
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    warnings.filterwarnings("ignore", message=".*(tp_group|Apex|Transformer Engine).*")
    # which PyTorch prefers on Hopper and Blackwell: it plans anew for every shape, for up to half a
    # second, and while we sample the cache has another shape at each step
    torch.backends.cuda.enable_cudnn_sdp(False)
    if torch.cuda.is_available() or installed():
        return
    logging.getLogger(f"{PACKAGE}.tensor_parallel.random").setLevel(logging.ERROR)  # every dropout
    if PACKAGE in sys.modules:
        raise RuntimeError(f"{PACKAGE} was imported before tetrad.parallel.device.install()")
    sys.meta_path.insert(0, _Finder())
    import megatron.core.tensor_parallel.random as random  # reads C++ generators: replaced whole

    random._get_cuda_rng_state = lambda *args, **kwargs: torch.get_rng_state()
    random._set_cuda_rng_state = lambda state, *args, **kwargs: torch.set_rng_state(state)


def installed() -> bool:
    """Whether megatron.core can be imported on this machine."""
    return torch.cuda.is_available() or any(isinstance(f, _Finder) for f in sys.meta_path)


CPU = torch.device("cpu")


class _Noop:
    """A stream, an event or a context of either: on the CPU everything is in order already."""

    def __init__(self, *args, **kwargs) -> None:
        pass

    def __enter__(self):
        return self

    def __exit__(self, *exception) -> None:
        pass

    def elapsed_time(self, other) -> float:
        return 0.0

    def __getattr__(self, name: str):
        if name.startswith("__"):
            raise AttributeError(name)
        return lambda *args, **kwargs: self


class _Cuda(types.SimpleNamespace):
    """torch.cuda as megatron.core uses it; what is not listed here is torch.cuda's own."""

    def __getattr__(self, name: str):
        return getattr(torch.cuda, name)


def _nothing(*args, **kwargs) -> None:
    return None


def as_is(x, *args, **kwargs):
    """What x.cuda() and its like become in the rewritten source."""
    return x


range_push = range_pop = _nothing  # torch.cuda.nvtx

cuda = _Cuda(
    current_device=lambda: "cpu",
    device_count=lambda: 1,
    is_available=lambda: False,
    FloatTensor=torch.FloatTensor,
    HalfTensor=torch.HalfTensor,
    BFloat16Tensor=torch.BFloat16Tensor,
    get_rng_state=lambda device=None: torch.get_rng_state(),
    set_rng_state=lambda state, device=None: torch.set_rng_state(state),
    manual_seed=torch.manual_seed,
    Stream=_Noop,
    Event=_Noop,
    stream=_Noop,
    device=_Noop,
    current_stream=lambda *args: _Noop(),
    default_stream=lambda *args: _Noop(),
    nvtx=_Noop(),
    synchronize=_nothing,
    empty_cache=_nothing,
    set_device=_nothing,
    set_stream=_nothing,
    reset_peak_memory_stats=_nothing,
    ipc_collect=_nothing,
)


class _Received:
    """What a group has received. The tensors that were to receive it hold it after `wait`."""

    def __init__(self) -> None:
        self.values: list[tuple[Tensor, Tensor]] = []  # of which tensor, and what

    def wait(self) -> None:
        for tensor, value in self.values:
            tensor.copy_(value)
        self.values = []


@contextmanager
def _coalescing_manager(group: dist.ProcessGroup, async_ops: bool = False) -> Iterator[_Received]:
    """As that of torch.distributed, but never with two operations of one gloo group under way.

    The two threads of a ProcessGroupGloo each write the name of the operation they have finished
    into one std::string, without a lock. A name as long as "ALLGATHER_COALESCED" lies on the heap,
    which two of them at the same time destroy (seen in PyTorch 2.13: "malloc(): unaligned tcache
    chunk detected"). So all is sent and received before this returns. With async_ops nobody sees it
    before `wait`: who reads without waiting reads old numbers, each time and not by chance.
    """
    received = _Received()
    with distributed_c10d._coalescing_manager(group):
        yield received
        operations = distributed_c10d._world.pg_coalesce_state[group]
        tensors = [x.tensor if x.dst_tensor is None else x.dst_tensor for x in operations]
        before = [x.clone() for x in tensors] if async_ops else []
    if async_ops:
        received.values = [(x, x.clone()) for x in tensors]
        for tensor, value in zip(tensors, before):
            tensor.copy_(value)


_WORDS = {"cuda": "cpu"} | {
    f"torch.cuda.{kind}Tensor": f"torch.{kind}Tensor" for kind in ("Float", "Half", "BFloat16")
}


class _Rewrite(ast.NodeTransformer):
    def visit_Constant(self, node: ast.Constant) -> ast.AST:
        if isinstance(node.value, str) and node.value in _WORDS:
            return ast.copy_location(ast.Constant(_WORDS[node.value]), node)
        return node

    def visit_Attribute(self, node: ast.Attribute) -> ast.AST:
        self.generic_visit(node)
        if node.attr == "cuda" and isinstance(node.value, ast.Name) and node.value.id == "torch":
            return ast.copy_location(ast.Name("_cpu_cuda", node.ctx), node)
        if node.attr == "is_cuda" and isinstance(node.ctx, ast.Load):
            return ast.copy_location(ast.Constant(True), node)
        return node

    def visit_Call(self, node: ast.Call) -> ast.AST:
        moves = isinstance(node.func, ast.Attribute) and node.func.attr in (
            "cuda", "pin_memory", "record_stream",
        )  # fmt: skip
        self.generic_visit(node)
        for keyword in node.keywords:
            if keyword.arg == "pin_memory":
                keyword.value = ast.copy_location(ast.Constant(False), keyword.value)
        if moves:
            assert isinstance(node.func, ast.Attribute)
            call = ast.Call(ast.Name("_cpu_as_is", ast.Load()), [node.func.value], [])
            return ast.copy_location(call, node)
        return node

    def visit_ImportFrom(self, node: ast.ImportFrom) -> ast.AST:
        coalesces = any(name.name == _coalescing_manager.__name__ for name in node.names)
        if node.module == "torch.cuda.nvtx" or node.module == "torch.distributed" and coalesces:
            node.module = __name__
        return node


class _Loader(importlib.machinery.SourceFileLoader):
    # neither from nor to a .pyc: those hold the unchanged source
    def get_code(self, fullname: str):
        path = self.get_filename(fullname)
        tree = _Rewrite().visit(ast.parse(self.get_data(path), path))
        at = 0  # after the docstring and the __future__ imports
        while at < len(tree.body) and (
            (at == 0 and isinstance(tree.body[0], ast.Expr))
            or (isinstance(tree.body[at], ast.ImportFrom) and tree.body[at].module == "__future__")
        ):
            at += 1
        names = f"from {__name__} import cuda as _cpu_cuda, as_is as _cpu_as_is"
        tree.body.insert(at, ast.parse(names).body[0])
        return compile(ast.fix_missing_locations(tree), path, "exec", dont_inherit=True)


class _Finder(importlib.abc.MetaPathFinder):
    def find_spec(self, fullname: str, path=None, target=None):
        if fullname != PACKAGE and not fullname.startswith(PACKAGE + "."):
            return None
        spec = importlib.machinery.PathFinder.find_spec(fullname, path, target)
        if spec and type(spec.loader) is importlib.machinery.SourceFileLoader:
            spec.loader = _Loader(spec.loader.name, spec.loader.path)
        return spec
