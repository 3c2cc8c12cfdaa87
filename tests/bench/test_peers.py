"""Peers that are not here, or not as expected, are absent with a reason and break nothing."""

from collections.abc import Iterator

import pytest

from bench import peers


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    peers._imported.cache_clear()
    yield
    peers._imported.cache_clear()


def test_without_peers_all_are_absent() -> None:
    reasons = peers.absent(peers.ADAPTORS)
    assert reasons.keys() == peers.PACKAGES.keys()
    assert all(reason.startswith("No module named '") for reason in reasons.values()), reasons
    assert not any(peers.providers(op) for op in peers.ADAPTORS)


def test_an_op_that_no_peer_has() -> None:
    assert peers.providers("whiten") == {}


@pytest.mark.parametrize(
    "code, reason",
    [
        ("raise OSError('libcudart.so.12: cannot open')", "libcudart.so.12: cannot open"),
        ("raise RuntimeError('no driver\\nat all')", "no driver"),
        ("assert False", "AssertionError"),
        ("", "no function linear_cross_entropy at cut_cross_entropy"),
    ],
)
def test_whatever_a_package_does_at_import(code, reason, tmp_path, monkeypatch) -> None:
    (tmp_path / "cut_cross_entropy.py").write_text(code)
    (tmp_path / "cut_cross_entropy-9.8.dist-info").mkdir()
    (tmp_path / "cut_cross_entropy-9.8.dist-info" / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: cut-cross-entropy\nVersion: 9.8\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    assert peers.absent(["linear_cross_entropy"])["cut-cross-entropy"] == f"9.8: {reason}"
    assert peers.providers("linear_cross_entropy") == {}
