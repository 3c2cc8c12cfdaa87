"""Compile the kernels that a call launches for a GPU that is not there; nothing executes.

    with FakeGPU("sm_90") as gpu:
        token_logprobs(torch.empty(8, 128256), tokens)  # CPU tensors; what comes out is undefined
    gpu.kernels  # one Kernel per launch

Triton must not be interpreted in this process.
"""

import itertools
import re
import subprocess
import tempfile
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver

from tetrad.kernels import launch

TOOLS = Path(triton.__file__).parent / "backends/nvidia/bin"
SHARED_MEMORY = {"sm_80": 166912, "sm_90": 232448, "sm_100": 232448}  # bytes a block may have


INDICES = itertools.count(1000)


@dataclass
class Kernel:
    name: str
    cubin: bytes

    @cached_property
    def usage(self) -> dict[str, int]:
        """What the kernel occupies per thread: REG registers, STACK bytes (spills are there)."""
        return {
            k: int(v)
            for k, v in re.findall(r"(REG|STACK):(\d+)", self._read("cuobjdump -res-usage"))
        }

    @cached_property
    def sass(self) -> str:
        return self._read("nvdisasm -c")

    def _read(self, tool: str) -> str:
        name, *options = tool.split()
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            Path(file.name).write_bytes(self.cubin)
            command = [TOOLS / name, *options, file.name]
            return subprocess.run(command, capture_output=True, text=True, check=True).stdout


class FakeGPU:
    """Stands in for Triton's driver: it hands out a target, and keeps what would be launched."""

    def __init__(self, architecture: str) -> None:
        self.kernels: list[Kernel] = []
        self.index = next(INDICES)  # of its own: Triton keeps a kernel and its launcher per device
        self.number = int(architecture.removeprefix("sm_"))
        self.utils = SimpleNamespace(
            get_device_properties=lambda _: {"max_shared_mem": SHARED_MEMORY[architecture]},
            load_binary=lambda name, cubin, *_: (object(), Kernel(name, cubin), 0, 0, 1024),
        )

    def launcher_cls(self, _source, _metadata):
        def start(_x, _y, _z, _stream, kernel: Kernel, *_) -> None:
            self.kernels.append(kernel)

        return start

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.number, 32)

    def get_current_device(self) -> int:
        return self.index

    def get_current_stream(self, _device: int) -> int:
        return 0

    def __enter__(self) -> "FakeGPU":
        self._driver = driver._active
        driver.set_active(self)
        self._runs_kernel = mock.patch.object(launch, "INTERPRETED", True)  # on CPU tensors
        self._runs_kernel.start()
        return self

    def __exit__(self, *exception) -> None:
        self._runs_kernel.stop()
        driver.set_active(self._driver)
