"""The group of processes that share one sequence, and how they talk: small agreements, clear errors."""

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh


Result = TypeVar("Result")

# How many numbers require_agreement can find the maximum of.
MOST_MAXIMA = 1

# A model's forward is called through layers of code that cannot hand on an argument: trainers, wrappers for data
# parallelism, checkpoints. A context variable reaches it, belongs to one thread of control, and undoes itself. It is
# read once per forward pass; everything below gets the group in its arguments, so that a backward pass or a
# recomputation outside the context finds it too.
_group: ContextVar[dist.ProcessGroup | None] = ContextVar("longnet_sequence_group", default=None)
# The contexts that are open in any thread. The compiler cannot read a context variable, but it reads and guards a list.
_open: list[dist.ProcessGroup] = []


@contextmanager
def sequence_parallel(group: dist.ProcessGroup | DeviceMesh) -> Iterator[None]:
    """Let LongNet models run on slices of a sequence: rank i of ``group`` holds the i-th of equal contiguous slices.

    Theorem: hidden states, logits and gradients are the slices of what one process computes on the whole sequence. A
    loss given by ``shard_sequence``'s labels is this rank's part of it: added over the ranks they are the whole.

    Args:
        group: a process group, or a one-dimensional device mesh, that this process belongs to.

    Raises:
        ValueError: if there is no such group, or this process is not in it.
    """
    group = as_process_group(group)
    token = _group.set(group)
    _open.append(group)
    try:
        yield
    finally:
        _open.remove(group)
        _group.reset(token)


def current_group() -> dist.ProcessGroup | None:
    """Return the group of the innermost ``sequence_parallel``, None outside."""
    return _group.get() if _open else None


def as_process_group(group: dist.ProcessGroup | DeviceMesh) -> dist.ProcessGroup:
    """Take a process group, or the one of a one-dimensional device mesh."""
    if isinstance(group, DeviceMesh):
        if group.ndim != 1:
            raise ValueError(
                f"a sequence runs along one dimension, the device mesh has {group.ndim}: {group.mesh_dim_names}; "
                'pass one of them, such as mesh["cp"]'
            )
        member = group.get_coordinate() is not None
        group = group.get_group() if member else dist.GroupMember.NON_GROUP_MEMBER
    if group == dist.GroupMember.NON_GROUP_MEMBER:
        raise ValueError(
            f"rank {dist.get_rank()} is not in the group that shares the sequence; give it the group that it is in, or "
            "leave this to the group's ranks"
        )
    if not isinstance(group, dist.ProcessGroup):
        raise ValueError(
            f"group must be a process group or a device mesh, got {group!r}; torch.distributed.group.WORLD holds all "
            "processes, after init_process_group()"
        )
    return group


def talk(group: dist.ProcessGroup, what: str, exchange: Callable[[], Result]) -> Result:
    """Call a collective, or wait for one; a failure says which exchange failed, on which rank.

    Raises:
        RuntimeError: if the group breaks or its time runs out.
    """
    try:
        return exchange()
    except torch.OutOfMemoryError:  # a RuntimeError too, but this rank's own
        raise
    except RuntimeError as error:
        raise RuntimeError(
            f"sequence parallelism broke down on rank {group.rank()} of {group.size()} during {what}: another rank has "
            f"died or has not come to the same point in time; its own error stands in its log ({error})"
        ) from error


def gather_numbers(
    group: dist.ProcessGroup, device: torch.device, numbers: Sequence[int], what: str
) -> list[list[int]]:
    """Return every rank's numbers, of which each must bring as many."""
    mine = torch.tensor(list(numbers), dtype=torch.int64, device=device)
    everyone = mine.new_empty(group.size() * len(mine))
    parts = list(everyone.split(len(mine))) if len(mine) else []
    if parts:
        talk(group, what, lambda: dist.all_gather(parts, mine, group=group))
    return [part.tolist() for part in everyone.view(group.size(), -1).unbind()] if parts else [[]] * group.size()


def require_agreement(
    group: dist.ProcessGroup, device: torch.device, terms: Mapping[str, object], maxima: Sequence[int] = ()
) -> list[int]:
    """Compare what must be the same on all ranks.

    Args:
        terms: the same names on every rank, each with a value that prints as what it is.
        maxima: numbers of which the largest over all ranks is wanted, at most ``MOST_MAXIMA``.

    Returns:
        The maxima.

    Raises:
        ValueError: on every rank, naming the first term that differs and who has what, or what the ranks are about if
            they compare different terms.
    """
    if len(maxima) > MOST_MAXIMA:
        raise ValueError(f"at most {MOST_MAXIMA} maxima go with a comparison, got {len(maxima)}")
    # As many numbers at every step: ranks at different ones must not exchange messages of different lengths.
    numbers = [_hash(str({name: str(value) for name, value in terms.items()})), *map(int, maxima)]
    numbers += [0] * (1 + MOST_MAXIMA - len(numbers))
    everyone = gather_numbers(group, device, numbers, "the comparison of inputs")
    if all(theirs[0] == numbers[0] for theirs in everyone):
        return [max(column) for column in list(zip(*everyone))[1 : 1 + len(maxima)]]
    descriptions: list = [None] * group.size()
    mine = {name: str(value) for name, value in terms.items()}
    talk(group, "the comparison of inputs", lambda: dist.all_gather_object(descriptions, mine, group=group))
    for rank, description in enumerate(descriptions):
        if list(description) != list(descriptions[0]):
            raise ValueError(
                "the ranks of a sequence-parallel group must make the same calls in the same order: rank 0 compares "
                f"{', '.join(descriptions[0])}; rank {rank} compares {', '.join(description)}"
            )
    for name in mine:
        values = [description[name] for description in descriptions]
        if len(set(values)) > 1:
            other = next(rank for rank, value in enumerate(values) if value != values[0])
            raise ValueError(
                f"the ranks of a sequence-parallel group must agree on {name}: rank 0 has {values[0]}, rank {other} "
                f"has {values[other]}"
            )
    raise AssertionError(f"hashes differ, terms do not: {descriptions}")


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:7], "big")


def all_gather(group: dist.ProcessGroup, tensor: Tensor, what: str) -> list[Tensor]:
    """Return every rank's tensor, all of one shape and dtype."""
    parts = [torch.empty_like(tensor, memory_format=torch.contiguous_format) for _ in range(group.size())]
    talk(group, what, lambda: dist.all_gather(parts, tensor.contiguous(), group=group))
    return parts
