"""What patching promises of any package, shown on one made for the test; see tests/peers too."""

import importlib
import subprocess
import sys
from pathlib import Path

import pytest

from tetrad.kernels import patch

CORE = """if True:
    def scale(x, by=2): return by * x
    def shift(x): return x + 1
    REGISTRY = {"scale": scale}
    class Maker:
        def make(self, x): return -x
    from torch.autograd import Function
    class Halve(Function):
        @staticmethod
        def forward(ctx, x, by=2): return x / by
        @staticmethod
        def backward(ctx, dx): return dx / 2, None
"""
USER = "from peer.core import scale, shift as moved, Halve\ndef twice(x): return scale(x)\n"
NAMES = {
    "peer.core.scale", "peer.core.REGISTRY['scale']", "peer.core.shift", "peer.core.Maker.make",
    "peer.user.scale", "peer.user.moved", "peer.core.Halve", "peer.user.Halve",
}  # fmt: skip


def scale(x, by=2):
    return 100 * by * x


def shift(x):
    return x + 100


def make(self, x):
    return -100 * x


class Halve:
    """By 2 it is ours, and 100 times too much."""

    @staticmethod
    def apply(x, by=2):
        return 50 * x if by == 2 else patch._theirs[Halve].apply(x, by)


STAND_INS = {
    "peer.core:scale": scale,
    "peer.core:shift": shift,
    "peer.core:Maker.make": make,
    "peer.core:Halve": Halve,
}


@pytest.fixture
def peer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The folder of an installed package: version 1.2.3, functions, a copy, a registry, a class."""
    for name, text in {"__init__": "", "core": CORE, "user": USER, "late": USER}.items():
        (tmp_path / "peer").mkdir(exist_ok=True)
        (tmp_path / "peer" / f"{name}.py").write_text(text)
    (tmp_path / "peer-1.2.3.dist-info").mkdir()
    (tmp_path / "peer-1.2.3.dist-info/METADATA").write_text("Name: peer\nVersion: 1.2.3\n")
    monkeypatch.setattr(sys, "dont_write_bytecode", True)  # it would outlive an edit of equal size
    monkeypatch.syspath_prepend(tmp_path)
    importlib.import_module("peer.user")
    yield tmp_path / "peer"
    patch.undo()
    for name in [n for n in sys.modules if n.split(".")[0] == "peer"]:
        del sys.modules[name]


def results() -> list[int]:
    core, user = sys.modules["peer.core"], sys.modules["peer.user"]
    return [
        core.scale(3), core.shift(3), core.REGISTRY["scale"](3), core.Maker().make(3),
        user.twice(3), user.moved(3), core.Halve.apply(4), user.Halve.apply(4),
        core.Halve.apply(4, 4), user.Halve.apply(4, 4),
    ]  # fmt: skip


THEIRS = [6, 4, 6, -3, 6, 4, 2, 2, 1, 1]
OURS = [600, 103, 600, -300, 600, 103, 200, 200, 1, 1]


def test_every_copy_is_replaced_named_and_put_back(peer) -> None:
    assert results() == THEIRS
    names = patch._replace("peer", STAND_INS)
    assert set(names) == NAMES and len(names) == len(NAMES) and results() == OURS
    patch.undo()
    assert results() == THEIRS
    patch.undo()
    assert results() == THEIRS


def test_a_second_call_names_the_same_and_is_undone_by_one_undo(peer) -> None:
    first = patch._replace("peer", STAND_INS)
    assert patch._replace("peer", STAND_INS) == first and results() == OURS
    patch.undo()
    assert results() == THEIRS


def test_undo_reaches_a_module_that_was_loaded_while_patched(peer) -> None:
    patch._replace("peer", STAND_INS)
    late = importlib.import_module("peer.late")
    assert late.twice(3) == 600
    patch.undo()
    assert late.twice(3) == 6 and late.moved(3) == 4


def test_undo_leaves_what_others_have_replaced_since(peer) -> None:
    patch._replace("peer", STAND_INS)
    core = sys.modules["peer.core"]
    core.shift = abs
    patch.undo()
    assert core.shift is abs and core.scale(3) == 6


def test_an_absent_package_is_named() -> None:
    with pytest.raises(ImportError, match="^no_such_peer is not installed$"):
        patch._replace("no_such_peer", {})


@pytest.mark.parametrize(
    "was, now, error",
    [
        ("def shift(x)", "def moved(x)", "^peer 1.2.3 has no peer.core.shift$"),
        ("def make(self, x)", "def mend(self, x)", "^peer 1.2.3 has no peer.core.Maker.make$"),
        ("by=2", "by=3", r"^peer 1.2.3: peer.core.scale\(x, by=3\), expected \(x, by=2\)$"),
        ("def shift(x)", "def shift(y)", r"peer.core.shift\(y\), expected \(x\)$"),
        ("ctx, x, by=2", "ctx, x, by=3", r"Halve\(x, by=3\), expected \(x, by=2\)$"),
        ("ctx, x, by=2", "ctx, x", r"peer.core.Halve\(x\), expected \(x, by=2\)$"),
        ("Halve(Function)", "Halve", r"^peer 1.2.3: peer.core.Halve\(\), expected \(x, by=2\)$"),
    ],
)
def test_an_unexpected_function_is_named_and_nothing_is_patched(peer, was, now, error) -> None:
    (peer / "core.py").write_text(CORE.replace(was, now))
    sys.modules.pop("peer.core")
    importlib.invalidate_caches()
    core = importlib.import_module("peer.core")
    before = dict(vars(core))
    with pytest.raises(AttributeError, match=error):
        patch._replace("peer", STAND_INS)
    assert vars(core) == before and not patch._replaced


def test_a_module_that_cannot_be_imported_is_named_with_the_reason(peer) -> None:
    (peer / "broken.py").write_text("import no_such_peer")
    reason = "^peer 1.2.3: cannot import peer.broken: No module named 'no_such_peer'$"
    with pytest.raises(ImportError, match=reason):
        patch._replace("peer", {**STAND_INS, "peer.broken:f": scale})
    assert results() == THEIRS


def test_importing_patch_imports_no_peer() -> None:
    code = """if True:
        import sys
        from tetrad.kernels import patch
        heavy = {"trl", "verl", "openrlhf", "transformers", "datasets", "ray", "megatron"}
        assert not heavy & {name.split(".")[0] for name in sys.modules}
    """
    subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[1], check=True)
