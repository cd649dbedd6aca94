"""Read one long prompt with all ranks of a group, then decode as if one had read it."""

from collections.abc import Mapping

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from .cache_longnet import LongNetCache
from .sequence_group import as_process_group, require_agreement, sequence_parallel
from .sequence_shards import collective_device, fingerprint, shard_sequence


@torch.no_grad()
def prefill_sequence(model: nn.Module, batch: Mapping, group: dist.ProcessGroup | DeviceMesh) -> LongNetCache:
    """Fill a KV cache from a prompt of which each rank reads a slice.

    Theorem: the cache is, on every rank, the one that a single process has after the prompt's tokens but the last few
    (fewer than the world size, and at least one), which ``generate`` reads itself::

        cache = prefill_sequence(model, prompt, group)
        model.generate(**prompt, past_key_values=cache)

    Every rank then decodes for itself, and all alike if they draw alike: seed them alike before sampling.

    Args:
        model: a LongNet model for generation, the same on every rank.
        batch: the whole prompt, on every rank: ``input_ids [B, N]``, and ``attention_mask [B, N]`` if there is padding.
        group: the ranks that read it.

    Returns:
        The filled cache, the same on every rank.

    Raises:
        ValueError: if ``batch`` holds anything else, the ranks have different prompts, or the model is in training
            mode.
    """
    group = as_process_group(group)
    if model.training:
        raise ValueError("the model is in training mode; call model.eval()")
    if not isinstance(batch, Mapping):
        raise ValueError(f"a prompt is a dict of input_ids and an optional attention_mask, got {type(batch).__name__}")
    if "input_ids" not in batch or set(batch) - {"input_ids", "attention_mask"}:
        raise ValueError(f"a prompt is input_ids and an optional attention_mask, got {sorted(batch)}")
    for name, x in batch.items():
        if not isinstance(x, Tensor) and (name == "input_ids" or x is not None):
            raise ValueError(f"{name} must be a tensor [batch, tokens], got {type(x).__name__}")
        if x is not None and x.ndim != 2:
            raise ValueError(f"{name} must be a tensor [batch, tokens], got shape {list(x.shape)}")
    prompt: dict[str, Tensor] = {name: x for name, x in batch.items() if x is not None}
    # All of it: the ranks also read the tokens alike that no slice holds, and may have none to share.
    terms = {f"the prompt's {name}": fingerprint(x) for name, x in sorted(prompt.items())}
    require_agreement(group, collective_device(group, prompt["input_ids"].device), terms)
    cache = LongNetCache(model.config)
    # The tokens left to generate() are those that slices of one length leave: no slice needs padding.
    length = (prompt["input_ids"].shape[1] - 1) // group.size() * group.size()
    if length > 0:
        whole_slices = {name: x[:, :length] for name, x in prompt.items()}
        with sequence_parallel(group):
            model(**shard_sequence(whole_slices, group), past_key_values=cache, use_cache=True, logits_to_keep=1)
    return cache
