"""Cut a batch into the slices of a sequence-parallel group, and put slices together again."""

from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from .logical_positions import check_cu_seqlens, positions_from_cu_seqlens
from .sequence_group import all_gather, as_process_group, require_agreement, talk


IGNORED_LABEL = -100
# What is filled up with what is not predicted; every other tensor gets zeros.
LABELS = ("labels", "shift_labels")
# What the model takes for each token.
TOKENWISE = ("inputs_embeds", "attention_mask", "position_ids", *LABELS)
# What packing collators add for other kernels: all of it stands in cu_seq_lens_q, or in position_ids.
PACKING_EXTRAS = ("cu_seq_lens_k", "max_length_q", "max_length_k", "seq_idx")


def shard_sequence(batch: Mapping, group: dist.ProcessGroup | DeviceMesh) -> dict:
    """Cut a batch that every rank has into slices, one per rank, for a model under ``sequence_parallel(group)``.

    All tensors ``[B, N, ...]`` are cut along N; if the world size does not divide N, the end is padded and masked.
    Labels are shifted before, since a slice's last token is trained on the next slice's first, and their number in the
    whole batch goes with them: the model's loss is then this rank's part of the whole batch's mean. Add the parts over
    the ranks to report it, and the ranks' gradients to train on it (data-parallel wrappers average: multiply by the
    world size).

    Args:
        batch: what the model takes, with ``input_ids`` or ``inputs_embeds``. ``cu_seq_lens_q`` becomes
            ``position_ids``; where both are given, they must divide the row alike. ``ignore_index`` is the label of
            what is not predicted, -100 without it.
        group: the ranks that share the sequence.

    Returns:
        This rank's batch, a dict; tensors without the sequence dimension as they are.

    Raises:
        ValueError: on every rank, if they have different batches, or one whose tensors differ in their tokens or whose
            packed documents are contradictory; on this one, if its batch is no dict or holds no tokens.
    """
    group = as_process_group(group)
    if not isinstance(batch, Mapping):
        raise ValueError(f"shard_sequence takes a batch, a dict with input_ids, got {type(batch).__name__}")
    batch = {name: x for name, x in batch.items() if name not in PACKING_EXTRAS and x is not None}
    tokens = batch.get("input_ids", batch.get("inputs_embeds"))
    if not isinstance(tokens, Tensor) or tokens.ndim < 2:
        raise ValueError("shard_sequence needs input_ids [B, N] or inputs_embeds [B, N, hidden] to know the length")
    num_rows, length = tokens.shape[:2]
    device = collective_device(group, tokens.device)
    terms: dict[str, object] = {"the shape of the whole batch": [num_rows, length], "its contents": sorted(batch)}
    # Not of floating-point tensors: embeddings that each rank computes may differ in their last bits.
    terms |= {f"the numbers in {name}": fingerprint(x) for name, x in sorted(batch.items()) if _is_integral(x)}
    require_agreement(group, device, terms)
    _check_lengths(batch, num_rows, length)

    cu_seqlens = batch.pop("cu_seq_lens_q", None)
    if cu_seqlens is not None:
        if num_rows != 1:
            raise ValueError(f"cu_seq_lens_q packs documents in one row, the batch has {num_rows}; give position_ids")
        check_cu_seqlens(cu_seqlens, length)
        positions, documents = positions_from_cu_seqlens(cu_seqlens.to(tokens.device), length)
        if batch.get("position_ids") is None:
            batch["position_ids"] = positions
        else:
            _check_restarts(batch["position_ids"], documents)
    ignored = batch.get("ignore_index", IGNORED_LABEL)
    labels = batch.get("labels")
    if isinstance(labels, Tensor) and labels.shape == (num_rows, length) and batch.get("shift_labels") is None:
        batch["shift_labels"] = F.pad(labels, (0, 1), value=ignored)[:, 1:]
    shift_labels = batch.get("shift_labels")
    if isinstance(shift_labels, Tensor) and batch.get("num_items_in_batch") is None:
        batch["num_items_in_batch"] = (shift_labels != ignored).sum()
    slice_length = -(-length // group.size())
    if length % group.size() and batch.get("attention_mask") is None:
        batch["attention_mask"] = tokens.new_ones(num_rows, length, dtype=torch.long)
    first = group.rank() * slice_length
    filling = dict.fromkeys(LABELS, ignored)
    return {
        name: _cut(x, first, slice_length, filling.get(name, 0)) if _has_sequence(x, length) else x
        for name, x in batch.items()
    }


def _check_lengths(batch: Mapping, num_rows: int, length: int) -> None:
    """Refuse what is given for other tokens than there are: it would not be cut, and could fit a slice by chance."""
    for name in TOKENWISE:
        x = batch.get(name)
        if not isinstance(x, Tensor) or x.ndim < 2 or (name == "labels" and not _is_integral(x)):
            continue  # refused by the model, or labels of whole rows
        rows, tokens = x.shape[:2]
        if tokens != length or (rows != num_rows and (rows, name) != (1, "position_ids")):
            raise ValueError(
                f"{name} must give each of the {[num_rows, length]} tokens of the batch one, got shape {list(x.shape)}"
            )


def _check_restarts(position_ids: Tensor, documents: Tensor) -> None:
    """Refuse positions ``[1, N]`` that do not restart exactly where documents begin: a slice knows documents by them."""
    if position_ids.shape != documents.shape:
        return  # refused by the model
    restarts = position_ids[0, 1:] != position_ids[0, :-1] + 1
    differ = (restarts != (documents[0, 1:] != documents[0, :-1]).to(restarts.device)).nonzero()
    if len(differ):
        place = int(differ[0]) + 1
        found, verb = ("restart", "does not begin") if restarts[place - 1] else ("go on", "begins")
        raise ValueError(
            f"position_ids {found} at token {place}, where by cu_seq_lens_q a document {verb}: a slice of a sequence knows "
            "documents by their positions; leave position_ids out, or start each document's at 0"
        )


def _is_integral(x: object) -> bool:
    return isinstance(x, Tensor) and not x.is_floating_point() and not x.is_complex()


def fingerprint(x: Tensor) -> str:
    """Sum up integers by their shape and a number that any change of one of them changes, computed where they are."""
    flat = x.detach().flatten().long()
    # An odd weight modulo 2^64 keeps every single change; scattered bits of the place keep an exchange of two.
    weights = torch.arange(1, len(flat) + 1, device=flat.device) * 0x9E3779B97F4A7C1 | 1
    weights = weights ^ ((weights >> 29) & ~1)
    return f"shape {list(x.shape)}, checksum {int((flat * weights).sum()) % 2**64:016x}"


def _has_sequence(x: object, length: int) -> bool:
    return isinstance(x, Tensor) and x.ndim >= 2 and x.shape[1] == length


def _cut(x: Tensor, first: int, length: int, filling: int) -> Tensor:
    part = x[:, first : first + length]
    missing = length - part.shape[1]
    if missing:
        part = torch.cat([part, part.new_full((part.shape[0], missing, *part.shape[2:]), filling)], dim=1)
    return part.contiguous()


def gather_sequence(tensor: Tensor, group: dist.ProcessGroup | DeviceMesh, length: int | None = None) -> Tensor:
    """Put the ranks' slices together on every rank, differentiably: logits, hidden states, attention outputs.

    Args:
        tensor: this rank's slice ``[B, n, ...]``, of one shape on all ranks.
        group: the ranks that share the sequence.
        length: tokens of the whole, if its end was padded.

    Returns:
        ``[B, n * world size, ...]``, or ``[B, length, ...]``. The gradient of a slice is the sum of what all ranks give.
    """
    group = as_process_group(group)
    if not isinstance(tensor, Tensor) or tensor.ndim < 2:
        got = f"shape {list(tensor.shape)}" if isinstance(tensor, Tensor) else type(tensor).__name__
        raise ValueError(f"gather_sequence takes this rank's slice, a tensor [batch, tokens, ...], got {got}")
    whole = tensor.shape[1] * group.size()
    if length is not None and not 0 <= length <= whole:
        raise ValueError(
            f"{group.size()} slices of {tensor.shape[1]} tokens hold {whole}, got length={length}; give the tokens of the "
            "whole sequence, or leave it out"
        )
    terms = {"the shape of the slices to gather": list(tensor.shape), "their dtype": tensor.dtype}
    require_agreement(group, collective_device(group, tensor.device), terms)
    return _Gather.apply(tensor, group)[:, :length]


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return torch.cat(all_gather(group, tensor, "the gathering of slices"), dim=1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        group = ctx.group
        sent = torch.stack(grad.chunk(group.size(), dim=1)).contiguous()
        received = torch.empty_like(sent)
        what = "the scattering of gradients"
        talk(group, what, lambda: dist.all_to_all_single(received, sent, group=group))
        return received.sum(0), None


def collective_device(group: dist.ProcessGroup, device: torch.device) -> torch.device:
    """Return a device whose tensors the group can exchange: the given one unless only CUDA tensors travel."""
    if device.type == "cpu" and dist.get_backend(group) == "nccl":
        return torch.device("cuda", torch.cuda.current_device())
    return device
