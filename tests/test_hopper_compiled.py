"""What the compiler makes of the Hopper kernels: it needs Triton, but no GPU."""

import re
from importlib.metadata import version

import pytest
import torch

from modeling_longnet import DilationPattern, attention_operator, dilated_attention_hopper
from modeling_longnet.compiled_kernels import Pointer, Rows
from modeling_longnet.dilated_attention_launches import query_launches
from modeling_longnet.launch_plans import KernelLaunch, TensorLayout


TENSORS = {"lse": torch.float32, "tallies": torch.int32}  # the others are bfloat16


class Hopper:
    """A driver of a card that is not there: Triton asks it what to compile for."""

    def get_current_target(self):
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", 90, 32)

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_device(self) -> int:
        return 90  # no card's number: what is compiled for a card is kept apart


@pytest.fixture
def compiled(monkeypatch):
    """A function that compiles a launch and returns its PTX."""
    pytest.importorskip("triton", reason="triton is not installed")
    if dilated_attention_hopper.triton is None:
        pytest.skip(f"triton {version('triton')} has no Gluon for Hopper")
    from triton.runtime import driver
    from triton.runtime.jit import MockTensor

    monkeypatch.setattr(dilated_attention_hopper, "num_processors", lambda device: 132)
    monkeypatch.setattr(driver, "_active", Hopper())

    def compile_launch(launch: KernelLaunch) -> str:
        arguments = []
        for x in launch.arguments:
            if isinstance(x, Pointer):
                x = MockTensor(TENSORS.get(x.tensor, torch.bfloat16))
            elif isinstance(x, Rows):
                x = x.filled({x.tensor: torch.zeros(8, dtype=torch.bfloat16)})
            arguments.append(x)
        return launch.kernel.warmup(*arguments, **launch.constants, grid=(1,), **launch.options).asm["ptx"]

    return compile_launch


def forward(preset: str, head_dim: int) -> KernelLaunch:
    """The last launch of a forward: that of the dense queries, or of those that are furthest apart."""
    length, heads = 2**15, 16
    pattern = DilationPattern.geometric(2048, length, preset=preset)
    shape, strides = (1, heads, length, head_dim), (heads * length * head_dim, head_dim, heads * head_dim, 1)
    layout = TensorLayout(shape, strides, torch.bfloat16, torch.device("cuda", 0), True)
    layouts = dict.fromkeys(("query", "key", "value", "out"), layout)
    call = attention_operator.Call(pattern, True, head_dim**-0.5)
    return dilated_attention_hopper.hopper_fwd_launches(query_launches(pattern), layouts, 0, call)[0][-1]


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("preset", ["paper", "retrofit"])
def test_a_thread_that_passes_over_decays_has_looked_at_all_of_its_rows(preset, head_dim, compiled):
    """Which elements of a thread lie in which rows is up to the layout: one factor of each row has to be looked at."""
    ptx = compiled(forward(preset, head_dim))
    rows = {}  # of each factor: two follow one another where a row's peak is raised
    for vote in re.findall(r".*vote\.sync.*", ptx):
        decays = re.findall(r"mov\.f32 (%\w+), 0f3F800000;", vote)
        rows |= {decay: tuple(decays[i // 2 * 2 : i // 2 * 2 + 2]) for i, decay in enumerate(decays)}
    passed_over = re.findall(r"@all bra DONE;(.*?)DONE:", ptx, re.DOTALL)
    conditions = re.findall(r"\.reg \.pred all;(.*?)@all bra DONE;", ptx, re.DOTALL)
    assert len(passed_over) == len(conditions) > 0
    for condition, products in zip(conditions, passed_over):
        compared = re.findall(r"setp\.eq(?:\.and)?\.f32\s+all, (%\w+), 0f3F800000", condition)
        factors = re.findall(r"mul\.f32\s+%\w+, %\w+, (%\w+);", products)
        assert {rows[x] for x in compared} == {rows[x] for x in factors}


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("preset", ["paper", "retrofit"])
def test_peaks_are_raised_to_the_maxima_of_their_own_rows(preset, head_dim, compiled):
    """A thread's scores lie in pairs of one row, 8 rows apart in turn, those of the rows 64 below behind them."""
    lines = compiled(forward(preset, head_dim)).splitlines()
    votes = [n for n, line in enumerate(lines) if "vote.sync" in line]
    assert votes
    for n in votes:
        defined = {}
        for line in lines[:n]:
            if found := re.match(r"\s*(max|selp)\.f32\s+(%\w+), (\S+), (\S+?)[,;]", line):
                defined[found[2]] = [x for x in found.groups()[2:] if x.startswith("%")]

        def scores(register, defined=defined):
            operands = defined.get(register)
            return [register] if operands is None else [x for operand in operands for x in scores(operand, defined)]

        maxima = [scores(a) + scores(b) for a, b in re.findall(r"max\.f32 h\d+, (%\w+), (%\w+);", lines[n])]
        numbers = [{int(x[2:]) for x in row} for row in maxima]  # scores are numbered as the products return them
        first = min(min(row) for row in numbers)
        count = sum(len(row) for row in numbers)
        half = count if len(numbers) == 2 else count // 2
        assert set().union(*numbers) == set(range(first, first + count))
        for row, own in enumerate(numbers):
            assert {((x - first) // 2 % 2, (x - first) // half) for x in own} == {(row % 2, row // 2)}
