"""The launch files, as far as one machine allows: two "nodes" on localhost."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from tests.trainer.stages import TINY, metrics, run, write_world

ROOT = Path(__file__).parents[2]
# srun starts its command once a node; scontrol names the nodes
STUBS = {
    "srun": 'for node in 1 2; do SLURM_NODEID=$node "$@" & jobs="$jobs $!"; done\n'
    "for job in $jobs; do wait $job || exit 1; done\n",
    "scontrol": "echo 127.0.0.1; echo 127.0.0.1\n",
}


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def test_two_nodes_of_slurm_train_as_one_process_does(tmp_path) -> None:
    write_world(tmp_path)
    for name, script in STUBS.items():
        stub = tmp_path / name
        stub.write_text(f"#!/bin/bash\n{script}")
        stub.chmod(0o755)
    arguments = [f"text.path={tmp_path}/text.jsonl", *TINY, "batch_size=8", "length=64"]
    arguments += ["epochs=0.1"]
    env = os.environ | {
        "PATH": f"{tmp_path}:{Path(sys.executable).parent}:{os.environ['PATH']}",
        "SLURM_JOB_NODELIST": "node[1-2]", "SLURM_NNODES": "2", "SLURM_GPUS_PER_NODE": "h100:1",
        "SLURM_JOB_ID": "7", "PORT": str(free_port()), "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    out = tmp_path / "two"
    subprocess.run(
        ["bash", ROOT / "docs/slurm.sbatch", "pretrain", f"out={out}", "parallel.tp=2", *arguments],
        env=env, check=True, timeout=200,
    )  # fmt: skip
    alone = run("pretrain", f"out={tmp_path}/one", *arguments)
    assert len(alone) > 2
    for ours, one in zip(metrics(str(out)), alone, strict=True):
        assert ours["loss"] == pytest.approx(one["loss"], abs=1e-4)
