"""The fused kernels for halos in Triton's interpreter; on the GPU, test_sequence_parallel.py runs them."""

import sys
from unittest.mock import patch

import torch
from imagined_ranks import attend_on_imagined_ranks
from triton_interpreter import interpret, needs_interpreter

from modeling_longnet import DilationPattern, dilated_attention
from modeling_longnet.halo_attention_triton import fold_halo_backward, fold_halo_forward, halo_refusal


def test_what_the_kernels_refuse_is_named():
    assert halo_refusal(DilationPattern((8, 16), (1, 2), dilate_queries=False)) is None
    assert "dense queries only" in halo_refusal(DilationPattern((8, 16), (1, 2), dilate_queries=True))
    assert "rates that divide" in halo_refusal(DilationPattern((8, 16), (1, 3), dilate_queries=False))


def check_against_one_call(pattern: DilationPattern, is_causal: bool, slice_length: int, head_dim: int) -> None:
    """Compare four imagined ranks, local and halo attention fused, with eager attention in float64."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(1, heads, 4 * slice_length, head_dim) for heads in (4, 2, 2, 4)]
    *tensors, do = (torch.randn(shape, generator=generator) for shape in shapes)
    dlse = torch.randn(4, 1, generator=generator).expand(1, 4, 4 * slice_length)
    module = sys.modules["modeling_longnet.sequence_parallel"]
    with (
        patch.object(module, "fold_halo_forward", wraps=fold_halo_forward) as forward,
        patch.object(module, "fold_halo_backward", wraps=fold_halo_backward) as backward,
    ):
        found, plans = attend_on_imagined_ranks(tensors, (do, dlse), pattern, 4, "triton", is_causal)
    receiving = sum(plan.received_entries > 0 for plan in plans)
    assert forward.call_count == backward.call_count == receiving >= 3
    leaves = [x.double().requires_grad_() for x in tensors]
    out, lse = dilated_attention(*leaves, pattern, is_causal=is_causal, backend="eager", return_lse=True)
    expected = [out, lse, *torch.autograd.grad((out, lse), leaves, (do.double(), dlse.double()))]
    for a, b in zip(found, expected):
        torch.testing.assert_close(a.double(), b.detach(), rtol=2e-5, atol=2e-5)


@needs_interpreter
def test_kernel_logic_in_the_interpreter():
    interpret(__file__)


if __name__ == "__main__":  # run by test_kernel_logic_in_the_interpreter, in a process of its own
    torch.set_num_threads(1)
    retrofit = DilationPattern.geometric(16, 64, preset="retrofit")
    check_against_one_call(retrofit, True, slice_length=48, head_dim=8)
    check_against_one_call(retrofit, False, slice_length=37, head_dim=16)  # slices begin off every segment and rate
    overlapping = DilationPattern((12, 24), (1, 3), dilate_queries=False, window="sliding")
    check_against_one_call(overlapping, True, slice_length=35, head_dim=20)
    segments = DilationPattern((16, 48), (1, 2), dilate_queries=False, head_offsets="blocked")
    check_against_one_call(segments, True, slice_length=40, head_dim=8)
