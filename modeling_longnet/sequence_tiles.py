"""Position-wise layers tile by tile along the sequence: intermediates of one tile at a time, forward and backward.

A norm or an MLP computes every token alone, so it can run on one stretch of tokens after the other. Only its input is
kept for the backward pass, which computes each tile once more, with gradients, right where it needs it.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint


# Enough tokens to fill the matrix units of a GPU, few enough that an MLP of width 14336 needs about one GiB for them.
TILE_TOKENS = 8192
# With gradients no more tiles than this: each adds those of all weights to their sums. Long sequences have longer tiles.
MAX_TILES = 8


def in_tiles(
    function: Callable[[Tensor], Tensor],
    x: Tensor,
    modules: Sequence[nn.Module],
    recompute: bool = True,
    last: nn.Module | None = None,
) -> Tensor:
    """Compute ``function(x)`` on tiles of the sequence, keeping none of its intermediates.

    Output and gradients are those of ``function(x)`` (weights' gradients summed over tiles in at least float32).
    Inside an activation checkpoint the recomputation stops where this call begins, if the call is the last thing that
    needs memory there: the forward pass of the function then runs twice altogether, as without tiles.

    Args:
        function: maps ``[B, n, hidden]`` to the same number of tokens, each by itself; random numbers that it draws
            (dropout) are drawn again alike in the backward pass.
        x: ``[B, L, hidden]``.
        modules: those whose parameters the function uses. If all of them have the attribute ``keeps_only_input``, as
            fused norms do, there is nothing that a second forward pass could save.
        recompute: whether saving memory is worth a second forward pass of the function; if not, tiles are for calls
            without gradients only.
        last: the layer whose result the function returns. Where it is linear, the second forward pass leaves its
            product out, which no gradient depends on.

    Returns:
        ``[B, L, ...]``, what the function gives.
    """
    if x.shape[1] <= TILE_TOKENS or torch.compiler.is_compiling() or run_once_per_pass(modules):
        return function(x)
    parameters = trainable(modules)
    recompute = recompute and not all(getattr(module, "keeps_only_input", False) for module in modules)
    if torch.is_grad_enabled() and not recompute:
        return function(x)
    if not torch.is_grad_enabled() or not (x.requires_grad or parameters):
        return join(function, x.split(TILE_TOKENS, dim=1), x.shape[1])
    size = tile_tokens(x.shape[1])
    if are_partitioned(modules):
        tiles = [checkpoint(function, tile, use_reentrant=False) for tile in x.split(size, dim=1)]
        return torch.cat(tiles, dim=1)
    return _InTiles.apply(function, size, last, _Kept.apply(x), *parameters)


def tile_tokens(length: int) -> int:
    """Return how many tokens of a sequence one tile has where gradients are wanted; else ``TILE_TOKENS``."""
    return max(TILE_TOKENS, -(-length // MAX_TILES))


def join(function: Callable[[Tensor], Tensor], tiles: Sequence[Tensor], length: int) -> Tensor:
    """Concatenate what the function makes of each tile ``[B, n, ...]``, holding one result beside the whole."""
    whole, start = None, 0
    for tile in tiles:
        part = function(tile)
        if whole is None:
            whole = part.new_empty(part.shape[0], length, *part.shape[2:])
        whole[:, start : start + part.shape[1]] = part
        start += part.shape[1]
    return whole


def trainable(modules: Iterable[nn.Module]) -> list[nn.Parameter]:
    """List the parameters that want gradients, each once; in a replica of ``nn.DataParallel`` its copies of them.

    Such a replica has no parameters: its weights are copies, of which autograd hands the gradients on.
    """
    parts = [part for module in modules for part in module.modules()]
    held = [p for part in parts for p in part.parameters(recurse=False)]
    copies = [p for part in parts for p in getattr(part, "_former_parameters", {}).values()]
    return list(dict.fromkeys(p for p in (*held, *copies) if p is not None and p.requires_grad))


def are_partitioned(modules: Iterable[nn.Module]) -> bool:
    """Whether parameters are shards that are whole only inside their module's own call, as in tensor parallelism.

    They cannot be named as inputs of a function then, and the graph has to be built inside the modules' calls.
    """
    return any(hasattr(p, "device_mesh") for module in modules for p in module.parameters())


def run_once_per_pass(modules: Iterable[nn.Module]) -> bool:
    """Whether parameters are gathered at a module's call, and let go after it, once per pass: there can be no tiles.

    FSDP2 does so for its units, which are known by name: importing the class costs more than this file. DeepSpeed's
    ZeRO-3 does it for every module; its parameters bear numbers.
    """
    modules = list(modules)
    return any(base.__name__ == "FSDPModule" for module in modules for base in type(module).__mro__) or any(
        hasattr(p, "ds_id") for module in modules for p in module.parameters()
    )


class GradientSum:
    """Sums of the gradients of some tensors over tiles, in float32 where their own dtype is shorter."""

    def __init__(self, tensors: Sequence[Tensor], wanted: Sequence[bool]):
        self.tensors = [x for x, want in zip(tensors, wanted) if want]
        self.wanted = wanted
        self.sums: list[Tensor | None] = [None] * len(self.tensors)

    def add(self, gradients: Sequence[Tensor | None]) -> None:
        for i, gradient in enumerate(gradients):
            if gradient is None:
                continue
            if self.sums[i] is None:
                self.sums[i] = gradient.to(torch.promote_types(gradient.dtype, torch.float32), copy=True)
            else:
                self.sums[i] += gradient

    def results(self) -> list[Tensor | None]:
        """Give one entry per tensor in its dtype, None where no gradient was wanted or none came."""
        found = iter([None if x is None else x.to(of.dtype) for x, of in zip(self.sums, self.tensors)])
        return [next(found) if want else None for want in self.wanted]


class _Kept(torch.autograd.Function):
    """The identity, which keeps its input for the backward pass *before* the function that needs it runs.

    An activation checkpoint recomputes until the last kept tensor is there. A function keeps its input after it has
    run; this one stands before it, and so spares the checkpoint that run.
    """

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad):
        return grad


class _InTiles(torch.autograd.Function):
    @staticmethod
    def forward(ctx, function, size, last, x, *parameters):
        ctx.function, ctx.size, ctx.last = function, size, last
        ctx.keeper = x.grad_fn  # None where x wants no gradient: there is nothing before it that keeps it
        ctx.save_for_backward(*([] if ctx.keeper is not None else [x]))
        ctx.parameters = parameters
        ctx.surroundings = Surroundings(x.device)
        return join(function, x.split(size, dim=1), x.shape[1])

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_output):
        (x,) = ctx.saved_tensors if ctx.keeper is None else ctx.keeper.saved_tensors
        want_x, *want_parameters = ctx.needs_input_grad[3:]
        parameters = GradientSum(ctx.parameters, want_parameters)
        grad_x = torch.empty_like(x) if want_x else None
        with ctx.surroundings.restored():
            for start in range(0, x.shape[1], ctx.size):
                tile = slice(start, start + ctx.size)
                leaf = x[:, tile].detach().requires_grad_(want_x)
                with torch.enable_grad():
                    output = _for_gradients(ctx.function, leaf, ctx.last)
                inputs = [*([leaf] if want_x else []), *parameters.tensors]
                gradients = torch.autograd.grad(output, inputs, grad_output[:, tile], allow_unused=True)
                if want_x:
                    grad_x[:, tile] = gradients[0]
                parameters.add(gradients[want_x:])
        return None, None, None, grad_x, *parameters.results()


def _for_gradients(function: Callable[[Tensor], Tensor], x: Tensor, last: nn.Module | None) -> Tensor:
    """Compute ``function(x)``, but not the values of a linear product that is all of the result."""
    # Not where somebody would see them: in a hook, or in a forward that is no longer the layer's own.
    if type(last) is nn.Linear and "forward" not in vars(last) and not last._forward_hooks:
        with _left_out(last) as products:
            output = function(x)
        if any(output is product for product in products):
            return output
    return function(x)


@contextmanager
def _left_out(linear: nn.Linear) -> Iterator[list[Tensor]]:
    """Let a layer give zeros that have the gradients of its product, and list what it gave."""
    products = []

    def forward(x: Tensor) -> Tensor:
        bias = [] if linear.bias is None else [linear.bias]
        products.append(_LeftOut.apply(x, linear.weight, *bias))
        return products[-1]

    linear.forward = forward
    try:
        yield products
    finally:
        del linear.forward


class _LeftOut(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias=None):
        ctx.save_for_backward(x, weight)
        return x.new_zeros(()).expand(*x.shape[:-1], weight.shape[0])  # takes no memory

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        want_x, want_weight, *want_bias = ctx.needs_input_grad
        grad = grad.flatten(0, -2)
        grad_x = (grad @ weight).view(x.shape) if want_x else None
        grad_weight = grad.t() @ x.flatten(0, -2) if want_weight else None
        grad_bias = grad.sum(0) if want_bias and want_bias[0] else None
        return grad_x, grad_weight, *([grad_bias] if want_bias else [])


class Surroundings:
    """The random state and the autocast setting of a forward pass, to run it again alike."""

    def __init__(self, device: torch.device):
        self.device = device
        self.cpu_state = torch.get_rng_state()
        self.cuda_state = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
        self.autocast = torch.is_autocast_enabled(device.type)
        self.dtype = torch.get_autocast_dtype(device.type) if self.autocast else None

    def restored(self) -> ExitStack:
        """Return a context in which the forward pass finds what it found the first time; it undoes itself."""
        stack = ExitStack()
        stack.enter_context(torch.random.fork_rng([self.device] if self.cuda_state is not None else []))
        torch.set_rng_state(self.cpu_state)
        if self.cuda_state is not None:
            torch.cuda.set_rng_state(self.cuda_state, self.device)
        stack.enter_context(torch.autocast(self.device.type, self.dtype, enabled=self.autocast))
        return stack
