"""Compile the kernels that a call launches for a GPU that is not there; nothing executes.

    with FakeGPU("sm_90") as gpu:
        token_logprobs(torch.empty(8, 128256), tokens)  # CPU tensors; what comes out is undefined
    gpu.kernels  # one Kernel per launch

A warning, the compiler's or not, raises. Triton must not be interpreted in this process.
"""

import heapq
import itertools
import re
import subprocess
import warnings
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver

from tetrad.kernels import launch

TOOLS = Path(triton.__file__).parent / "backends/nvidia/bin"
INDICES = itertools.count(1000)


@dataclass(frozen=True)
class Architecture:
    target: GPUTarget
    shared_memory: int  # bytes a block may have: Triton refuses to launch with more
    registers: int  # of 32 bits that a block may have: a GPU refuses to launch with more


ARCHITECTURES = {
    "sm_80": Architecture(GPUTarget("cuda", 80, 32), 166912, 65536),
    "sm_90": Architecture(GPUTarget("cuda", 90, 32), 232448, 65536),
    "sm_100": Architecture(GPUTarget("cuda", 100, 32), 232448, 65536),
    "gfx942": Architecture(GPUTarget("hip", "gfx942", 64), 65536, 131072),
}


@dataclass(frozen=True)
class Instruction:
    """One line of an NVIDIA listing."""

    name: str
    guarded: bool  # by a predicate: it may do nothing, yet takes its turn
    target: int | None  # of a branch, the place that it names
    falls_through: bool  # whether the next one may follow it


@dataclass
class Kernel:
    name: str
    threads: int  # of a block
    seconds: float  # it took to compile; 0 when Triton's cache had it
    files: dict[str, Path]  # what each stage of the compiler left, by suffix

    @cached_property
    def usage(self) -> dict[str, int]:
        """What the kernel occupies per thread: REG registers, STACK bytes (spills are there)."""
        if ".amdgcn" in self.files:
            fields = {"REG": "vgpr_count", "STACK": "private_segment_fixed_size"}
            found = {k: re.search(rf"\.{name}: +(\d+)", self.listing) for k, name in fields.items()}
            return {k: int(match[1]) for k, match in found.items()}
        listing = self._read("cuobjdump -res-usage")
        return {k: int(v) for k, v in re.findall(r"(REG|STACK):(\d+)", listing)}

    @property
    def registers(self) -> int:
        """Of a block: each thread gets a multiple of eight."""
        return -(-self.usage["REG"] // 8) * 8 * self.threads

    @property
    def wide_loads(self) -> int:
        """How many instructions load 128 bits, or more, of global memory for each thread."""
        wide = r"\bLDG\S*\.(128|256)\b|\b(global|buffer)_load_dwordx4\b"
        return len(re.findall(wide, self.listing))

    @property
    def wide_stores(self) -> int:
        """How many instructions store 128 bits, or more, to global memory for each thread."""
        wide = r"\bSTG\S*\.(128|256)\b|\b(global|buffer)_store_dwordx4\b"
        return len(re.findall(wide, self.listing))

    @cached_property
    def listing(self) -> str:
        """The instructions, as the machine names them."""
        if ".amdgcn" in self.files:
            return self.files[".amdgcn"].read_text()
        return self._read("nvdisasm -c")

    @cached_property
    def instructions(self) -> list[Instruction]:
        """NVIDIA's, without the NOPs and the endless branch that fill up the end."""
        labels: dict[str, int] = {}
        lines: list[re.Match] = []
        for line in self.listing.splitlines():
            if label := re.match(r"(\.L_x_\d+):", line):
                labels[label[1]] = len(lines)
            elif match := re.match(r"\s+/\*\w{4,}\*/\s+(@\S+\s+)?([A-Z][\w.]*)(.*)", line):
                lines += [match] if match[2] != "NOP" else []
        instructions = []
        for place, (guard, name, rest) in enumerate(line.groups() for line in lines):
            label = re.search(r"`\((\.L_x_\d+)\)", rest) if name.startswith("BRA") else None
            target = labels[label[1]] if label else None
            if target == place:
                continue
            conditional = guard is not None or re.match(r"\s+!?U?P\d", rest) is not None
            leaves = name.startswith(("BRA", "EXIT", "RET", "BRX"))
            instructions.append(
                Instruction(name, guard is not None, target, conditional or not leaves)
            )
        return instructions

    @property
    def loops(self) -> list[int]:
        """How many instructions a round of each loop issues at most, in the order of the code."""
        branches = enumerate(self.instructions)
        return [i - x.target + 1 for i, x in branches if x.target is not None and x.target < i]

    def shortest_way(self, through: str) -> int:
        """The fewest instructions from the first to the end, on a way that meets `through`."""
        heap, seen = [(1, 0, False)], set()
        while heap:
            length, place, met = heapq.heappop(heap)
            if (place, met) in seen or place >= len(self.instructions):
                continue
            seen.add((place, met))
            instruction = self.instructions[place]
            met = met or instruction.name == through
            if met and instruction.name == "EXIT" and not instruction.guarded:
                return length
            if instruction.target is not None:
                heapq.heappush(heap, (length + 1, instruction.target, met))
            if instruction.falls_through:
                heapq.heappush(heap, (length + 1, place + 1, met))
        raise ValueError(f"no way of {self.name} meets {through}")

    def _read(self, tool: str) -> str:
        name, *options = tool.split()
        command = [TOOLS / name, *options, self.files[".cubin"]]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


class FakeGPU:
    """Stands in for Triton's driver: it hands out a target, and keeps what would be launched."""

    def __init__(self, architecture: str) -> None:
        self.kernels: list[Kernel] = []
        self.architecture = ARCHITECTURES[architecture]
        self.index = next(INDICES)  # of its own: Triton keeps a kernel and its launcher per device
        self.utils = SimpleNamespace(
            get_device_properties=lambda _: {"max_shared_mem": self.architecture.shared_memory},
            load_binary=lambda *_: (object(), object(), 0, 0, 1024),
        )
        self._compiled: dict[str, Kernel] = {}  # by Triton's hash

    def _keep(self, *, metadata, metadata_group, times, cache_hit, **_) -> None:
        self._compiled[metadata["hash"]] = Kernel(
            metadata["name"],
            metadata["num_warps"] * self.architecture.target.warp_size,
            0.0 if cache_hit else times.total / 1e6,
            {Path(path).suffix: Path(path) for path in metadata_group.values()},
        )

    def launcher_cls(self, _source, metadata):
        return lambda *_: self.kernels.append(self._compiled[metadata.hash])

    def get_current_target(self) -> GPUTarget:
        return self.architecture.target

    def get_current_device(self) -> int:
        return self.index

    def get_current_stream(self, _device: int) -> int:
        return 0

    def __enter__(self) -> "FakeGPU":
        self._undo = ExitStack()
        self._undo.callback(driver.set_active, driver._active)
        driver.set_active(self)
        self._undo.enter_context(knobs.compilation.scope())
        knobs.compilation.listener = self._keep
        self._undo.enter_context(warnings.catch_warnings())
        warnings.simplefilter("error")
        self._undo.enter_context(mock.patch.object(launch, "INTERPRETED", True))  # on CPU tensors
        return self

    def __exit__(self, *exception) -> None:
        self._undo.close()
