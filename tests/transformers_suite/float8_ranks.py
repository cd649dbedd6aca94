"""What a rank computes in the test of float8 weights under tensor parallelism.

Float8 weights have one scale for a whole tensor: halves of it get scales of their own and round differently. Both are
as far from the exact weights, so the errors of logits are compared, not the tokens of a random model.
"""

import torch
import torch.distributed as dist
from torch import Tensor
from torchao.quantization import Float8WeightOnlyConfig
from transformers import PreTrainedModel, TorchAoConfig, set_seed
from transformers.distributed.configuration_utils import DistributedConfig


def compare_with_one_process(rank: int, folder: str, model_class: type[PreTrainedModel], new_tokens: int) -> None:
    """Hold a float8 model over all ranks against the exact model and the float8 model of one process.

    Raises:
        AssertionError: if the ranks' logits are off by more than 1.5 times what one process is off by, or the weights
            are not quantized or not sharded; with the numbers.
    """
    float8 = {"quantization_config": TorchAoConfig(Float8WeightOnlyConfig())}
    ranks = {"distributed_config": DistributedConfig(tp_size=dist.get_world_size())}
    over_ranks = model_class.from_pretrained(folder, **ranks, **float8).eval()
    dist.barrier()
    alone = model_class.from_pretrained(folder, **float8).eval()
    exact = model_class.from_pretrained(folder).eval()
    for name in ("q_proj", "o_proj"):
        weights = [getattr(model.model.layers[0].self_attn, name).weight for model in (over_ranks, alone)]
        assert "Float8" in repr(weights[0]) and "Float8" in repr(weights[1]), weights
        assert 2 * local(weights[0]).numel() == weights[1].numel(), (name, weights)

    set_seed(0)
    prompt = torch.randint(0, exact.config.vocab_size, (1, 10))
    with torch.no_grad():
        tokens = exact.generate(prompt, max_new_tokens=new_tokens, min_new_tokens=new_tokens, do_sample=False)
        expected, *others = (decode(model, tokens, prompt.shape[1]) for model in (exact, alone, over_ranks))
    size = expected.norm().item()
    of_one, of_ranks = ((logits.float() - expected).norm().item() / size for logits in others)
    numbers = (
        f"relative error of the logits: {of_ranks:.4f} over {dist.get_world_size()} ranks, {of_one:.4f} in one process"
    )
    print(f"[rank {rank}] {numbers}")
    assert 0 < of_one < 0.1 and of_ranks <= 1.5 * of_one, numbers
    dist.barrier()


def local(weight: Tensor) -> Tensor:
    return weight.to_local() if hasattr(weight, "to_local") else weight


def decode(model: PreTrainedModel, tokens: Tensor, prompt_length: int) -> Tensor:
    """Return the logits ``[B, L, V]`` of a prompt at once and of each later token by itself, with the cache."""
    output = model(tokens[:, :prompt_length], use_cache=True)
    logits = [output.logits]
    for i in range(prompt_length, tokens.shape[1]):
        output = model(tokens[:, i : i + 1], past_key_values=output.past_key_values, use_cache=True)
        logits.append(output.logits)
    return torch.cat(logits, dim=1)
