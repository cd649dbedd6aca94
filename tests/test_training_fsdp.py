"""FSDP2 on two processes (gloo): tiles, checkpoints and the chunked loss give the gradients of one process.

The configurations that ship in ``examples/`` are read by Accelerate as ``accelerate launch`` reads them.
"""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from accelerate import FullyShardedDataParallelPlugin
from accelerate.commands.config.config_args import load_config_from_file
from ranks import Ranks
from tiny_models import VOCABULARY, random_tokens, tiny_model
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from modeling_longnet import head_loss, sequence_tiles


@pytest.fixture(scope="module")
def two_ranks():
    ranks = Ranks(2)
    yield ranks
    ranks.close()


def trained(tied: bool):
    """Build the same model on every rank, with stretches shorter than the rows; its loss is the sum over rows."""
    sequence_tiles.TILE_TOKENS, head_loss.CHUNK_LOGITS = 16, 16 * VOCABULARY
    model = tiny_model("retrofit", tie_word_embeddings=tied)
    if hasattr(model, "activation_checkpointing_enable"):
        model.activation_checkpointing_enable()
    else:
        model.gradient_checkpointing_enable()
    return model.train()


def shard_and_compare(tied: bool) -> None:
    tokens = random_tokens(2, 70)
    alone = trained(tied)
    alone(tokens, labels=tokens, use_cache=False).loss.backward()
    expected = {name: p.grad for name, p in alone.named_parameters()}

    model = trained(tied)
    mesh = init_device_mesh("cpu", (2,))
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    own = tokens[dist.get_rank() :][:1]
    for _ in range(2):  # the second step finds gradients and shards as the first left them
        model.zero_grad()
        model(own, labels=own, use_cache=False).loss.backward()
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.grad.full_tensor(), expected[name], msg=name)
    assert sum(p.to_local().numel() for p in model.parameters()) < sum(p.numel() for p in alone.parameters())


@pytest.mark.skipif(not dist.is_available(), reason="torch was built without distributed")
@pytest.mark.parametrize("tied", [False, True])
def test_sharded_gradients_are_those_of_one_process(two_ranks, tied):
    two_ranks.run(shard_and_compare, tied)


@pytest.mark.parametrize("backbone", ["llama", "magneto"])
def test_accelerate_finds_the_layers_to_shard(backbone):
    model = tiny_model(backbone=backbone)
    plugin = FullyShardedDataParallelPlugin(fsdp_version=2, auto_wrap_policy="transformer_based_wrap")
    plugin.set_auto_wrap_policy(model)
    wrapped = [name for name, module in model.named_modules() if plugin.auto_wrap_policy(module, False, 0)]
    assert wrapped == ["model.layers.0", "model.layers.1"]


CONFIGURATIONS = sorted((Path(__file__).parents[1] / "examples").glob("accelerate_*.yaml"))


@pytest.mark.parametrize("path", CONFIGURATIONS, ids=lambda path: path.stem)
def test_shipped_configurations_are_accelerates(path):
    config = load_config_from_file(str(path))
    assert config.mixed_precision == "bf16"
    if "fsdp" in path.stem:
        assert config.fsdp_config["fsdp_version"] == 2
        assert config.fsdp_config["fsdp_activation_checkpointing"] is False
    else:
        assert config.deepspeed_config["zero_stage"] == int(path.stem[-1])


def test_three_configurations_ship():
    assert [path.stem for path in CONFIGURATIONS] == ["accelerate_fsdp2", "accelerate_zero2", "accelerate_zero3"]
