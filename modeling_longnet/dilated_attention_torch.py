"""The portable backend: plain PyTorch on any device, time and memory linear in the length.

Every piece of the reach (``dilated_attention_pieces``) is an attention call on strided views of the inputs, made by the
fused kernel that PyTorch has for the device, and folded into running ``(out, lse)`` accumulators. The backward needs no
merging at all: the gradient of one softmax over all pieces is each piece's ordinary attention backward, given the
*final* out and lse.
"""

import functools
from collections.abc import Callable, Iterable, Iterator
from itertools import count

import torch
from torch import Tensor

from .attention_operator import Call, attention_operator
from .cuda_devices import cuda_capability
from .dilated_attention_pieces import FULL, UPPER, Piece, Rows, reach_pieces
from .dilation_pattern import DilationPattern


# The plain kernel works on at most this many scores at a time.
SCORES_PER_CHUNK = 2**22
# cuDNN plans every new shape anew and refuses single rows: small pieces are left to FlashAttention.
CUDNN_MIN_ROWS = 256
# Fused CUDA kernels put the batch, and the heads, into a grid dimension of at most 65,535.
BLOCKS_PER_CALL = 2**15


def torch_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    pattern: DilationPattern,
    *,
    is_causal: bool,
    attention_mask: Tensor | None,
    cu_seqlens: Tensor | None,
    scale: float,
    dropout: float = 0.0,
    return_lse: bool = True,
) -> tuple[Tensor, Tensor | None]:
    """Compute dilated attention by SDPA-class kernels on strided views.

    Args:
        query: ``[B, H, L, D]``.
        key, value: ``[B, G, L, D]``.
        pattern: the branches and their rules.
        attention_mask: ``[B, L]`` bool, None if all tokens are real.
        cu_seqlens: ``[n + 1]`` integer for packed documents in one row, or None.
        is_causal, scale, dropout: as in ``dilated_attention``.
        return_lse: whether lse is wanted.

    Returns:
        ``(out [B, H, L, D], lse [B, H, L] or None)``, both differentiable once.
    """
    # Drawn from the global generator so that torch.manual_seed, and a checkpoint's replay, give the same mask again.
    seed = int(torch.randint(2**62, ())) if dropout else 0
    call = Call(pattern, is_causal, scale, dropout, seed)
    eagerly = not return_lse and not torch.compiler.is_compiling()
    if eagerly and _is_one_piece(call, query, attention_mask, cu_seqlens):
        kernel = _kernel(call, query, key, value, None, seed)
        if isinstance(kernel, _FusedKernel):  # it brings its own gradient, for less time of the host
            return kernel.attend(query, key, value, is_causal), None
    out, lse = _attention(query, key, value, attention_mask, cu_seqlens, call)
    return out, lse if return_lse else None


def _documents(
    query: Tensor, attention_mask: Tensor | None, cu_seqlens: Tensor | None
) -> list[tuple[slice, slice | Tensor]]:
    """List the documents as (rows of the batch, their tokens): a slice where contiguous, else an index tensor."""
    if query.numel() == 0:
        return []
    if cu_seqlens is not None:
        edges = cu_seqlens.tolist()
        return [(slice(0, 1), slice(low, high)) for low, high in zip(edges, edges[1:]) if high > low]
    if attention_mask is None:
        return [(slice(None), slice(None))]
    documents = []
    for b, row in enumerate(attention_mask.cpu()):
        tokens = row.nonzero().flatten()
        if len(tokens) == 0:
            continue
        low, high = int(tokens[0]), int(tokens[-1]) + 1
        contiguous = high - low == len(tokens)
        documents.append((slice(b, b + 1), slice(low, high) if contiguous else tokens.to(query.device)))
    return documents


def _is_one_piece(call: Call, query: Tensor, attention_mask: Tensor | None, cu_seqlens: Tensor | None) -> bool:
    """Say whether the reach is the whole input, as in ordinary attention, so that nothing needs views and merging."""
    whole = attention_mask is None and cu_seqlens is None and 0 < query.shape[0] <= BLOCKS_PER_CALL
    return whole and query.shape[2] > 0 and call.pattern.is_ordinary(query.shape[2])


def _views(call: Call, length: int, batch: int, num_heads: int, num_kv_heads: int) -> Iterator["PieceView"]:
    """Yield every piece of the reach on one document as views, each valid for a slice of the batch and heads."""
    for i, offsets in enumerate(call.pattern.offsets(num_kv_heads)):
        for offset in sorted(set(offsets)):
            kv_heads = [g for g, s in enumerate(offsets) if s == offset]
            for piece in reach_pieces(call.pattern, i, offset, length, call.is_causal):
                yield from piece_views(piece, kv_heads, batch, num_heads // num_kv_heads)


def _forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    cu_seqlens: Tensor | None,
    call: Call,
) -> tuple[Tensor, Tensor]:
    if _is_one_piece(call, query, attention_mask, cu_seqlens):
        out, lse = _kernel(call, query, key, value, None, call.seed).forward(query, key, value, call.is_causal)
        return out.to(query.dtype), lse
    dtype = torch.promote_types(query.dtype, torch.float32)
    out = torch.zeros(query.shape, dtype=dtype, device=query.device)
    lse = torch.full(query.shape[:-1], float("-inf"), dtype=dtype, device=query.device)
    seeds = count(call.seed)  # one for every piece of every document
    for rows, tokens in _documents(query, attention_mask, cu_seqlens):
        q, k, v, *results = (x[rows, :, tokens] for x in (query, key, value, out, lse))
        views = _views(call, q.shape[2], q.shape[0], q.shape[1], k.shape[1])
        fold_forward(call, seeds, ((view, k, v) for view in views), q, *results)
        if isinstance(tokens, Tensor):  # indexing copied: put the results back
            out[rows, :, tokens], lse[rows, :, tokens] = results
    return out.to(query.dtype), lse


def _backward(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    attention_mask: Tensor | None,
    cu_seqlens: Tensor | None,
    call: Call,
) -> tuple[Tensor, Tensor, Tensor]:
    grad_out = grad_out.contiguous()
    if grad_out.is_cuda and not _rows_are_aligned(grad_out):
        grad_out = grad_out.clone()
    if _is_one_piece(call, query, attention_mask, cu_seqlens):
        kernel = _kernel(call, query, key, value, grad_lse, call.seed)
        gradients = kernel.backward(query, key, value, out, lse, grad_out, call.is_causal)
        return tuple(gradient.to(query.dtype) for gradient in gradients)
    gradients = [torch.zeros(x.shape, dtype=lse.dtype, device=x.device) for x in (query, key, value)]
    inputs = (query, key, value, out, lse, grad_out, grad_lse)
    seeds = count(call.seed)
    for rows, tokens in _documents(query, attention_mask, cu_seqlens):
        dq, dk, dv = results = [x[rows, :, tokens] for x in gradients]
        q, k, v, *final = (None if x is None else x[rows, :, tokens] for x in inputs)
        views = _views(call, q.shape[2], q.shape[0], q.shape[1], k.shape[1])
        fold_backward(call, seeds, ((view, k, v, dk, dv) for view in views), dq, q, *final)
        if isinstance(tokens, Tensor):
            for gradient, result in zip(gradients, results):
                gradient[rows, :, tokens] = result
    return tuple(gradient.to(query.dtype) for gradient in gradients)


_attention = attention_operator(
    "torch_dilated_attention",
    _forward,
    _backward,
    lambda x: torch.empty_like(x, memory_format=torch.contiguous_format),
)


class PieceView:
    """One piece for some heads and rows of the batch: how to see it in a tensor, as ``[N, heads, rows, D]``."""

    def __init__(self, query: Rows, key: Rows, shape: str, batch: range, q_heads: range, kv_heads: range):
        self.query_rows, self.key_rows, self.shape = query, key, shape
        self.batch, self.q_heads, self.kv_heads = batch, q_heads, kv_heads

    def of_query(self, x: Tensor) -> Tensor:
        """View ``[B, H, L, ...]`` as ``[blocks or batch, heads or residues, rows, ...]``."""
        return self._view(x, self.query_rows, self.q_heads)

    def of_key(self, x: Tensor) -> Tensor:
        """View ``[B, G, L, ...]`` likewise."""
        return self._view(x, self.key_rows, self.kv_heads)

    def _view(self, x: Tensor, rows: Rows, heads: range) -> Tensor:
        stride_b, stride_h, stride_l = x.stride()[:3]
        outer = (rows.blocks, rows.block_stride * stride_l)
        if len(self.batch) > 1:
            outer = (len(self.batch), stride_b)
        inner = (len(heads), heads.step * stride_h)
        if rows.residues > 1:
            inner = (rows.residues, stride_l)
        start = self.batch.start * stride_b + heads.start * stride_h + rows.start * stride_l
        # A single row's step means nothing, but that of the widest rate that is admitted does not fit 64 bits.
        sizes, strides = zip(outer, inner, (rows.rows, rows.stride * stride_l if rows.rows > 1 else 0))
        return x.as_strided((*sizes, *x.shape[3:]), (*strides, *x.stride()[3:]), x.storage_offset() + start)


def piece_views(piece: Piece, kv_heads: list[int], batch: int, group: int) -> Iterator[PieceView]:
    """Split a piece until each part is a 4-D view: one stride for the blocks or batch, one for heads or residues."""
    query, key, shape = piece
    if query.blocks == 1:
        parts = [(query, key, range(b, min(b + BLOCKS_PER_CALL, batch))) for b in range(0, batch, BLOCKS_PER_CALL)]
    else:
        parts = [
            (
                query._replace(start=query.start + first * query.block_stride, blocks=blocks),
                key._replace(start=key.start + first * key.block_stride, blocks=blocks),
                range(b, b + 1),
            )
            for b in range(batch)
            for first in range(0, query.blocks, BLOCKS_PER_CALL)
            for blocks in [min(BLOCKS_PER_CALL, query.blocks - first)]
        ]
    parts = [
        (part._replace(start=part.start + first, residues=min(BLOCKS_PER_CALL, part.residues - first)), part_key, rows)
        for part, part_key, rows in parts
        for first in range(0, part.residues, BLOCKS_PER_CALL)
    ]
    if query.residues > 1:
        heads = [(range(h, h + 1), range(g, g + 1)) for g in kv_heads for h in range(g * group, (g + 1) * group)]
    else:
        step = kv_heads[1] - kv_heads[0] if len(kv_heads) > 1 else 1
        evenly = kv_heads == list(range(kv_heads[0], kv_heads[0] + step * len(kv_heads), step))
        if evenly and (step == 1 or group == 1):
            kv = range(kv_heads[0], kv_heads[-1] + 1, step)
            heads = [(range(kv.start * group, (kv_heads[-1] + 1) * group, step), kv)]
        else:
            heads = [(range(g * group, (g + 1) * group), range(g, g + 1)) for g in kv_heads]
    for part_query, part_key, rows in parts:
        for q_heads, one_kv_heads in heads:
            yield PieceView(part_query, part_key, shape, rows, q_heads, one_kv_heads)


def fold_forward(
    call: Call,
    seeds: Iterator[int],
    pieces: Iterable[tuple[PieceView, Tensor, Tensor]],
    query: Tensor,
    out: Tensor,
    lse: Tensor,
) -> None:
    """Fold pieces into the accumulators, in place: what they hold before and the pieces become one softmax.

    Args:
        seeds: one number per piece, for dropout.
        pieces: views of pieces, each with the key and value ``[B, G, ..., D]`` that its key rows count in.
        query: ``[B, H, L, D]``.
        out, lse: ``[B, H, L, D]`` and ``[B, H, L]``, at least float32; 0 and -inf where nothing is reached yet.
    """
    for (view, key, value), seed in zip(pieces, seeds):
        q, k, v = view.of_query(query), view.of_key(key), view.of_key(value)
        if view.shape == UPPER:  # with the rows in reverse order it is a lower triangle
            q, k, v = (x.flip(2) for x in (q, k, v))
        kernel = _kernel(call, q, k, v, None, seed)
        piece_out, piece_lse = kernel.forward(q, k, v, view.shape != FULL)
        if view.shape == UPPER:
            piece_out, piece_lse = piece_out.flip(2), piece_lse.flip(2)
        view_out, view_lse = view.of_query(out), view.of_query(lse)
        total = torch.logaddexp(view_lse, piece_lse)
        view_out.mul_(torch.exp(view_lse - total)[..., None])
        view_out.addcmul_(piece_out.to(out.dtype), torch.exp(piece_lse - total)[..., None])
        view_lse.copy_(total)


def fold_backward(
    call: Call,
    seeds: Iterator[int],
    pieces: Iterable[tuple[PieceView, Tensor, Tensor, Tensor, Tensor]],
    grad_query: Tensor,
    query: Tensor,
    out: Tensor,
    lse: Tensor,
    grad_out: Tensor,
    grad_lse: Tensor | None,
) -> None:
    """Add every piece's gradients in place, given the *final* out and lse, of which the pieces may be a part.

    Args:
        seeds: as in the forward pass.
        pieces: views of pieces, each with its key and value and where to add their gradients.
        grad_query: where to add the gradient of the query.
    """
    for (view, key, value, grad_key, grad_value), seed in zip(pieces, seeds):
        inputs = [view.of_query(query), view.of_key(key), view.of_key(value)]
        inputs += [view.of_query(x) for x in (out, lse, grad_out)]
        piece_grad_lse = None if grad_lse is None else view.of_query(grad_lse)
        if view.shape == UPPER:
            inputs = [x.flip(2) for x in inputs]
            piece_grad_lse = None if piece_grad_lse is None else piece_grad_lse.flip(2)
        kernel = _kernel(call, *inputs[:3], piece_grad_lse, seed)
        gradients = kernel.backward(*inputs, view.shape != FULL)
        if view.shape == UPPER:
            gradients = [x.flip(2) for x in gradients]
        for total, piece in zip(
            (view.of_query(grad_query), view.of_key(grad_key), view.of_key(grad_value)), gradients
        ):
            total.add_(piece)


def has_fused_kernel(query: Tensor, key: Tensor, value: Tensor) -> bool:
    """Say whether one of PyTorch's fused kernels for CUDA serves: rows of whole 16 bytes, each at a multiple of them.

    Cards before Ampere have none for bfloat16.
    """
    if not _fits_fused_kernels(query, key, value):
        return False
    return query.dtype != torch.bfloat16 or not query.is_cuda or not _is_before_ampere(query.device)


def _is_before_ampere(device: torch.device) -> bool:
    return torch.version.hip is None and cuda_capability(device) < (8, 0)


def _fits_fused_kernels(query: Tensor, key: Tensor, value: Tensor) -> bool:
    head_dim, dtype = query.shape[3], query.dtype
    if head_dim % 8:
        return False
    if not torch.compiler.is_compiling() and not _rows_are_aligned(query, key, value):  # what is traced lies nowhere
        return False
    return head_dim <= 256 if dtype in (torch.bfloat16, torch.float16) else dtype == torch.float32


def _kernel(call: Call, query: Tensor, key: Tensor, value: Tensor, grad_lse: Tensor | None, seed: int):
    """Choose the fastest exact kernel for one piece: PyTorch's fused ones where they apply."""
    if call.dropout or grad_lse is not None:
        return _PlainKernel(call.scale, call.dropout, seed, grad_lse)
    if query.is_cpu:
        return _CpuFlashKernel(call.scale)
    if not query.is_cuda or not _fits_fused_kernels(query, key, value):
        return _PlainKernel(call.scale)
    if query.dtype == torch.float32:
        return _CudaEfficientKernel(call.scale)
    if torch.version.hip is not None:  # whose capabilities count something else
        return _CudaFlashKernel(call.scale)
    capability = cuda_capability(query.device)
    if capability < (8, 0):  # FlashAttention needs Ampere; the memory-efficient kernel has no bfloat16 before it
        return _CudaEfficientKernel(call.scale) if query.dtype == torch.float16 else _PlainKernel(call.scale)
    large = query.shape[2] >= CUDNN_MIN_ROWS and key.shape[2] >= CUDNN_MIN_ROWS and query.shape[3] <= 128
    # The gradients of cuDNN's differ from run to run, as PyTorch knows.
    if large and capability >= (9, 0) and not torch.are_deterministic_algorithms_enabled():
        return _CudaCudnnKernel(call.scale)
    return _CudaFlashKernel(call.scale)


def _rows_are_aligned(*tensors: Tensor) -> bool:
    """Whether every row starts at a multiple of 16 bytes, as the CUDA kernels' vector loads need."""
    bits = 0  # elements have a power of two bytes: low bits that no stride sets are set in no multiple either
    for x in tensors:
        stride_b, stride_h, stride_l, _ = x.stride()
        bits |= x.data_ptr() | (stride_b | stride_h | stride_l) * x.element_size()
    return bits % 16 == 0


class _FusedKernel:
    """One of PyTorch's own kernels, given as ``forward`` and ``backward``, that a call with gradients may consist of."""

    def __init__(self, scale: float):
        self.scale = scale

    def attend(self, q: Tensor, k: Tensor, v: Tensor, is_causal: bool) -> Tensor:
        """Return the output alone, with PyTorch's own gradient."""
        return self.forward(q, k, v, is_causal)[0]


class _CpuFlashKernel(_FusedKernel):
    """PyTorch's flash attention for CPU: every dtype, grouped heads, strided inputs."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, is_causal: bool) -> tuple[Tensor, Tensor]:
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, is_causal, scale=self.scale)

    def backward(self, q, k, v, out, lse, grad_out, is_causal: bool) -> tuple[Tensor, Tensor, Tensor]:
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            grad_out, q, k, v, out, lse, 0.0, is_causal, scale=self.scale
        )


class _CudaCudnnKernel(_FusedKernel):
    """cuDNN's attention, half precision: the fastest on Hopper and later."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor, is_causal: bool) -> Tensor:
        # lse is computed for the gradient alone.
        wants_lse = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)
        # By its name in torch: through torch.ops the host takes a microsecond more.
        return torch._scaled_dot_product_cudnn_attention(q, k, v, None, wants_lse, 0.0, is_causal, scale=self.scale)[0]

    def forward(self, q: Tensor, k: Tensor, v: Tensor, is_causal: bool) -> tuple[Tensor, Tensor]:
        out, lse = torch._scaled_dot_product_cudnn_attention(q, k, v, None, True, 0.0, is_causal, scale=self.scale)[:2]
        return out, lse.view(q.shape[:3])

    def backward(self, q, k, v, out, lse, grad_out, is_causal: bool) -> tuple[Tensor, Tensor, Tensor]:
        no_state = torch.empty((), dtype=torch.int64, device=q.device)
        return torch.ops.aten._scaled_dot_product_cudnn_attention_backward(
            grad_out, q, k, v, out, lse.contiguous()[..., None], no_state, no_state, None, None, None,
            q.shape[2], k.shape[2], 0.0, is_causal, scale=self.scale,
        )  # fmt: skip


class _CudaFlashKernel(_FusedKernel):
    """PyTorch's FlashAttention for CUDA, half precision."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, is_causal: bool) -> tuple[Tensor, Tensor]:
        k, v = (_repeat_heads(x, q) for x in (k, v))
        return torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, 0.0, is_causal, scale=self.scale)[:2]

    def backward(self, q, k, v, out, lse, grad_out, is_causal: bool) -> tuple[Tensor, Tensor, Tensor]:
        no_state = torch.empty(0, dtype=torch.uint64, device=q.device)
        grad_q, grad_k, grad_v = torch.ops.aten._scaled_dot_product_flash_attention_backward(
            grad_out, q, _repeat_heads(k, q), _repeat_heads(v, q), out, lse.contiguous(), None, None,
            q.shape[2], k.shape[2], 0.0, is_causal, no_state, no_state, scale=self.scale,
        )  # fmt: skip
        return grad_q, _sum_heads(grad_k, k), _sum_heads(grad_v, v)


class _CudaEfficientKernel(_FusedKernel):
    """PyTorch's memory-efficient attention for CUDA, float32, and float16 before Ampere."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, is_causal: bool) -> tuple[Tensor, Tensor]:
        k, v = (_repeat_heads(x, q) for x in (k, v))
        out, lse, _, _ = torch.ops.aten._scaled_dot_product_efficient_attention(
            q, k, v, None, True, 0.0, is_causal, scale=self.scale
        )
        return out, lse[:, :, : q.shape[2]]

    def backward(self, q, k, v, out, lse, grad_out, is_causal: bool) -> tuple[Tensor, Tensor, Tensor]:
        # The kernel reads lse rows one behind the other, padded to a multiple of 32; +inf gives the padding probability
        # 0. Padding by nothing would keep the order of a view's dimensions.
        lse = torch.nn.functional.pad(lse.contiguous(), (0, -q.shape[2] % 32), value=float("inf"))
        no_state = torch.empty((), dtype=torch.int64, device=q.device)
        grad_q, grad_k, grad_v, _ = torch.ops.aten._scaled_dot_product_efficient_attention_backward(
            grad_out, q, _repeat_heads(k, q), _repeat_heads(v, q), None, out, lse, no_state, no_state, 0.0,
            [True, True, True, False], is_causal, scale=self.scale,
        )  # fmt: skip
        return grad_q, _sum_heads(grad_k, k), _sum_heads(grad_v, v)


def _repeat_heads(x: Tensor, query: Tensor) -> Tensor:
    """Repeat KV heads ``[N, G, J, D]`` to the query's ``[N, H, J, D]`` for kernels without grouped heads."""
    repeats = query.shape[1] // x.shape[1]
    return x if repeats == 1 else x[:, :, None].expand(-1, -1, repeats, -1, -1).flatten(1, 2)


def _sum_heads(grad: Tensor, x: Tensor) -> Tensor:
    """Undo ``_repeat_heads`` on a gradient."""
    return grad if grad.shape == x.shape else grad.unflatten(1, (x.shape[1], -1)).sum(2)


def _without_autocast(method: Callable) -> Callable:
    """Have a kernel's products in the dtype that it chose: the backward needs the very scores of the forward."""

    @functools.wraps(method)
    def run(self, q: Tensor, *args):
        with torch.autocast(q.device.type, enabled=False):
            return method(self, q, *args)

    return run


class _PlainKernel:
    """Matrix products in chunks of bounded size: any device and dtype, dropout, and gradients through lse."""

    def __init__(self, scale: float, dropout: float = 0.0, seed: int = 0, grad_lse: Tensor | None = None):
        self.scale, self.dropout, self.seed, self.grad_lse = scale, dropout, seed, grad_lse

    @_without_autocast
    def forward(self, q: Tensor, k: Tensor, v: Tensor, is_causal: bool) -> tuple[Tensor, Tensor]:
        dtype = torch.promote_types(q.dtype, torch.float32)
        out = torch.empty(q.shape, dtype=dtype, device=q.device)
        lse = torch.empty(q.shape[:-1], dtype=dtype, device=q.device)
        for blocks, rows, scores, keep in self._chunks(q, k, is_causal):
            chunk_lse = scores.logsumexp(-1)  # [n, G, R, rows]
            weights = torch.exp(scores - chunk_lse[..., None]) * keep
            out[blocks, :, rows] = (weights @ v[blocks, :, None].to(dtype)).flatten(1, 2)
            lse[blocks, :, rows] = chunk_lse.flatten(1, 2)
        return out, lse

    @_without_autocast
    def backward(self, q, k, v, out, lse, grad_out, is_causal: bool) -> tuple[Tensor, Tensor, Tensor]:
        dtype = lse.dtype
        grad_q, grad_k, grad_v = (torch.zeros(x.shape, dtype=dtype, device=x.device) for x in (q, k, v))
        delta = (grad_out.to(dtype) * out.to(dtype)).sum(-1)  # [n, H, A]
        if self.grad_lse is not None:
            delta = delta - self.grad_lse
        grouped = lambda x: x.unflatten(1, (k.shape[1], -1))  # noqa: E731  [n, H, ...] -> [n, G, R, ...]
        for blocks, rows, scores, keep in self._chunks(q, k, is_causal):
            weights = torch.exp(scores - grouped(lse[blocks, :, rows])[..., None])  # [n, G, R, rows, J]
            grad = grouped(grad_out[blocks, :, rows].to(dtype))
            grad_v[blocks] += ((weights * keep).mT @ grad).sum(2)
            grad_scores = grad @ v[blocks, :, None].to(dtype).mT * keep
            grad_scores = weights * (grad_scores - grouped(delta[blocks, :, rows])[..., None]) * self.scale
            grad_q[blocks, :, rows] = (grad_scores @ k[blocks, :, None].to(dtype)).flatten(1, 2)
            grad_k[blocks] += (grad_scores.mT @ grouped(q[blocks, :, rows].to(dtype))).sum(2)
        return grad_q, grad_k, grad_v

    def _chunks(self, q: Tensor, k: Tensor, is_causal: bool) -> Iterator[tuple[slice, slice, Tensor, Tensor | float]]:
        """Yield (blocks, rows, scores ``[n, G, R, rows, J]``, dropout factors); the same each time it is called."""
        dtype = torch.promote_types(q.dtype, torch.float32)
        generator = torch.Generator(q.device).manual_seed(self.seed) if self.dropout else None
        num_blocks, num_heads, num_rows, _ = q.shape
        row_scores = num_heads * k.shape[2]
        rows_per_chunk = min(num_rows, max(1, SCORES_PER_CHUNK // row_scores))
        blocks_per_chunk = max(1, SCORES_PER_CHUNK // (row_scores * rows_per_chunk))
        columns = torch.arange(k.shape[2], device=q.device)
        for first_block in range(0, num_blocks, blocks_per_chunk):
            blocks = slice(first_block, first_block + blocks_per_chunk)
            keys = k[blocks, :, None].to(dtype)
            for first_row in range(0, num_rows, rows_per_chunk):
                rows = slice(first_row, min(first_row + rows_per_chunk, num_rows))
                queries = q[blocks, :, rows].to(dtype).unflatten(1, (k.shape[1], -1))
                scores = queries @ keys.mT * self.scale
                if is_causal:
                    future = columns > torch.arange(rows.start, rows.stop, device=q.device)[:, None]
                    scores = scores.masked_fill(future, float("-inf"))
                keep: Tensor | float = 1.0
                if self.dropout:
                    keep = torch.rand(scores.shape, generator=generator, device=q.device, dtype=dtype)
                    keep = (keep >= self.dropout).to(dtype) / (1 - self.dropout)
                yield blocks, rows, scores, keep
