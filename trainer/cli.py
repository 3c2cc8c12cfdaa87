"""tetrad COMMAND [CONFIG.yaml] [a.b=value …]

Every training command reads a YAML file, then the overrides, and writes into the folder `out`:
config.yaml, metrics.jsonl, summary.json, TensorBoard events and checkpoints. On several GPUs:
torchrun --nproc-per-node N --no-python tetrad COMMAND … parallel.tp=2 parallel.pp=2
Of import and export the first argument is the model: tetrad import FOLDER out=…
"""

import difflib
import importlib
import importlib.metadata
import importlib.util
import logging
import os
import platform
import sys
from collections.abc import Callable

COMMANDS = {  # name: (module and function, config, what it does)
    "demo": ("demo:demo", "Demo", "the three steps of InstructGPT in miniature, with a report"),
    "pretrain": ("sft:pretrain", "Pretrain", "train a language model on text"),
    "sft": ("sft:sft", "SFT", "fine-tune it on demonstrations"),
    "rm": ("rm:rm", "RM", "train a reward model on ranked completions"),
    "ppo": ("ppo:ppo", "PPO", "optimise the policy against the reward model: PPO, PPO-ptx"),
    "plan": ("plan:plan", "Plan", "bytes, traffic and time of ppo on gpus=N gpu=NAME"),
    "generate": ("evaluate:generate", "Generate", "sample answers to prompts"),
    "evaluate": ("evaluate:evaluate", "Evaluate", "loss on text, reward, win rate, KL"),
    "import": ("convert:import_model", "Import", "a Hugging Face model as our checkpoint"),
    "export": ("convert:export_model", "Export", "a run or checkpoint as a Hugging Face model"),
}


def main() -> None:
    """The console script. Bad input: one line, exit 2."""
    arguments = sys.argv[1:]
    if not arguments or arguments[0] in ("-h", "--help"):
        print(_usage())
        sys.exit(0 if arguments else 2)
    command, *rest = arguments
    if command == "doctor":
        print(doctor())
        return
    try:
        if command not in COMMANDS:
            near = difflib.get_close_matches(command, [*COMMANDS, "doctor"], n=1, cutoff=0.0)
            raise ValueError(f"unknown command {command}; the nearest is {near[0]}")
        _run(command, rest)
    except (ValueError, OSError, FloatingPointError) as error:
        if os.environ.get("TETRAD_TRACEBACK"):
            raise
        rank = os.environ.get("RANK", "0")
        where = "" if rank == "0" else f" [rank {rank}]"
        print(f"tetrad {command}{where}: {error}", file=sys.stderr)
        sys.exit(2)


def _run(command: str, arguments: list[str]) -> None:
    from tetrad.trainer import config  # imports are late: a slip in the arguments is told at once

    where, schema, _ = COMMANDS[command]
    if arguments and arguments[0] in ("-h", "--help"):
        print(config.as_yaml(getattr(config, schema)))
        return
    cfg = config.parse(getattr(config, schema), arguments)
    level = logging.INFO if os.environ.get("RANK", "0") == "0" else logging.ERROR
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    logging.getLogger("tetrad").setLevel(level)
    module, function = where.split(":")
    if command == "plan":  # arithmetic: needs no processes, nor the seconds that torch takes
        importlib.import_module(f"tetrad.trainer.{module}").plan(cfg)
        return
    from tetrad.parallel import device

    device.install()  # before anything imports megatron.core
    from tetrad.parallel import topology

    stage: Callable = getattr(importlib.import_module(f"tetrad.trainer.{module}"), function)
    try:
        stage(cfg)
    finally:
        topology.shutdown()


def _usage() -> str:
    lines = [f"  {name:10} {does}" for name, (_, _, does) in COMMANDS.items()]
    return "\n".join(
        [
            "usage: tetrad COMMAND [CONFIG.yaml] [a.b=value …]   (tetrad COMMAND --help: its keys)",
            *lines,
            "  doctor     what this machine offers, and which path each part takes",
            "TETRAD_TRACEBACK=1 shows where an error came from.",
        ]
    )


def doctor() -> str:
    """Versions, devices, and which path each part takes, and why."""
    import torch

    from tetrad.parallel import device

    device.install()
    from tetrad.parallel.attention import flash
    from tetrad.parallel.optimizer import adam_from

    def version(package: str) -> str:
        try:
            return importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            return "absent"

    cuda = torch.cuda.is_available()
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())] if cuda else []
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    ops = "Triton" if cuda else "interpreted Triton (slow)" if interpreted else "PyTorch reference"
    packages = ("torch", "triton", "megatron-core", "transformers", "datasets", "psutil")
    optional = ("flash-attn", "transformer-engine")
    fused = cuda and device.apex_norms()
    rows = {
        "python": f"{platform.python_version()} on {platform.machine()}, {os.cpu_count()} cores",
        **{name: version(name) for name in (*packages, *optional)},
        # NVIDIA's apex is not PyPI's: only its submodules tell
        "NVIDIA apex": "present" if device.apex_norms() else "absent",
        "GPUs": ", ".join(gpus) or "none",
        "processes": "NCCL" if cuda else "gloo",
        "fused ops": ops,
        "Megatron": "as it is" if cuda else "adapted to the CPU: there is no GPU",
        "attention": flash()[1],
        "norms": "NVIDIA apex" if fused else "PyTorch: no GPU, or no NVIDIA apex",
        "linear layers": "cuBLAS through PyTorch; Transformer Engine's are not used",
        "Adam": adam_from(),
    }
    return "\n".join(f"{name:20} {value}" for name, value in rows.items())


if __name__ == "__main__":
    main()
