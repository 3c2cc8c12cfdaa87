"""Several models on one GPU: flat memory at addresses that never change.

Each role has tenants, one a kind of memory: weights, gradients, optimizer state. A tenant lives in
a slot of the device; tenants of one slot take turns. Gradients are zero after each step, so those
of actor and critic share a slot as they are. The others are kept in pinned host memory while
another tenant is in their slot; they move on a stream of their own, so that the next role comes in
while this one computes. Nothing is allocated after the roles are built.

    resident    a slot for each tenant
    swap        two slots for weights, which the roles take alternately in the order of their use
                (so that the next one finds its slot free), and one for optimizer state
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn

from tetrad.parallel import device
from tetrad.parallel.plan import slots
from tetrad.parallel.settings import ALIGNMENT


class Slot:
    """Bytes of the device that tenants take turns with."""

    def __init__(self, size: int, stream: torch.cuda.Stream | None) -> None:
        self.size = size
        self.stream = stream  # of the copies; None on the CPU
        self.tenant: Tenant | None = None

    @cached_property
    def bytes(self) -> Tensor:
        """Only there when a tenant asks for some: building a role needs room beside its own."""
        return torch.empty(self.size, dtype=torch.uint8, device=device.device())


class Tenant:
    """One role's memory of one kind: `size` bytes in a slot."""

    def __init__(self, slot: Slot, size: int, has_twin: bool) -> None:
        self.slot, self.size, self.used = slot, size, 0
        self.twin: Tensor | None = None  # the same bytes on the host
        if has_twin:
            self.twin = torch.empty(size, dtype=torch.uint8)
            if slot.stream is not None and size:  # pin_memory would round up to a power of two
                status = torch.cuda.cudart().cudaHostRegister(self.twin.data_ptr(), size, 0)
                torch.cuda.check_error(int(status))
        self.changed = False  # since it was last copied to the host; a gradient: since the step
        self._arrived: torch.cuda.Event | None = None

    def allocate(self, n: int, dtype: torch.dtype) -> Tensor:
        """The next n elements, zero. Only while the role is built."""
        self.bring()
        end = self.used + n * dtype.itemsize
        assert end <= self.size, f"{end} bytes asked for, {self.size} were planned"
        tensor = self.slot.bytes[self.used : end].view(dtype)
        self.used, self.changed = end, self.twin is not None
        return tensor.zero_()

    def prefetch(self) -> None:
        """Begin to come into the slot. What uses its tenant now must have been launched."""
        before, self.slot.tenant = self.slot.tenant, self
        if before is self:
            return
        if self.twin is None:
            assert before is None or not before.changed, "a gradient that no step has used"
            return
        stream = self.slot.stream
        if stream is None:
            self._swap(before)
            return
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            self._swap(before)
            self._arrived = stream.record_event()

    def _swap(self, before: "Tenant | None") -> None:
        assert self.twin is not None
        if before is not None and before.changed:
            assert before.twin is not None
            before.twin.copy_(self.slot.bytes[: before.size], non_blocking=True)
            before.changed = False
        if self.used:
            self.slot.bytes[: self.size].copy_(self.twin, non_blocking=True)

    def bring(self) -> None:
        """Be in the slot before whatever is launched next."""
        self.prefetch()
        if self._arrived is not None:
            torch.cuda.current_stream().wait_event(self._arrived)
            self._arrived = None


@dataclass
class Memory:
    """Where one role's tensors are."""

    weights: Tenant
    gradients: Tenant
    optimizer: Tenant
    next: "Memory | None" = None  # of the role that is read after this one


def colocate(needs: Mapping[str, Mapping[str, int]], swap: bool) -> dict[str, Memory]:
    """Memory for roles, given in the order in which they are read, that need so many bytes of
    "parameters", "gradients" and "optimizer" on this rank."""
    stream = torch.cuda.Stream() if torch.cuda.is_available() else None
    roles = list(needs)
    found: dict[tuple[str, str], Slot] = {}  # by role and kind
    for kind, groups in slots(roles, swap).items():
        for group in groups:
            slot = Slot(max((needs[r][kind] for r in group), default=0), stream)
            found |= dict.fromkeys(((r, kind) for r in group), slot)
    memories = {
        r: Memory(
            Tenant(found[r, "parameters"], needs[r]["parameters"], swap),
            Tenant(found[r, "gradients"], needs[r]["gradients"], False),
            Tenant(found[r, "optimizer"], needs[r]["optimizer"], swap),
        )
        for r in roles
    }
    for role, successor in zip(roles, roles[1:] + roles[:1]) if swap else ():
        memories[role].next = memories[successor]
    return memories


def held(memories: Mapping[str, Memory]) -> int:
    """Bytes of the device that the roles have been given."""
    tenants = [t for m in memories.values() for t in (m.weights, m.gradients, m.optimizer)]
    return sum(slot.size for slot in {t.slot for t in tenants})


class Weights:
    """One role's weights. Roles of one shape may share the modules: `show` puts a role's weights
    into them. With a tenant they are flat copies in its memory, of what the modules hold now."""

    def __init__(self, chunks: list[nn.Module], tenant: Tenant | None = None) -> None:
        parameters = [p for chunk in chunks for p in chunk.parameters()]
        self._pairs = [(p, p.data if tenant is None else _copy(p.data, tenant)) for p in parameters]
        self.show()  # or the modules would keep what they hold now beside it, until they are used

    def show(self) -> None:
        """Make these the modules' weights."""
        parameter, view = self._pairs[0]
        if parameter.data_ptr() != view.data_ptr():
            for parameter, view in self._pairs:
                parameter.data = view


def _copy(weight: Tensor, tenant: Tenant) -> Tensor:
    place = tenant.allocate(-(-weight.numel() // ALIGNMENT) * ALIGNMENT, weight.dtype)
    return place[: weight.numel()].view(weight.shape).copy_(weight)
