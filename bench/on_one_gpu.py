"""python -m bench.on_one_gpu TP: one of TP ranks that share a GPU and talk over gloo, whose
collectives take tensors of the GPU as they are. Prints what a small model finds, as JSON."""

import json
import sys

import torch.distributed as dist

from bench.models import NO_EOS
from tetrad.parallel import device

device.install()  # before anything imports megatron.core

from tetrad.parallel.generate import generate  # noqa: E402
from tetrad.parallel.packed import pack  # noqa: E402
from tetrad.parallel.settings import Architecture, Layout, Schedule  # noqa: E402
from tetrad.parallel.topology import initialize  # noqa: E402
from tetrad.trainer import config  # noqa: E402
from tetrad.trainer.loop import build_engine  # noqa: E402

SHAPE = Architecture(1000, 2, 256, 4, max_length=128)


def main() -> None:
    dist.init_process_group("gloo")
    topology = initialize(Layout(tp=int(sys.argv[1])))
    cfg = config.Run(out="", parallel=config.Parallel(precision="fp32"))
    engine = build_engine(cfg, topology, "language", SHAPE, schedule=Schedule(lr=1e-3))
    prompts = [[(7 * i + j) % 1000 for j in range(5 + i)] for i in range(6)]
    samples = generate(engine, prompts, max_new=12, eos_id=NO_EOS)
    batch = pack(prompts, samples.responses)
    found = {
        "sampled tokens": float(sum(map(sum, samples.responses))),
        "log-probs": float(engine.logprobs(batch).sum()),
    }
    stats = engine.accumulate_cross_entropy(batch, denominator=batch.counted)
    found |= {"loss": stats["loss"], "gradient norm": engine.step()["grad_norm"]}
    found["log-probs after a step"] = float(engine.logprobs(batch).sum())
    if dist.get_rank() == 0:
        print(json.dumps(found))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
