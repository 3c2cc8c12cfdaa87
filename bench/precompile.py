"""python -m bench.precompile [FILE]: Triton's cache for sm_90, filled on a machine without a GPU.

Runs our ops on the shapes of every bench's cases, on tensors whose memory is not touched; nothing
executes but the compiler. Triton's key of a kernel holds its own library, the kernel's source with
the number of its first line, and what the arguments are (types, 1, multiples of 16), so that a
cache is of use to the same build of Triton, for the same Python, and to the same kernels/.

FILE, .whl/triton-cache.tar.gz, is for `tar -xzf FILE -C /tmp`: the cache names its files by their
absolute paths, which begin with HOME. There TRITON_CACHE_DIR=HOME uses it.
"""

import argparse
import io
import json
import os
import sys
import tarfile
import tempfile
import time
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

HOME = Path("/tmp/tetrad-triton")  # on the other machine
ARCHITECTURE = "sm_90"
LARGE = 1 << 16  # elements; operations on more are not carried out


def main(arguments: list[str] | None = None) -> None:
    from bench.wheels import FOLDER

    parser = argparse.ArgumentParser("python -m bench.precompile")
    parser.add_argument("file", nargs="?", type=Path, default=FOLDER / "triton-cache.tar.gz")
    parser.add_argument("--benches", nargs="*", help="those of these names [all]")
    parser.add_argument("--tiny", action="store_true", help="their small cases")
    parser.add_argument("--cache", type=Path, help="a folder to fill, or to find all in")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        cache = options.cache or Path(folder)
        os.environ["TRITON_CACHE_DIR"] = str(cache)
        os.environ["TRITON_STORE_BINARY_ONLY"] = "1"  # the rest is for readers
        found = compiled = 0
        for name in options.benches or benches():
            began = time.time()
            hits, misses = compile_bench(name, options.tiny)
            print(
                f"{name}: {hits} found, {misses} compiled, {time.time() - began:.0f} s", flush=True
            )
            found, compiled = found + hits, compiled + misses
        print(f"{found} found, {compiled} compiled")
        pack(cache, options.file)
    print(f"{options.file}: {options.file.stat().st_size / 1e6:.1f} MB")


def benches() -> list[str]:
    """Of ops: what benches of models launch depends on Megatron."""
    from bench import rows

    return [name for name in rows.benches() if name not in ("iteration", "decode")]


def compile_bench(name: str, tiny: bool = False) -> tuple[int, int]:
    """How many kernels Triton's cache had, and how many it has now besides."""
    from tests.fakegpu import FakeGPU

    cases = list(import_module(f"bench.bench_{name}").cases(tiny))
    with FakeGPU(ARCHITECTURE) as gpu:
        for case in cases:
            launch(case)
    kernels = {kernel.files[".json"]: kernel for kernel in gpu.kernels}
    misses = sum(kernel.seconds > 0 for kernel in kernels.values())
    return len(kernels) - misses, misses


def launch(case: Any) -> None:
    """What ours launches of a case, its inputs included."""
    import torch

    from bench.case import forward, gradients
    from bench.rows import is_ours

    with untouched():
        inputs = case.draw()
        for provider, call in case.providers.items():
            if is_ours(provider):
                outputs = forward(case, call, inputs)
                if case.backward:
                    above = [torch.empty_like(y) for y in outputs if y.requires_grad]
                    gradients(outputs, inputs, above)


def untouched():
    """A mode in which the results of PyTorch's functions on large tensors are of the right shape
    and strides, and their memory is as it comes: none is touched, so that none is needed.

    Views stay views, and what autograd must see is carried out.
    """
    import torch
    from torch import Tensor
    from torch.overrides import TorchFunctionMode
    from torch.utils._pytree import tree_map

    makers = {torch.randn, torch.rand, torch.zeros, torch.ones, torch.randint}

    def is_large(values: Any) -> bool:
        return any(isinstance(x, Tensor) and x.numel() > LARGE for x in values)

    def size_of(function, args: tuple, kwargs: dict) -> int:
        with torch.device("meta"):
            return function(*args, **{**kwargs, "device": "meta"}).numel()

    def on_meta(x: Any) -> Any:
        if isinstance(x, Tensor):
            return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="meta")
        return x

    class Untouched(TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            kwargs = kwargs or {}
            name = getattr(function, "__name__", "")
            if function is torch.autograd.backward:  # below its own look at the modes
                with self:
                    return torch.autograd.Variable._execution_engine.run_backward(
                        tuple(args[0]), tuple(kwargs["grad_tensors"]), False, False, (),
                        allow_unreachable=True, accumulate_grad=True,
                    )  # fmt: skip
            if function in makers:
                if "generator" in kwargs:
                    return function(*args, **kwargs)
                if size_of(function, args, kwargs) <= LARGE:
                    return function(*args, **kwargs)
                shaped = function(*args, **{**kwargs, "device": "meta"})
                made = torch.empty(shaped.shape, dtype=shaped.dtype)
                return made.requires_grad_(kwargs.get("requires_grad", False))
            operands = [*args, *kwargs.values()]
            tensors = [x for x in operands if isinstance(x, Tensor)]
            if (
                not is_large(operands)
                or name.startswith(("__get__", "__set__", "requires_grad", "data_ptr", "detach"))
                or torch.is_grad_enabled()
                and any(x.requires_grad for x in tensors)
            ):
                return function(*args, **kwargs)
            if isinstance(kwargs.get("out"), Tensor):
                return kwargs["out"]
            if name.endswith("_") and not name.endswith("__"):  # in place
                return args[0]
            stand_ins = tree_map(on_meta, (args, kwargs))
            result = function(*stand_ins[0], **stand_ins[1])
            given = [x for x in [*stand_ins[0], *stand_ins[1].values()] if isinstance(x, Tensor)]
            is_new = (
                isinstance(result, Tensor) and not result._is_view()
                and not any(result is x for x in given) and result.device.type == "meta"
            )  # fmt: skip
            if not is_new:
                return function(*args, **kwargs)
            return torch.empty_strided(result.shape, result.stride(), dtype=result.dtype)

    return Untouched()


def pack(cache: Path, file: Path) -> None:
    """The cache as an archive, whose lists of files say where they will lie: under HOME."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(file, "w:gz") as archive:
        for path in members(cache):
            content = path.read_bytes()
            if path.name.startswith("__grp__"):
                group = json.loads(content)
                group["child_paths"] = {
                    name: str(HOME / Path(old).relative_to(cache))
                    for name, old in group["child_paths"].items()
                }
                content = json.dumps(group).encode()
            entry = tarfile.TarInfo(f"{HOME.name}/{path.relative_to(cache)}")
            entry.size, entry.mode = len(content), 0o644
            archive.addfile(entry, io.BytesIO(content))


def members(cache: Path) -> Iterator[Path]:
    for path in sorted(cache.rglob("*")):
        if path.is_file() and path.suffix != ".source":
            yield path


if __name__ == "__main__":
    sys.exit(main())
