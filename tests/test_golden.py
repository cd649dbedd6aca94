"""The official code's numbers, wherever the official code computes its own definition."""

import json
from dataclasses import asdict
from functools import cache
from pathlib import Path

import oracle
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor
from torch.testing import assert_close
from torchscale_decoder import ARGUMENTS, decoder_logits

from modeling_longnet import DilationPattern, dilated_attention


DATA = Path(__file__).parent / "data"
CASES = json.loads((DATA / "dilated_attention.json").read_text())

every_implementation = pytest.mark.parametrize("implementation", ["oracle", "eager", "torch"])
every_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case["id"])


@cache
def load(name: str) -> dict[str, Tensor]:
    return load_file(DATA / f"{name}.safetensors")


def attend(implementation: str, pattern: DilationPattern, *tensors: Tensor, **options) -> tuple[Tensor, Tensor]:
    """Return output and lse; the oracle stands beside the backends, so that it is anchored outside this project."""
    if implementation == "oracle":
        return oracle.dilated_attention(*tensors, **asdict(pattern), **options)
    return dilated_attention(*tensors, pattern, **options, backend=implementation, return_lse=True)


def torchscale_pattern(case: dict) -> DilationPattern:
    return DilationPattern.preset("torchscale", case["segment_lengths"], case["dilated_ratios"])


@every_implementation
@every_case
def test_output_and_exact_gradients_are_the_official_ones(implementation, case):
    golden = {
        name.partition("/")[2]: x for name, x in load("dilated_attention").items() if name.startswith(case["id"] + "/")
    }
    inputs = [golden[name].double().transpose(1, 2).requires_grad_() for name in "qkv"]  # [B, H, L, D]
    out, lse = attend(implementation, torchscale_pattern(case), *inputs, is_causal=case["causal"], scale=case["scale"])
    out = out.transpose(1, 2).flatten(2)  # [B, L, H * D]
    gradients = torch.autograd.grad(out, inputs, golden["cot"].double())

    assert_close(out, golden["out" if case["matches_ideal"] else "out_ideal"], rtol=1e-12, atol=1e-12)
    suffix = "exact" if case["matches_ideal"] else "ideal"
    for name, gradient in zip("qkv", gradients):
        # They were computed in float64 and stored in float32.
        expected = golden[f"d{name}_{suffix}"].double().transpose(1, 2)
        assert_close(gradient, expected, rtol=2**-24, atol=1e-9)
    assert (lse == -torch.inf).sum() == case["uncovered_head_rows"]


@every_case
def test_offsets_are_the_official_ones(case):
    num_heads = len(next(iter(case["head_offsets"].values())))
    assert torchscale_pattern(case).offsets(num_heads) == [
        case["head_offsets"][str(r)] for r in case["dilated_ratios"]
    ]


@pytest.mark.parametrize("case", [case for case in CASES if not case["matches_ideal"]], ids=lambda case: case["id"])
def test_the_official_deviation_is_the_zero_padding_of_the_last_segment(case):
    """Zero keys and values up to the next multiple of the segment length reproduce the official output."""
    golden = load("dilated_attention")
    (segment_length,) = case["segment_lengths"]
    query, key, value = (golden[f"{case['id']}/{name}"].double().transpose(1, 2) for name in "qkv")
    length = query.shape[2]
    zeros = (0, 0, 0, -length % segment_length)
    out = dilated_attention(
        *(F.pad(x, zeros) for x in (query, key, value)), torchscale_pattern(case), is_causal=case["causal"]
    )[:, :, :length]  # fmt: skip
    assert_close(out.transpose(1, 2).flatten(2), golden[f"{case['id']}/out"], rtol=1e-12, atol=1e-12)


@every_implementation
@pytest.mark.parametrize("run", ["n48", "n77"])
def test_decoder_logits_are_the_official_ones(implementation, run):
    golden = load("longnet_decoder_plain")
    weights = {name.removeprefix("weights/"): x for name, x in golden.items() if name.startswith("weights/")}
    plain = {**ARGUMENTS, "subln": False, "xpos_rel_pos": False}
    pattern = DilationPattern.preset("torchscale", (8, 16, 32), (1, 2, 4))
    logits = decoder_logits(
        weights, golden[f"{run}/input_ids"], plain, attend=lambda *heads: attend(implementation, pattern, *heads)[0]
    )
    assert_close(logits, golden[f"{run}/logits"], rtol=0, atol=1e-9)
