"""The rules of the house that a reader could break without noticing."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MAY_IMPORT = {  # folder -> our folders it may import; the arrow only ever points down
    "kernels": {"kernels"},
    "parallel": {"kernels", "parallel"},
    "trainer": {"kernels", "parallel", "trainer"},
}
HOME_OF = {"triton": "kernels", "megatron": "parallel"}


def imports(path: Path) -> set[str]:
    """Dotted names that a file imports."""
    tree = ast.parse(path.read_text())
    names = {n.name for x in ast.walk(tree) if isinstance(x, ast.Import) for n in x.names}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            names |= {f"{node.module}.{n.name}" for n in node.names}
    return names


@pytest.mark.parametrize("folder", MAY_IMPORT)
def test_imports_point_down(folder) -> None:
    for path in (ROOT / folder).glob("*.py"):
        ours = {n.split(".")[1] for n in imports(path) if n.startswith("tetrad.")}
        assert ours <= MAY_IMPORT[folder], f"{path.name} imports upwards"


@pytest.mark.parametrize("package, home", HOME_OF.items())
def test_each_engine_stays_in_its_room(package, home) -> None:
    for folder in set(MAY_IMPORT) - {home}:
        for path in (ROOT / folder).glob("*.py"):
            used = {n for n in imports(path) if n.split(".")[0] == package}
            assert not used, f"{folder}/{path.name} imports {package}"


def test_our_kernels_folder_does_not_pose_as_the_hub_package() -> None:
    """`transformers` probes for a package called `kernels`; from the root it must not find ours."""
    code = """if True:
        import sys
        import transformers.integrations.hub_kernels  # the module that probes
        file = getattr(sys.modules.get("kernels"), "__file__", None)
        assert not (file or "").startswith(sys.argv[1]), f"transformers imported our {file}"
    """
    subprocess.run([sys.executable, "-c", code, str(ROOT)], cwd=ROOT, check=True)


@pytest.mark.parametrize("folder", [*MAY_IMPORT, "tests", "tests/kernels"])
def test_rooms_are_no_packages(folder) -> None:
    assert not (ROOT / folder / "__init__.py").exists()


def test_every_kernel_has_a_reference_a_test_and_a_bench() -> None:
    import tetrad
    from tetrad.kernels import reference

    for path in (ROOT / "kernels").glob("*.py"):
        if path.stem in ("reference", "check", "launch", "patch", "products"):
            continue
        ops = [name for name, home in tetrad._HOME.items() if home == path.stem]
        assert ops, f"{path.name} holds no op"
        assert all(hasattr(reference, name) for name in ops)
        assert (ROOT / f"tests/kernels/test_{path.stem}.py").exists()
        assert (ROOT / f"bench/bench_{path.stem}.py").exists()


def test_the_face_resolves_every_op() -> None:
    import tetrad
    from tetrad.kernels import reference

    for name in tetrad.__all__:
        if name != "__version__":
            assert getattr(tetrad, name).__name__ == name and hasattr(reference, name)


def test_nothing_happens_at_import() -> None:
    """A library user who wants one op gets neither Megatron nor a changed import system."""
    code = """if True:
        import sys
        finders = list(sys.meta_path)
        from tetrad import token_logprobs
        assert not any(m.startswith(("megatron", "transformers", "datasets")) for m in sys.modules)
        assert "_Finder" not in [type(f).__name__ for f in sys.meta_path]
    """
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, env=env)
