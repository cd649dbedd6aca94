"""Start the ranks of a distributed test: gloo processes on this machine's CPU."""

import multiprocessing
import socket
from functools import partial

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


# The ranks are forked from a process that has imported what they need, once.
multiprocessing.set_forkserver_preload(["torch", "transformers_tests.test_fsdp_mixin", "modeling_longnet"])


def _get_distributed_backend() -> str:
    return "gloo"


def _get_distributed_device_type() -> str:
    return "cpu"


def _get_rank_device(rank: int) -> torch.device:
    return torch.device("cpu")


def _set_rank_device(rank: int) -> None:
    torch.set_num_threads(1)  # the ranks share the cores


def _start_rank_processes(function, args: tuple, nprocs: int) -> None:
    """Call ``function(rank, *args)`` in ``nprocs`` fresh processes; a failure of any is raised here."""
    mp.start_processes(function, args=args, nprocs=nprocs, start_method="forkserver")


def run_distributed(world_size: int):
    """Make a caller that runs ``function(rank, *args)`` on every rank of a new process group."""
    return partial(partial, _run_ranks, world_size)


def _run_ranks(world_size: int, function, *args) -> None:
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    _start_rank_processes(_rank_main, (world_size, port, function, args), world_size)


def _rank_main(rank: int, world_size: int, port: int, function, args: tuple) -> None:
    _set_rank_device(rank)
    dist.init_process_group("gloo", init_method=f"tcp://localhost:{port}", rank=rank, world_size=world_size)
    try:
        function(rank, *args)
    finally:
        dist.destroy_process_group()
