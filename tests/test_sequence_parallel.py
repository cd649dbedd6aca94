"""Sequence parallelism over gloo processes equals one process: the operator, models, generation, traffic, faults."""

from dataclasses import replace

import oracle
import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from ranks import Ranks
from strategies import Call, calls
from tiny_models import tiny_config

from modeling_longnet import DilationPattern, sequence_parallel
from modeling_longnet.sequence_parallel import sequence_parallel_attention
from modeling_longnet.token_layout import locate_tokens, pack, unpack


@pytest.fixture(scope="module")
def two_ranks():
    ranks = Ranks(2)
    yield ranks
    ranks.close()


@pytest.fixture(scope="module")
def four_ranks():
    ranks = Ranks(4)
    yield ranks
    ranks.close()


def slice_of(x: torch.Tensor, dim: int) -> torch.Tensor:
    """Cut out this rank's slice, the last ones filled with zeros."""
    world_size = dist.get_world_size()
    size = -(-x.shape[dim] // world_size)
    x = torch.cat([x, x.new_zeros(*x.shape[:dim], size * world_size - x.shape[dim], *x.shape[dim + 1 :])], dim)
    return x.narrow(dim, dist.get_rank() * size, size)


def attend_to_slice(call: Call) -> list[torch.Tensor]:
    """Attend from this rank's slice of a call; return its output, lse and gradients ``[B, heads, n, ...]``."""
    mask = position_ids = None
    if call.padding is not None or call.length % dist.get_world_size():
        mask = torch.tensor(call.padding) if call.padding else torch.ones(call.batch, call.length)
        mask = slice_of(mask.long(), 1)
    if call.boundaries is not None:
        counts = [stop - start for start, stop in zip(call.boundaries, call.boundaries[1:])]
        position_ids = torch.cat([torch.arange(count) for count in counts]).long()[None]
        position_ids = slice_of(position_ids, 1)
    full = [x.detach() for x in call.tensors()]
    # Whatever stands in padding must not matter.
    leaves = [slice_of(x, 2).clone().requires_grad_() for x in full]
    cotangents = [slice_of(x, 2) for x in call.cotangents()]
    shape = leaves[0].shape[0], leaves[0].shape[2]
    with sequence_parallel(dist.group.WORLD):
        layout = locate_tokens(shape, leaves[0].device, mask, position_ids, None, None, tiny_config())
    out, lse = sequence_parallel_attention(
        *(pack(x, layout) for x in leaves), call.pattern, layout.sequence, is_causal=call.is_causal, scale=call.scale
    )
    out = unpack(out.transpose(1, 2), layout, *shape).transpose(1, 2)
    lse = unpack(lse.transpose(1, 2), layout, *shape).transpose(1, 2)
    finite = lse.masked_fill(lse.isinf(), 0)
    gradients = torch.autograd.grad((out * cotangents[0]).sum() + (finite * cotangents[1]).sum(), leaves)
    return [x.detach() for x in (out, lse, *gradients)]


def assert_slices_equal_the_oracle(ranks: Ranks, call: Call) -> None:
    slices = ranks.run(attend_to_slice, call)
    got = [torch.cat(parts, dim=2)[:, :, : call.length] for parts in zip(*slices)]
    leaves = call.tensors()
    out, lse = oracle.dilated_attention(*leaves, **call.rules(), **call.options())
    do, dlse = call.cotangents()
    finite = lse.masked_fill(lse.isinf(), 0)
    expected = [out, lse, *torch.autograd.grad((out * do).sum() + (finite * dlse).sum(), leaves)]
    real = torch.ones(call.batch, call.length, dtype=torch.bool)
    if call.padding is not None:
        real = torch.tensor(call.padding, dtype=torch.bool).view(call.batch, call.length)
    for name, a, b in zip(("out", "lse", "dq", "dk", "dv"), got, expected):
        a, b = (x.movedim(1, 2)[real] for x in (a, b))
        torch.testing.assert_close(a, b.detach(), rtol=1e-10, atol=1e-10, msg=lambda text, n=name: f"{n}: {text}")


@settings(max_examples=60)
@given(calls())
def test_any_call_on_two_ranks_equals_the_oracle(two_ranks, call):
    assert_slices_equal_the_oracle(two_ranks, replace(call, length=call.length))


@settings(max_examples=60)
@given(calls())
def test_any_call_on_four_ranks_equals_the_oracle(four_ranks, call):
    assert_slices_equal_the_oracle(four_ranks, call)
