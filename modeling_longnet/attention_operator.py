"""A backend's forward and backward functions as one differentiable operator.

Called plainly it is an ``autograd.Function``, which costs some ten microseconds. Under torch.compile and torch.export
it is a registered operator, opaque and with known output shapes, so that any length runs in one graph, and one without
memory (device "meta") at all; called plainly, that would cost a millisecond of bookkeeping.
"""

import re
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from .dilation_pattern import DilationPattern


# Saved checkpoints carry a copy of this file. Each copy registers its operators under its own module's name, so that
# an installed package and any number of loaded checkpoints live side by side.
NAMESPACE = re.sub(r"\W", "_", __name__.rpartition(".")[0])


class Call(NamedTuple):
    """All of a call that is no tensor."""

    pattern: DilationPattern
    is_causal: bool
    scale: float
    dropout: float = 0.0
    seed: int = 0

    def flatten(self) -> tuple:
        """Return the fields as the flat numbers and strings that a registered operator takes."""
        p = self.pattern
        rules = (p.head_offsets, p.count_overlaps, p.dilate_queries, p.window)
        return (list(p.segment_lengths), list(p.dilation_rates), list(p.held_heads or ()), *rules, *self[1:])

    @classmethod
    def unflatten(
        cls, segment_lengths: list[int], dilation_rates: list[int], held_heads: list[int], *numbers
    ) -> "Call":
        """Undo ``flatten``."""
        rules, rest = numbers[:4], numbers[4:]
        pattern = DilationPattern(tuple(segment_lengths), tuple(dilation_rates), *rules)
        return cls(pattern.of_heads(*held_heads) if held_heads else pattern, *rest)


Forward = Callable[[Tensor, Tensor, Tensor, Tensor | None, Tensor | None, Call], tuple[Tensor, Tensor]]
Backward = Callable[..., tuple[Tensor, Tensor, Tensor]]


class _WithoutDerivative(torch.autograd.Function):
    """A gradient that depends on the tensors given beside it, in a way that nobody has written down."""

    @staticmethod
    def forward(ctx, gradient, *_):
        return gradient.view_as(gradient)

    @staticmethod
    def backward(ctx, *_):
        raise RuntimeError('this backend is differentiable once; backend="eager" is differentiable twice')


def attention_operator(
    name: str, forward: Forward, backward: Backward, empty_like: Callable[[Tensor], Tensor] = torch.empty_like
) -> Forward:
    """Make a function ``(query, key, value, attention_mask, cu_seqlens, call) -> (out, lse)`` with gradients.

    Args:
        name: of the registered operator.
        forward: computes ``(out, lse)`` from these arguments.
        backward: computes the gradients of query, key and value from ``(grad_out, grad_lse or None, query, key, value,
            out, lse, attention_mask, cu_seqlens, call)``.
        empty_like: allocates a tensor with the strides that ``out`` and the gradients have for an input of these
            strides.

    Returns:
        The operator; both results are differentiable, once.
    """

    class Attention(torch.autograd.Function):
        @staticmethod
        def forward(ctx, query, key, value, attention_mask, cu_seqlens, call):
            out, lse = forward(query, key, value, attention_mask, cu_seqlens, call)
            ctx.save_for_backward(query, key, value, out, lse, attention_mask, cu_seqlens)
            ctx.call = call
            ctx.set_materialize_grads(False)
            return out, lse

        @staticmethod
        def backward(ctx, grad_out, grad_lse):
            saved = ctx.saved_tensors
            grad_out = torch.zeros_like(saved[3]) if grad_out is None else grad_out
            with torch.no_grad():
                gradients = backward(grad_out, grad_lse, *saved, ctx.call)
            if torch.is_grad_enabled():  # create_graph=True
                gradients = [_WithoutDerivative.apply(gradient, *saved[:3], grad_out) for gradient in gradients]
            return *gradients, None, None, None

    @torch.library.custom_op(f"{NAMESPACE}::{name}", mutates_args=())
    def registered(
        query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, cu_seqlens: Tensor | None,
        segment_lengths: list[int], dilation_rates: list[int], held_heads: list[int], head_offsets: str,
        count_overlaps: bool, dilate_queries: bool, window: str, is_causal: bool, scale: float, dropout: float, seed: int,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        call = Call.unflatten(
            segment_lengths, dilation_rates, held_heads, head_offsets, count_overlaps, dilate_queries, window,
            is_causal, scale, dropout, seed,
        )  # fmt: skip
        out, lse = forward(query, key, value, attention_mask, cu_seqlens, call)
        return _laid_out(out, empty_like(query)), lse.contiguous()

    @registered.register_fake
    def _(query, key, value, *_):
        return empty_like(query), query.new_empty(query.shape[:3], dtype=_lse_dtype(query))

    @torch.library.custom_op(f"{NAMESPACE}::{name}_backward", mutates_args=())
    def registered_backward(
        grad_out: Tensor, grad_lse: Tensor | None, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor,
        attention_mask: Tensor | None, cu_seqlens: Tensor | None,
        segment_lengths: list[int], dilation_rates: list[int], held_heads: list[int], head_offsets: str,
        count_overlaps: bool, dilate_queries: bool, window: str, is_causal: bool, scale: float, dropout: float, seed: int,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        call = Call.unflatten(
            segment_lengths, dilation_rates, held_heads, head_offsets, count_overlaps, dilate_queries, window,
            is_causal, scale, dropout, seed,
        )  # fmt: skip
        gradients = backward(grad_out, grad_lse, query, key, value, out, lse, attention_mask, cu_seqlens, call)
        return tuple(_laid_out(g, empty_like(x)) for g, x in zip(gradients, (query, key, value)))

    @registered_backward.register_fake
    def _(grad_out, grad_lse, query, key, value, *_):
        return empty_like(query), empty_like(key), empty_like(value)

    def setup_context(ctx, inputs, output):
        query, key, value, attention_mask, cu_seqlens, *ctx.numbers = inputs
        ctx.save_for_backward(query, key, value, *output, attention_mask, cu_seqlens)
        ctx.set_materialize_grads(False)

    def operator_backward(ctx, grad_out, grad_lse):
        grad_out = torch.zeros_like(ctx.saved_tensors[3]) if grad_out is None else grad_out
        gradients = registered_backward(grad_out, grad_lse, *ctx.saved_tensors, *ctx.numbers)
        return *gradients, *[None] * (2 + len(ctx.numbers))

    registered.register_autograd(operator_backward, setup_context=setup_context)

    def operator(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        cu_seqlens: Tensor | None,
        call: Call,
    ) -> tuple[Tensor, Tensor]:
        if torch.compiler.is_compiling() or query.is_meta:
            return registered(query, key, value, attention_mask, cu_seqlens, *call.flatten())
        return Attention.apply(query, key, value, attention_mask, cu_seqlens, call)

    operator.registered = registered
    # For those who know more of the softmax than this call does, and so give a final out and lse to the backward.
    operator.forward, operator.backward = forward, backward
    return operator


def _lse_dtype(query: Tensor) -> torch.dtype:
    return torch.promote_types(query.dtype, torch.float32)


def _laid_out(x: Tensor, like: Tensor) -> Tensor:
    """Give ``x`` the strides and dtype that were announced to the compiler, by a copy where it has others."""
    return x if x.stride() == like.stride() and x.dtype == like.dtype else like.copy_(x)
