"""A few processes in a gloo group that run what a test sends them, started once for many tests."""

import multiprocessing
import os
import tempfile
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path


PRELOADED = ["torch.distributed", "transformers", "accelerate", "modeling_longnet", "oracle", "tiny_models"]


class Ranks:
    """``world_size`` processes, each a rank of one gloo group. They must be closed.

    Args:
        world_size: number of processes.
        timeout: seconds after which a collective that waits for a rank fails.
    """

    def __init__(self, world_size: int, timeout: float = 60.0):
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(PRELOADED)
        self._folder = tempfile.TemporaryDirectory()
        self._pipes, self.processes = [], []
        for rank in range(world_size):
            ours, theirs = context.Pipe()
            store = Path(self._folder.name) / "store"
            process = context.Process(target=_serve, args=(rank, world_size, store, timeout, theirs), daemon=True)
            process.start()
            theirs.close()
            self._pipes.append(ours)
            self.processes.append(process)

    def start(self, function: Callable, *args) -> None:
        """Let every rank call a module-level function."""
        for pipe in self._pipes:
            pipe.send((function, args))

    def result(self, rank: int, timeout: float = 120.0):
        """Return ``(result, None)`` or ``(None, error text)`` of a rank's last call, or fail when time is up."""
        if not self._pipes[rank].poll(timeout):
            raise TimeoutError(f"rank {rank} has not answered for {timeout} s")
        return self._pipes[rank].recv()

    def run(self, function: Callable, *args) -> list:
        """Let every rank call a module-level function; return the results in order of rank.

        Raises:
            AssertionError: with the trace of the first rank that raised.
        """
        self.start(function, *args)
        answers = [self.result(rank) for rank in range(len(self._pipes))]
        for rank, (_, error) in enumerate(answers):
            assert error is None, f"rank {rank}: {error}"
        return [result for result, _ in answers]

    def close(self) -> None:
        for pipe in self._pipes:
            pipe.close()
        for process in self.processes:
            process.join(5)
            if process.is_alive():
                process.kill()
                process.join()
        self._folder.cleanup()


def _serve(rank: int, world_size: int, store: Path, timeout: float, pipe) -> None:
    import torch
    import torch.distributed as dist

    # What a launcher would set; Accelerate reads it.
    numbers = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world_size, "LOCAL_WORLD_SIZE": world_size}
    os.environ.update({name: str(number) for name, number in numbers.items()} | {"MASTER_ADDR": "127.0.0.1"})
    os.environ["MASTER_PORT"] = "0"  # unused: the group exists already
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=world_size, timeout=timedelta(seconds=timeout)
    )
    while True:
        try:
            function, args = pipe.recv()
        except EOFError:
            break
        try:
            answer = function(*args), None
        except Exception:
            answer = None, traceback.format_exc()
        pipe.send(answer)
    dist.destroy_process_group()
