"""Several ranks without torchrun: everything is imported once, then the ranks are forked."""

import multiprocessing
import os
import pickle
import tempfile
import time
import traceback
from collections.abc import Callable

import torch
import torch.distributed as dist


def run_world(size: int, work: Callable, *args, timeout: float = 240) -> list:
    """work(*args) on `size` gloo ranks; their results (picklable) in the order of the ranks."""
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    with tempfile.TemporaryDirectory() as folder:
        processes = [
            context.Process(target=_rank, args=(work, args, rank, size, f"{folder}/store", queue))
            for rank in range(size)
        ]
        for process in processes:
            process.start()
        results: dict[int, object] = {}
        deadline = time.monotonic() + timeout
        try:
            while len(results) < size:
                rank, value, error = queue.get(timeout=max(0.1, deadline - time.monotonic()))
                assert error is None, f"rank {rank}:\n{error}"
                results[rank] = pickle.loads(value)
        finally:
            for process in processes:
                if len(results) < size:
                    process.kill()
                process.join()
    return [results[rank] for rank in range(size)]


def _rank(work: Callable, args: tuple, rank: int, size: int, store: str, queue) -> None:
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(size))
    torch.set_num_threads(1)
    try:
        dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=size)
        queue.put((rank, pickle.dumps(work(*args)), None))  # by value: the rank ends before we read
    except BaseException:
        queue.put((rank, None, traceback.format_exc()))
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
