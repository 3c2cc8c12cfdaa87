"""python -m bench.wheels [FOLDER]: the wheels that a GPU's machine without a network may lack.

For Linux on x86-64 with the Python named below; versions are those that this was tested with. What
such a machine has, and what must fit its driver, is not among them: torch, triton, numpy,
transformers with its hub and tokenizers, pandas, pyarrow. docs/bench.md says how to use them.
"""

import argparse
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path

from bench.rows import ROOT

FOLDER = ROOT / ".whl"
PYTHON = "3.12"
# glibc's versions that a wheel may ask for: pip takes the names as they are, not what they include
PLATFORMS = [f"manylinux_2_{minor}_x86_64" for minor in (28, 27, 26, 24, 17, 12, 5)]
PLATFORMS += ["manylinux2014_x86_64", "manylinux2010_x86_64", "manylinux1_x86_64"]
LIMIT = 30 << 20  # bytes of all together: what can be carried by any means

NEEDED = [  # by the program and by its tests
    "megatron-core", "omegaconf", "psutil", "pytest", "pluggy==1.6.0", "iniconfig==2.3.0",
    "pytest-xdist", "execnet", "hypothesis", "sortedcontainers",
]  # fmt: skip
PEERS = [  # whom the benches compare with, and what they import
    "liger-kernel", "cut-cross-entropy", "fla-core", "einops==0.8.2", "trl", "accelerate",
    "datasets", "dill==0.4.1", "multiprocess==0.70.19", "xxhash==4.1.0",
]  # fmt: skip
PINS = ["constraints.txt", "tests/peers/bench.txt", "tests/peers/trl.txt"]


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        "python -m bench.wheels", description="What `make wheels` runs."
    )
    parser.add_argument("folder", nargs="?", type=Path, default=FOLDER)
    folder = parser.parse_args(arguments).folder
    wanted = requirements([*NEEDED, *PEERS], pins())
    with tempfile.TemporaryDirectory() as fresh:
        download(wanted, Path(fresh))
        folder.mkdir(parents=True, exist_ok=True)
        ours = {distribution(name) for name in wanted}
        for old in folder.glob("*.whl"):  # one version of each, and nobody else's
            if distribution(old.name) in ours:
                old.unlink()
        for wheel in Path(fresh).glob("*.whl"):
            shutil.move(wheel, folder / wheel.name)
    size = sum(path.stat().st_size for path in folder.glob("*.whl"))
    print(f"{folder}: {len(list(folder.glob('*.whl')))} wheels, {size / 1e6:.1f} MB")
    if size > LIMIT:
        sys.exit(f"more than {LIMIT >> 20} MiB")


def distribution(name: str) -> str:
    """Of a wheel's file name, or of NAME==VERSION."""
    return re.split("==|-(?=[0-9])", name)[0].replace("-", "_").lower()


def pins() -> dict[str, str]:
    """The version of each distribution that this was tested with, by its name; the first wins."""
    found: dict[str, str] = {}
    for name in PINS:
        lines = (ROOT / name).read_text().splitlines()
        for package, version in (re.split("==", x) for x in lines if re.match(r"[\w-]+==", x)):
            found.setdefault(package.lower(), version)
    return found


def requirements(names: Iterable[str], versions: Mapping[str, str]) -> list[str]:
    """Each name with its version. Raises KeyError for one that has none."""
    return [name if "==" in name else f"{name}=={versions[name]}" for name in names]


def download(wanted: Iterable[str], folder: Path) -> None:
    """Wheels alone, for the other machine's Python and not for this one."""
    platforms = [word for name in PLATFORMS for word in ("--platform", name)]
    subprocess.run(
        [
            sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check",
            "--no-deps", "--only-binary=:all:", "--implementation", "cp",
            "--python-version", PYTHON, *platforms, "--dest", folder, *wanted,
        ],
        check=True,
    )  # fmt: skip


if __name__ == "__main__":
    main()
