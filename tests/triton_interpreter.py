"""Triton's interpreter: the kernels' logic without a GPU, in a process of its own, for one script at a time."""

import os
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pytest


ROOT = Path(__file__).parents[1]


def _refusal() -> str | None:
    try:
        triton = version("triton")
    except PackageNotFoundError:
        return "triton is not installed"
    if tuple(map(int, version("numpy").split(".")[:2])) >= (2, 4) and tuple(map(int, triton.split(".")[:2])) < (3, 7):
        return f"the interpreter of triton {triton} does not know numpy {version('numpy')}"
    return None


needs_interpreter = pytest.mark.skipif(_refusal() is not None, reason=str(_refusal()))


def interpret(script: str, *arguments: str) -> None:
    """Run a test file as a script under the interpreter; its failure is raised here."""
    folders = (str(ROOT), str(ROOT / "tests"), *filter(None, [os.environ.get("PYTHONPATH")]))
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join(folders)}
    run = subprocess.run([sys.executable, script, *arguments], env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-3000:]


def hand_over_floats_as_tensors() -> None:
    """Let the interpreter give kernels what the compiler gives them for a float argument; others' kernels cast it."""
    import numpy
    import triton.language as tl
    from triton.runtime import interpreter

    convert = interpreter._implicit_cvt

    def convert_floats_too(argument):
        if type(argument) is not float:
            return convert(argument)
        handle = interpreter.TensorHandle(numpy.array([argument], dtype=numpy.float32), tl.float32)
        return tl.tensor(handle, tl.float32)

    interpreter._implicit_cvt = convert_floats_too
