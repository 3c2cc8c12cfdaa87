"""Count what interpreted kernels read and write, element by element, and refuse what is not theirs.

    with Traffic() as traffic:
        token_logprobs(logits, tokens)
    traffic.bytes_read, traffic.bytes_written
    traffic.reads(logits), traffic.writes(logprobs)   # counts, shaped as the tensor

Counted are loads and stores of Triton kernels, by active lane; what PyTorch moves is not. An access
outside the tensors that a launch was given, the gaps of a strided view included, stops the launch
with an InterpreterError; so does an atomic, which none of our kernels needs.
"""

from unittest import mock

import numpy as np
import torch
import triton.runtime.interpreter as stock
from torch import Tensor
from triton.runtime.interpreter import GridExecutor, InterpreterBuilder, TensorHandle


class _Storage:
    """Byte counts of one storage; an access is counted at its first byte."""

    def __init__(self, tensor: Tensor) -> None:
        self.storage = tensor.untyped_storage()  # held, so that its address is not used again
        self.start = self.storage.data_ptr()
        size = self.storage.nbytes()
        self.reads, self.writes = np.zeros(size, np.int32), np.zeros(size, np.int32)
        self.given = np.zeros(size, bool)  # bytes of the tensors that this launch was given

    def view(self, counts: np.ndarray, tensor: Tensor) -> Tensor:
        """(*tensor.shape, element size): the entries of `counts` for each element of `tensor`."""
        size = tensor.element_size()
        strides = [size * stride for stride in tensor.stride()]
        offset = tensor.data_ptr() - self.start
        return torch.from_numpy(counts).as_strided((*tensor.shape, size), (*strides, 1), offset)


class Traffic:
    def __init__(self) -> None:
        self.bytes_read = self.bytes_written = 0
        self._storages: dict[int, _Storage] = {}

    def reads(self, tensor: Tensor) -> Tensor:
        """How often each element of `tensor`, an argument of a kernel, was loaded."""
        storage = self._storages[tensor.untyped_storage().data_ptr()]
        return storage.view(storage.reads, tensor)[..., 0]

    def writes(self, tensor: Tensor) -> Tensor:
        """How often each element of `tensor`, an argument of a kernel, was stored to."""
        storage = self._storages[tensor.untyped_storage().data_ptr()]
        return storage.view(storage.writes, tensor)[..., 0]

    def _launch(self, tensors: list[Tensor]) -> None:
        for storage in self._storages.values():
            storage.given[:] = False
        for x in tensors:
            key = x.untyped_storage().data_ptr()
            if key not in self._storages:
                self._storages[key] = _Storage(x)
            storage = self._storages[key]
            storage.view(storage.given, x)[:] = True

    def _access(self, pointers: TensorHandle, mask: TensorHandle, kind: str) -> int:
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
                program = stock.interpreter_builder.grid_idx
                raise IndexError(f"program {program}: {kind} outside the tensors of its launch")
            np.add.at(getattr(storage, kind), offsets, 1)
        return addresses.size * size

    def __enter__(self) -> "Traffic":
        load, store = InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store
        launch, traffic = GridExecutor.__call__, self

        def counted_load(self, pointers, mask, *args):
            traffic.bytes_read += traffic._access(pointers, mask, "reads")
            return load(self, pointers, mask, *args)

        def counted_store(self, pointers, value, mask, *args):
            traffic.bytes_written += traffic._access(pointers, mask, "writes")
            return store(self, pointers, value, mask, *args)

        def atomic(self, *args):
            raise AssertionError("an atomic: the result would depend on the order of programs")

        def counted_launch(self, *args, **kwargs):
            everything = [*args, *kwargs.values()]
            traffic._launch([x for x in everything if isinstance(x, Tensor) and x.numel()])
            return launch(self, *args, **kwargs)

        self._patches = [
            mock.patch.object(InterpreterBuilder, "create_masked_load", counted_load),
            mock.patch.object(InterpreterBuilder, "create_masked_store", counted_store),
            mock.patch.object(InterpreterBuilder, "create_atomic_rmw", atomic),
            mock.patch.object(InterpreterBuilder, "create_atomic_cas", atomic),
            mock.patch.object(GridExecutor, "__call__", counted_launch),
        ]
        for patch in self._patches:
            patch.start()
        return self

    def __exit__(self, *exception) -> None:
        for patch in self._patches:
            patch.stop()
