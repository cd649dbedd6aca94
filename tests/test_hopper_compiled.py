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


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("preset", ["paper", "retrofit"])
def test_a_thread_that_passes_over_decays_has_looked_at_all_of_its_rows(preset, head_dim, compiled):
    """Which elements of a thread lie in which rows is up to the layout: all factors have to be compared with one."""
    length, heads = 2**15, 16
    pattern = DilationPattern.geometric(2048, length, preset=preset)
    shape, strides = (1, heads, length, head_dim), (heads * length * head_dim, head_dim, heads * head_dim, 1)
    layout = TensorLayout(shape, strides, torch.bfloat16, torch.device("cuda", 0), True)
    layouts = dict.fromkeys(("query", "key", "value", "out"), layout)
    call = attention_operator.Call(pattern, True, head_dim**-0.5)
    launches, _ = dilated_attention_hopper.hopper_fwd_launches(query_launches(pattern), layouts, 0, call)
    passed_over = re.findall(r"@all bra DONE;(.*?)DONE:", ptx := compiled(launches[-1]), re.DOTALL)
    conditions = re.findall(r"\.reg \.pred all;(.*?)@all bra DONE;", ptx, re.DOTALL)
    assert len(passed_over) == len(conditions) > 0
    for condition, products in zip(conditions, passed_over):
        compared = set(re.findall(r"setp\.eq(?:\.and)?\.f32\s+all, (%\w+), 0f3F800000", condition))
        factors = set(re.findall(r"mul\.f32\s+%\w+, %\w+, (%\w+);", products))
        assert compared == factors
