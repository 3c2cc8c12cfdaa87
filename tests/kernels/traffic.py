"""Count what interpreted kernels read and write, element by element, and refuse what is not theirs.

    with Traffic() as traffic:
        token_logprobs(logits, tokens)
    traffic.bytes_read, traffic.bytes_written
    traffic.reads(logits), traffic.writes(logprobs)   # counts, shaped as the tensor
    traffic.launches                                  # names of kernels

Counted are loads and stores of Triton kernels, by active lane; what PyTorch moves is not. A launch
stops with an InterpreterError at
    an access outside the tensors that it was given, the gaps of a strided view included;
    an access to what another program of the launch wrote, or a store over what another one read,
    in whatever order they happen to run here: they race on a GPU;
    an atomic, whose result would depend on the order of the programs.
Programs may meet in one way, a ticket. Each stores its part, passes tl.debug_barrier(), and adds to
an int32 with acquire and release; the one that draws the last number may read what those before it
stored, past the cache of its own multiprocessor (cache_modifier ".cg").
"""

from collections.abc import Callable, Sequence
from unittest import mock

import numpy as np
import torch
import triton.language as tl
from torch import Tensor
from triton._C.libtriton import ir
from triton.runtime.interpreter import GridExecutor, InterpreterBuilder, TensorHandle

NOBODY = -1


class _Storage:
    """Byte counts of one storage; an access is counted at its first byte."""

    def __init__(self, tensor: Tensor) -> None:
        self.storage = tensor.untyped_storage()  # held, so that its address is not used again
        self.start = self.storage.data_ptr()
        size = self.storage.nbytes()
        self.reads, self.writes = np.zeros(size, np.int32), np.zeros(size, np.int32)
        self.given = np.zeros(size, bool)  # bytes of the tensors that this launch was given
        self.reader = np.full(size, NOBODY)  # the last program of this launch to read a byte
        self.writer = np.full(size, NOBODY)

    def view(self, counts: np.ndarray, tensor: Tensor) -> Tensor:
        """(*tensor.shape, element size): the entries of `counts` for each element of `tensor`."""
        size = tensor.element_size()
        strides = [size * stride for stride in tensor.stride()]
        offset = tensor.data_ptr() - self.start
        return torch.from_numpy(counts).as_strided((*tensor.shape, size), (*strides, 1), offset)


class Traffic:
    """order: from the number of programs of a launch, the sequence in which they run."""

    def __init__(self, order: Callable[[int], Sequence[int] | np.ndarray] = range) -> None:
        self.bytes_read = self.bytes_written = 0
        self.launches: list[str] = []
        self._order = order
        self._storages: dict[int, _Storage] = {}

    def reads(self, tensor: Tensor) -> Tensor:
        """How often each element of `tensor`, an argument of a kernel, was loaded."""
        storage = self._storages[tensor.untyped_storage().data_ptr()]
        return storage.view(storage.reads, tensor)[..., 0]

    def writes(self, tensor: Tensor) -> Tensor:
        """How often each element of `tensor`, an argument of a kernel, was stored to."""
        storage = self._storages[tensor.untyped_storage().data_ptr()]
        return storage.view(storage.writes, tensor)[..., 0]

    def _launch(self, name: str, tensors: list[Tensor]) -> None:
        self.launches.append(name)
        self._arrived: set[int] = set()  # programs that drew a ticket
        self._published: set[int] = set()  # those that stored nothing since
        self._unordered = False  # whether this program stored something since its last barrier
        for storage in self._storages.values():
            storage.given[:] = False
            storage.reader[:] = storage.writer[:] = NOBODY
        for x in tensors:
            key = x.untyped_storage().data_ptr()
            if key not in self._storages:
                self._storages[key] = _Storage(x)
            storage = self._storages[key]
            storage.view(storage.given, x)[:] = True

    def _begin(self, grid: tuple[int, int, int], place: int) -> tuple[int, int, int]:
        """Grid indices of the program that runs in this place of the order."""
        _, Y, Z = grid
        if place == 0:
            self._sequence = self._order(int(np.prod(grid)))
        self._program, self._unordered = int(self._sequence[place]), False
        return self._program // (Y * Z), self._program // Z % Y, self._program % Z

    def _access(self, pointers: TensorHandle, mask: TensorHandle, kind: str, fresh: bool) -> int:
        """Count the active lanes of one load or store; returns the bytes they move."""
        size = max(1, pointers.get_element_ty().primitive_bitwidth // 8)
        active = np.broadcast_to(mask.data, pointers.data.shape)
        addresses = pointers.data[active].astype(np.int64)
        starts = np.array(sorted(s.start for s in self._storages.values()))
        owners = np.searchsorted(starts, addresses, side="right") - 1
        for owner in np.unique(owners):
            storage = self._storages[int(starts[max(owner, 0)])]
            offsets = addresses[owners == owner] - storage.start
            last = offsets + size - 1
            within = offsets.min() >= 0 and last.max() < len(storage.given)
            if not (within and storage.given[offsets].all() and storage.given[last].all()):
                raise IndexError(f"{self._who()}: {kind} outside the tensors of its launch")
            self._refuse_race(storage, offsets, kind, fresh)
            np.add.at(getattr(storage, kind), offsets, 1)
            (storage.reader if kind == "reads" else storage.writer)[offsets] = self._program
        if kind == "writes" and addresses.size:
            self._unordered = True
            self._published.discard(self._program)
        return addresses.size * size

    def _refuse_race(self, storage: _Storage, offsets: np.ndarray, kind: str, fresh: bool) -> None:
        others = set(storage.writer[offsets]) - {NOBODY, self._program}
        if kind == "writes":
            others |= set(storage.reader[offsets]) - {NOBODY, self._program}
        if not others:
            return
        if not (self._program in self._arrived and others <= self._published):
            raise RuntimeError(f"{self._who()}: {kind} what programs {others} use, no ticket drawn")
        if kind == "reads" and not fresh:
            raise RuntimeError(f"{self._who()}: {kind} what others wrote from a stale cache line")

    def _ticket(self, operation, pointers: TensorHandle, semantics, scope) -> None:
        is_count = operation == ir.ATOMIC_OP.ADD and pointers.get_element_ty() == tl.int32
        if not is_count:
            raise RuntimeError("an atomic: the result would depend on the order of programs")
        if semantics != ir.MEM_SEMANTIC.ACQUIRE_RELEASE or scope == ir.MEM_SYNC_SCOPE.CTA:
            raise RuntimeError("a ticket that neither acquires nor releases")
        if self._unordered:
            raise RuntimeError("no tl.debug_barrier() between the stores and the ticket")
        self._arrived.add(self._program)
        self._published.add(self._program)

    def _who(self) -> str:
        return f"program {self._program} of {self.launches[-1]}"

    def __enter__(self) -> "Traffic":
        load, store = InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store
        add, barrier = InterpreterBuilder.create_atomic_rmw, InterpreterBuilder.create_barrier
        begin, launch, traffic = InterpreterBuilder.set_grid_idx, GridExecutor.__call__, self

        def counted_load(self, pointers, mask, other, cache, eviction, volatile):
            fresh = volatile or cache == ir.CACHE_MODIFIER.CG
            traffic.bytes_read += traffic._access(pointers, mask, "reads", fresh)
            return load(self, pointers, mask, other, cache, eviction, volatile)

        def counted_store(self, pointers, value, mask, *args):
            traffic.bytes_written += traffic._access(pointers, mask, "writes", True)
            return store(self, pointers, value, mask, *args)

        def ticket(self, operation, pointers, value, mask, semantics, scope):
            traffic._ticket(operation, pointers, semantics, scope)
            traffic.bytes_read += 4
            traffic.bytes_written += 4
            return add(self, operation, pointers, value, mask, semantics, scope)

        def exchange(self, *args):
            raise RuntimeError("an atomic: the result would depend on the order of programs")

        def noted_barrier(self):
            traffic._unordered = False
            return barrier(self)

        def ordered(self, x, y, z):
            _, Y, Z = self.grid_dim
            begin(self, *traffic._begin(self.grid_dim, (x * Y + y) * Z + z))

        def counted_launch(self, *args, **kwargs):
            everything = [*args, *kwargs.values()]
            tensors = [x for x in everything if isinstance(x, Tensor) and x.numel()]
            traffic._launch(self.fn.__name__, tensors)
            return launch(self, *args, **kwargs)

        self._patches = [
            mock.patch.object(InterpreterBuilder, "create_masked_load", counted_load),
            mock.patch.object(InterpreterBuilder, "create_masked_store", counted_store),
            mock.patch.object(InterpreterBuilder, "create_atomic_rmw", ticket),
            mock.patch.object(InterpreterBuilder, "create_atomic_cas", exchange),
            mock.patch.object(InterpreterBuilder, "create_barrier", noted_barrier),
            mock.patch.object(InterpreterBuilder, "set_grid_idx", ordered),
            mock.patch.object(GridExecutor, "__call__", counted_launch),
        ]
        for patch in self._patches:
            patch.start()
        return self

    def __exit__(self, *exception) -> None:
        for patch in self._patches:
            patch.stop()
