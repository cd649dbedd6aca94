"""Launching compiled Triton kernels from a dict of our own.

Triton's look-up of a compiled kernel costs more than most launches on short inputs take; a dict's costs little.
"""

import torch
from torch import Tensor


_compiled: dict[tuple, object] = {}


def launch(kernel, grid: tuple[int, int, int], arguments: tuple, constants: dict, device: torch.device, **options):
    """Run a kernel, compiling it first if nothing that is compiled fits the arguments.

    Args:
        kernel: of ``triton.jit`` or ``gluon.jit``.
        arguments: all that are no constants, in the kernel's order.
        constants: the compile-time arguments, by name; hashable.
        options: ``num_warps``, ``num_stages``.
    """
    dtypes = tuple(x.dtype for x in arguments if isinstance(x, Tensor))
    variant = (
        id(kernel), device, dtypes, *options.values(), *constants.values(), *map(specialization, arguments)
    )  # fmt: skip
    with torch.cuda.device_of(arguments[0]):
        if (compiled := _compiled.get(variant)) is None:
            compiled = kernel[grid](*arguments, **constants, **options)
            if compiled is not None:  # Triton's interpreter compiles nothing
                _compiled[variant] = compiled
        else:
            compiled[grid](*arguments, *(constants[name] for name in kernel.arg_names[len(arguments) :]))


def specialization(argument) -> int | tuple:
    """Tell apart what Triton compiles differently: missing, aligned, 1, or wider than 32 bits."""
    if isinstance(argument, int):
        return (argument % 16 == 0) | (argument == 1) << 1 | (argument >= 2**31) << 2
    if isinstance(argument, Tensor):
        return argument.data_ptr() % 16 == 0
    if isinstance(argument, tuple):  # Triton looks into tuples, even at arguments that it is told not to specialize
        return tuple(map(specialization, argument))
    return -(argument is None)
