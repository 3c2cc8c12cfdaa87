"""What is carried to a GPU's machine without a network: versions, the shapes of a cache's files."""

import json
import tarfile

import pytest
import torch

from bench import precompile, wheels


def test_every_wheel_has_one_version() -> None:
    wanted = wheels.requirements([*wheels.NEEDED, *wheels.PEERS], wheels.pins())
    names = [requirement.split("==")[0] for requirement in wanted]
    assert "megatron-core==0.16.1" in wanted
    assert len(set(names)) == len(names) and all(x.count("==") == 1 for x in wanted)


def test_what_the_machine_has_is_not_replaced() -> None:
    names = {name.split("==")[0] for name in [*wheels.NEEDED, *wheels.PEERS]}
    assert not names & {"torch", "triton", "numpy", "transformers", "huggingface_hub", "tokenizers"}


def test_a_name_without_a_version_is_refused() -> None:
    with pytest.raises(KeyError, match="unheard-of"):
        wheels.requirements(["unheard-of"], wheels.pins())


def test_wheels_of_others_stay_and_a_failed_download_costs_nothing(tmp_path, monkeypatch) -> None:
    """Ours of another version go, once the new ones are there."""
    old, other = tmp_path / "trl-0.1-py3-none-any.whl", tmp_path / "some_tool-1.0-py3-none-any.whl"
    for path in old, other:
        path.touch()

    def fails(wanted, folder) -> None:
        raise OSError("no network")

    monkeypatch.setattr(wheels, "download", fails)
    with pytest.raises(OSError):
        wheels.main([str(tmp_path)])
    assert old.exists() and other.exists()
    new = "trl-1.16.0-py3-none-any.whl"
    monkeypatch.setattr(wheels, "download", lambda wanted, folder: (folder / new).touch())
    wheels.main([str(tmp_path)])
    assert {path.name for path in tmp_path.iterdir()} == {new, other.name}


def test_a_cache_says_where_it_will_lie(tmp_path) -> None:
    """Triton finds a kernel's files by the absolute paths in its list, or compiles."""
    folder = tmp_path / "cache" / "KEY"
    folder.mkdir(parents=True)
    (folder / "k.cubin").write_bytes(b"binary")
    paths = {"k.cubin": str(folder / "k.cubin")}
    (folder / "__grp__k.json").write_text(json.dumps({"child_paths": paths}))
    precompile.pack(tmp_path / "cache", tmp_path / "cache.tar.gz")
    with tarfile.open(tmp_path / "cache.tar.gz") as archive:
        archive.extractall(tmp_path / "there", filter="data")
    found = tmp_path / "there" / precompile.HOME.name / "KEY"
    assert (found / "k.cubin").read_bytes() == b"binary"
    listed = json.loads((found / "__grp__k.json").read_text())["child_paths"]
    assert listed == {"k.cubin": str(precompile.HOME / "KEY" / "k.cubin")}


def test_what_is_large_has_its_shape_and_is_not_made() -> None:
    ones = torch.ones(512, 512)
    with precompile.untouched():
        product = ones @ ones.t()
        drawn = torch.randn(1 << 17, 4096, dtype=torch.bfloat16)
        assert drawn[1:].data_ptr() == drawn.data_ptr() + 2 * 4096  # views stay views
        small = torch.ones(3) + 1
    assert product.shape == (512, 512) and not (product == 512).all()
    assert drawn.shape == (1 << 17, 4096) and drawn.dtype == torch.bfloat16
    assert small.tolist() == [2, 2, 2]  # what is small is carried out


def test_what_is_large_is_not_made_in_a_backward_pass_either() -> None:
    seen = []

    class Op(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, above):
            seen.append(torch.ones_like(above) @ torch.ones_like(above))
            return above

    x = torch.ones(512, 512, requires_grad=True)
    with precompile.untouched():
        y = Op.apply(x)
        torch.autograd.backward([y], [torch.empty_like(y)])
    assert x.grad is not None and not (seen[0] == 512).all()
