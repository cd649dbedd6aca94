"""The public operator: validate the call, choose the backend, run it."""

import logging

import torch
from torch import Tensor

from .dilated_attention_eager import eager_attention
from .dilated_attention_torch import has_fused_kernel, torch_attention
from .dilated_attention_triton import triton_attention, triton_refusal
from .dilation_pattern import DilationPattern
from .logical_positions import check_cu_seqlens, positions_from_cu_seqlens, positions_from_mask


logger = logging.getLogger(__name__)

BACKENDS = ("auto", "eager", "torch", "triton")
DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


def dilated_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    pattern: DilationPattern,
    *,
    is_causal: bool = True,
    attention_mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    scale: float | None = None,
    dropout: float = 0.0,
    backend: str = "auto",
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attend over the keys that a dilation pattern reaches, all branches merged into one softmax.

    Computes Eq. 9-10 of the LongNet paper (arXiv 2307.02486): each branch's softmax is weighted by its denominator, so
    the result is one softmax over the multiset of keys that ``pattern.reach`` lists. With one branch that covers the
    input undilated it is ordinary attention. Gradients are the exact gradients of this function. Padding and packing
    change nothing: a padded or packed document gives what it gives alone. Under autocast the inputs are cast to its
    dtype.

    Args:
        query: ``[B, H, L, D]``, float64, float32, bfloat16 or float16, last dimension contiguous.
        key, value: ``[B, G, L, D]``, H a multiple of G; same dtype and device as ``query``.
        pattern: branches and rules.
        is_causal: whether queries see only keys at or before them.
        attention_mask: ``[B, L]`` bool or integer, nonzero = real token. Padding has no position, is never reached, and
            its own output is 0.
        cu_seqlens: ``[n + 1]`` integer starts of packed documents, and last L; needs B == 1. Packed documents never
            see each other. Compiled code does not look at the values: they have to be right.
        scale: positive factor on the scores, ``1 / sqrt(D)`` if None.
        dropout: probability of dropping an attention weight, ``0 <= dropout < 1``.
        backend: ``"eager"`` (dense masks, the reference), ``"torch"`` (plain PyTorch, linear memory), ``"triton"``
            (fused CUDA kernels) or ``"auto"`` (the fastest that supports the call). A backend asked for by name runs
            or raises; it never falls back.
        return_lse: also return the log-sum-exp of the scaled scores.

    Returns:
        ``[B, H, L, D]`` in the input dtype; with ``return_lse`` also ``[B, H, L]``, natural log, float32 (float64 for
        float64 inputs). A query that reaches no key gives output 0 and lse -inf.

    Raises:
        ValueError: if shapes, dtypes, devices, the pattern, the mask or the backend do not fit.
    """
    query, key, value = cast_for_autocast(query, key, value)
    if not _plainly_fit(query, key, value, pattern):
        _check_tensors(query, key, value, pattern)
    if attention_mask is not None or cu_seqlens is not None:
        _check_documents(query, attention_mask, cu_seqlens)
    if not 0.0 <= dropout < 1.0:
        raise ValueError(f"dropout must be at least 0 and below 1, got {dropout}")
    scale = query.shape[-1] ** -0.5 if scale is None else float(scale)
    if not 0.0 < scale < torch.inf:
        raise ValueError(f"scale must be positive and finite, got {scale}")
    if attention_mask is not None:
        attention_mask = attention_mask != 0

    backend = choose_backend(backend, query, key, value, pattern, attention_mask, cu_seqlens, dropout)
    if backend == "eager":
        positions, documents = _positions(query, attention_mask, cu_seqlens)
        out, lse, _ = eager_attention(
            query, key, value, pattern, positions=positions, documents=documents, is_causal=is_causal, scale=scale,
            dropout=dropout,
        )  # fmt: skip
    elif backend == "torch":
        out, lse = torch_attention(
            query, key, value, pattern, is_causal=is_causal, attention_mask=attention_mask, cu_seqlens=cu_seqlens,
            scale=scale, dropout=dropout, return_lse=return_lse,
        )  # fmt: skip
    else:
        out, lse = triton_attention(
            query, key, value, pattern, is_causal=is_causal, attention_mask=attention_mask, cu_seqlens=cu_seqlens,
            scale=scale,
        )  # fmt: skip
    return (out, lse) if return_lse else out


def cast_for_autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Cast float32 and half tensors to the autocast dtype where autocast is on, as PyTorch's own attention does."""
    first = tensors[0]
    device_type = "cpu"
    if isinstance(first, Tensor):  # is_cuda first: a device takes longer to say its type
        device_type = "cuda" if first.is_cuda else first.device.type
    if device_type == "meta" or not torch.is_autocast_enabled(device_type):
        return tensors
    dtype = torch.get_autocast_dtype(device_type)
    lower = (torch.float32, torch.bfloat16, torch.float16)
    return tuple(x.to(dtype) if isinstance(x, Tensor) and x.dtype in lower else x for x in tensors)


def choose_backend(
    backend: str,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    pattern: DilationPattern,
    attention_mask: Tensor | None,
    cu_seqlens: Tensor | None,
    dropout: float,
) -> str:
    """Return the backend that runs a call: the one asked for, or the fastest that supports it for ``"auto"``.

    Raises:
        ValueError: if there is no such backend, or it does not support the call.
    """
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(map(repr, BACKENDS))}, got {backend!r}")
    if backend in ("eager", "torch"):
        return backend
    whole = attention_mask is None and cu_seqlens is None and query.dtype != torch.float32
    refusal: str | None
    if backend == "auto" and whole and pattern.is_ordinary(query.shape[2]) and has_fused_kernel(query, key, value):
        refusal = "on this input the pattern is ordinary attention, for which PyTorch's own kernels are the fastest"
    else:
        refusal = triton_refusal(query, key, value, pattern, dropout)
    if refusal is None:
        return "triton"
    if backend == "triton":
        raise ValueError(f'backend="triton" cannot run this call: {refusal}; use "torch" or "auto"')
    if not torch.compiler.is_compiling():  # a log call would break the graph
        logger.debug("auto chose the torch backend, not triton: %s", refusal)
    return "torch"


def _positions(
    query: Tensor, attention_mask: Tensor | None, cu_seqlens: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    batch, _, length, _ = query.shape
    if cu_seqlens is not None:
        return positions_from_cu_seqlens(cu_seqlens.to(query.device), length)
    if attention_mask is not None:
        return positions_from_mask(attention_mask), None
    return torch.arange(length, device=query.device).expand(batch, -1), None


def _plainly_fit(query: Tensor, key: Tensor, value: Tensor, pattern: DilationPattern) -> bool:
    """Whether all is well that ``_check_tensors`` asks, in the few steps that a short call has time for.

    False says nothing: the longer way knows exceptions, and which message to give.
    """
    if not (type(query) is type(key) is type(value) is Tensor and type(pattern) is DilationPattern):
        return False
    shape, kv_shape = query.shape, key.shape
    if len(shape) != 4 or len(kv_shape) != 4 or kv_shape != value.shape:
        return False
    batch, num_heads, length, head_dim = shape
    kv_batch, num_kv_heads, kv_length, kv_head_dim = kv_shape
    dtype, device = query.dtype, query.device
    return (
        kv_batch == batch and kv_length == length and kv_head_dim == head_dim > 0
        and num_heads >= num_kv_heads > 0 and num_heads % num_kv_heads == 0
        and dtype in DTYPES and key.dtype is dtype is value.dtype
        and key.device == device == value.device
        and query.stride()[3] == key.stride()[3] == value.stride()[3] == 1
    )  # fmt: skip


def _check_tensors(query: Tensor, key: Tensor, value: Tensor, pattern: DilationPattern) -> None:
    # By name: code loaded with a checkpoint may hold the configuration's modules twice, and so two such classes.
    if DilationPattern.__name__ not in [base.__name__ for base in type(pattern).__mro__]:
        raise ValueError(f"pattern must be a DilationPattern, got {type(pattern).__name__}")
    for name, x in (("query", query), ("key", key), ("value", value)):
        if not isinstance(x, Tensor) or x.ndim != 4:
            got = f"shape {tuple(x.shape)}" if isinstance(x, Tensor) else type(x).__name__
            raise ValueError(f"{name} must be a tensor [batch, heads, length, head_dim], got {got}")
        if x.dtype not in DTYPES:
            raise ValueError(f"{name} must be float64, float32, bfloat16 or float16, got {x.dtype}")
        if x.dtype != query.dtype or x.device != query.device:
            raise ValueError(
                f"query, key and value must share dtype and device: query has {query.dtype} on {query.device}, "
                f"{name} has {x.dtype} on {x.device}"
            )
        if x.shape[-1] > 1 and x.stride(-1) != 1:
            raise ValueError(f"{name} needs a contiguous last dimension, got strides {x.stride()}; call .contiguous()")
    if key.shape != value.shape:
        raise ValueError(f"key and value must have one shape, got {tuple(key.shape)} and {tuple(value.shape)}")
    batch, num_heads, length, head_dim = query.shape
    num_kv_heads = key.shape[1]
    if (key.shape[0], *key.shape[2:]) != (batch, length, head_dim):
        raise ValueError(
            f"query {tuple(query.shape)} and key {tuple(key.shape)} must agree in batch, length and head_dim"
        )
    if num_kv_heads == 0 or num_heads % num_kv_heads or num_heads == 0:
        raise ValueError(f"the {num_heads} query heads must be a positive multiple of the {num_kv_heads} KV heads")
    if head_dim == 0:
        raise ValueError(f"head_dim must be positive, got query shape {tuple(query.shape)}")


def _check_documents(query: Tensor, attention_mask: Tensor | None, cu_seqlens: Tensor | None) -> None:
    batch, _, length, _ = query.shape
    if attention_mask is not None and cu_seqlens is not None:
        raise ValueError("give attention_mask or cu_seqlens, not both: leave padding out of packed documents instead")
    if attention_mask is not None:
        if not isinstance(attention_mask, Tensor):
            raise ValueError(f"attention_mask must be a tensor, got {type(attention_mask).__name__}")
        if tuple(attention_mask.shape) != (batch, length):
            raise ValueError(
                f"attention_mask must be [batch, length] = {[batch, length]}, got {list(attention_mask.shape)}"
            )
        if attention_mask.is_floating_point() or attention_mask.is_complex():
            raise ValueError(f"attention_mask must be bool or integer (nonzero = real), got {attention_mask.dtype}")
        if attention_mask.device != query.device:
            raise ValueError(f"attention_mask is on {attention_mask.device}, query on {query.device}; move it there")
    if cu_seqlens is not None:
        if batch != 1:
            raise ValueError(f"cu_seqlens packs documents into one row: it needs batch size 1, got {batch}")
        check_cu_seqlens(cu_seqlens, length)
