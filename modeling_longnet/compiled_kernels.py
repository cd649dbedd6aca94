"""Launching compiled Triton kernels from a dict of our own, and what repeats itself without Triton's preparations.

Triton's look-up of a compiled kernel costs more than most launches on short inputs take; a dict's costs little. A
``DirectLaunch`` costs less still: it hands a launch that differs from an earlier one in addresses only straight to the
function that Triton has generated for it.
"""

import functools
from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor


try:
    import triton
    from triton import knobs
    from triton.backends.nvidia import driver as nvidia
    from triton.runtime import driver
except ImportError:  # there is nothing to launch, or no CUDA to launch it on: Triton's own way is left
    triton = None


# The generated functions are not documented: their arguments were read in these releases. Others take Triton's own way.
READ_RELEASES = ("3.6.",)
MAX_GEOMETRIES = 1024  # that are kept, of each so many descriptors of some 200 bytes
MAX_ADDRESSES = 128

_compiled: dict[tuple, object] = {}


class Pointer(NamedTuple):
    """An argument: the address of the tensor of this name."""

    tensor: str

    def filled(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """Return what Triton takes."""
        return tensors[self.tensor]


class Rows(NamedTuple):
    """An argument: what Hopper's copy engine must know to fetch blocks of the tensor of this name.

    Args:
        descriptor: makes Triton's descriptor from the tensor and the fields below.
        layout: of the block in shared memory, where the kernel says that itself; else empty.
    """

    tensor: str
    descriptor: Callable
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    block: tuple[int, ...]
    layout: tuple = ()

    def filled(self, tensors: Mapping[str, Tensor]):
        """Return what Triton takes."""
        return self.descriptor(
            tensors[self.tensor], list(self.shape), list(self.strides), list(self.block), *self.layout
        )


def launch(kernel, grid: tuple[int, int, int], arguments: tuple, constants: dict, device: torch.device, **options):
    """Run a kernel, compiling it first if nothing that is compiled fits the arguments.

    Args:
        kernel: of ``triton.jit`` or ``gluon.jit``.
        arguments: all that are no constants, in the kernel's order.
        constants: the compile-time arguments, by name; hashable.
        options: ``num_warps``, ``num_stages``, ``launch_pdl``, ``maxnreg``.

    Returns:
        The compiled kernel; None from Triton's interpreter, which compiles nothing.
    """
    dtypes = tuple(x.dtype for x in arguments if isinstance(x, Tensor))
    variant = (
        id(kernel), device, dtypes, *options.values(), *constants.values(), *map(specialization, arguments)
    )  # fmt: skip
    with torch.cuda.device_of(arguments[0]):
        if (compiled := _compiled.get(variant)) is None:
            compiled = kernel[grid](*arguments, **constants, **options)
            if compiled is not None:
                _compiled[variant] = compiled
        else:
            compiled[grid](*arguments, *(constants[name] for name in kernel.arg_names[len(arguments) :]))
    return compiled


def specialization(argument) -> int | tuple:
    """Tell apart what Triton compiles differently: missing, aligned, 1, or wider than 32 bits."""
    if isinstance(argument, int):
        return (argument % 16 == 0) | (argument == 1) << 1 | (argument >= 2**31) << 2
    if isinstance(argument, Tensor):
        return argument.data_ptr() % 16 == 0
    if isinstance(argument, tuple):  # Triton looks into tuples, even at arguments that it is told not to specialize
        return tuple(map(specialization, argument))
    return -(argument is None)


class DirectLaunch:
    """A launch of which all but the addresses is ready; for the device that is current and a stream of it."""

    def __init__(self, compiled, grid: tuple[int, int, int], arguments: tuple, num_constants: int):
        launcher = compiled.run
        self._launch = _generated_function(launcher)
        # As the generated function takes them; no hooks, and no scratch memory.
        ready = [
            *grid, None, compiled.function, launcher.launch_cooperative_grid, launcher.launch_pdl, None, None,
            compiled.packed_metadata, None, None, None,
        ]  # fmt: skip
        self._pointers, self._descriptors = [], []
        described = iter(compiled.metadata.tensordesc_meta or ())
        for argument in arguments:
            if isinstance(argument, Pointer):
                self._pointers.append((len(ready), argument.tensor))
                ready.append(None)
            elif isinstance(argument, Rows):
                self._descriptors.append((len(ready), argument.tensor, _encoder(_geometry(argument, next(described)))))
                ready += [None, *argument.shape, *argument.strides]
            else:
                ready.append(argument)
        self._ready = ready + [None] * num_constants

    def __call__(self, addresses: Mapping[str, int], stream: int) -> None:
        """Launch with the tensors at these addresses."""
        arguments = self._ready.copy()
        arguments[3] = stream
        for place, tensor in self._pointers:
            arguments[place] = addresses[tensor]
        for place, tensor, encoded in self._descriptors:
            arguments[place] = encoded(addresses[tensor])
        self._launch(*arguments)

    @staticmethod
    def serves(compiled) -> bool:
        """Whether a compiled kernel can be launched in this way: from CUDA, by a release whose way is known."""
        if compiled is None or triton is None or not triton.__version__.startswith(READ_RELEASES):
            return False
        launcher = compiled.run
        return (
            type(launcher) is nvidia.CudaLauncher
            and launcher.global_scratch_size == launcher.profile_scratch_size == 0
            and len(compiled.metadata.tensordesc_meta or ()) == str(compiled.src.signature).count("tensordesc")
        )

    @staticmethod
    def is_watched() -> bool:
        """Whether somebody, as a profiler, has asked Triton to tell of launches: these must go Triton's own way."""
        return any(
            hook is not None and getattr(hook, "calls", True)
            for hook in (knobs.runtime.launch_enter_hook, knobs.runtime.launch_exit_hook)
        )


def current_stream(device: torch.device) -> int:
    """Return the handle of the stream that is current on a CUDA device."""
    return driver.active.get_current_stream(device.index)


def _generated_function(launcher) -> Callable:
    function = launcher.launch
    if not (cells := getattr(function, "__closure__", None)):
        return function
    # Triton wraps the function to encode descriptors anew in each launch.
    return dict(zip(function.__code__.co_freevars, (cell.cell_contents for cell in cells)))["launcher"]


def _geometry(rows: Rows, described: dict) -> tuple:
    """List all that is encoded of a tensor but its address, in the order of Triton's encoder."""
    return (
        described["swizzle"], described["elem_size"], nvidia.TMA_DTYPE_DEVICE_TO_HOST[described["elem_type"]],
        tuple(described["block_size"]), rows.shape, rows.strides, 0,
    )  # fmt: skip


@functools.lru_cache(maxsize=MAX_GEOMETRIES)
def _encoder(geometry: tuple) -> Callable:
    """Return what encodes descriptors. Each is a function of numbers alone: whose memory lies there does not enter."""

    @functools.lru_cache(maxsize=MAX_ADDRESSES)  # an address alone is found without hashing the geometry
    def encoded(address: int):
        return driver.active.utils.fill_tma_descriptor(address, *geometry)

    return encoded
