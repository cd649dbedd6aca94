"""DeepSpeed's ZeRO on two processes (gloo): with all that saves memory, the losses of a plain step of the same engine."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from ranks import Ranks
from tiny_models import VOCABULARY, random_tokens, tiny_model

from modeling_longnet import head_loss, sequence_tiles


TESTS = Path(__file__).parent
# DeepSpeed holds its process group to the end, and a thread of gloo that outlives the interpreter aborts the process.
RUN_SCRIPT = "import os, runpy, sys; sys.argv.pop(0); runpy.run_path(sys.argv[0], run_name='__main__'); "
RUN_SCRIPT += "sys.stdout.flush(); os._exit(0)"


@pytest.fixture(scope="module")
def two_ranks():
    pytest.importorskip("deepspeed")
    ranks = Ranks(2)
    yield ranks
    ranks.close()


def losses(stage: int, tied: bool, plain: bool) -> list[float]:
    """Train for four steps; plain: all logits at once, nothing tiled, chunked or recomputed."""
    os.environ["DS_ACCELERATOR"] = "cpu"
    import deepspeed

    sequence_tiles.TILE_TOKENS, head_loss.CHUNK_LOGITS = 16, 16 * VOCABULARY
    model = tiny_model("retrofit", tie_word_embeddings=tied).float().train()
    if plain:
        sequence_tiles.TILE_TOKENS = 10**9
        model.config.loss_implementation = "logits"
    else:
        enable = "activation_checkpointing_enable"  # what newer transformers call it
        getattr(model, enable if hasattr(model, enable) else "gradient_checkpointing_enable")()
    options = {
        "train_micro_batch_size_per_gpu": 1, "zero_allow_untested_optimizer": True,
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
    }  # fmt: skip
    deepspeed.init_distributed("gloo")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    engine, *_ = deepspeed.initialize(model=model, config=options, optimizer=optimizer)
    own = random_tokens(2, 70)[dist.get_rank() :][:1]
    found = []
    for _ in range(4):
        loss = engine(input_ids=own, labels=own, use_cache=False).loss
        engine.backward(loss)
        engine.step()
        found.append(loss.item())
    return found


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("stage", [2, 3])
def test_losses_are_those_of_a_plain_step(two_ranks, stage, tied):
    plain = two_ranks.run(losses, stage, tied, True)
    tricks = two_ranks.run(losses, stage, tied, False)
    assert len(plain) == len(tricks) == 2
    for expected, found in zip(plain, tricks, strict=True):
        assert found == pytest.approx(expected, rel=1e-5)
        assert found[-1] < 0.95 * found[0]


@pytest.mark.parametrize("stage", [2, 3])
def test_the_recipe_saves_what_is_trained_and_goes_on(stage, tmp_path):
    pytest.importorskip("deepspeed")
    configuration = {
        "train_micro_batch_size_per_gpu": 4, "gradient_accumulation_steps": 1, "zero_allow_untested_optimizer": True,
        "zero_optimization": {"stage": stage},
    }  # fmt: skip
    (tmp_path / "zero.json").write_text(json.dumps(configuration))
    environment = {
        **os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(TESTS.parent),
        "ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_CONFIG_FILE": "zero.json",
        "RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1",
    }  # fmt: skip

    def losses_of(steps: int, folder: str) -> list[float]:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            environment["MASTER_PORT"] = str(free.getsockname()[1])
        options = ["--length=128", f"--steps={steps}", f"--checkpoints={folder}"]
        script = str(TESTS.parent / "examples" / "finetune_accelerate.py")
        command = [sys.executable, "-c", RUN_SCRIPT, script, *options]
        finished = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=300)
        assert finished.returncode == 0, finished.stderr[-3000:]
        (line,) = (line for line in finished.stdout.splitlines() if line.startswith("losses: "))
        return [float(loss) for loss in line.split()[1:]]

    first = losses_of(10, "stopped")
    assert losses_of(20, "stopped") == pytest.approx(losses_of(20, "whole"), abs=2e-5)
    assert len(first) == 10
    settings = json.loads((tmp_path / "stopped" / "step_0000020" / "settings.json").read_text())
    assert (settings["distributed"], settings["step"]) == ("DEEPSPEED", 20)
    (states,) = (tmp_path / "stopped" / "step_0000020" / "pytorch_model").glob("*model_states.pt")
    names = torch.load(states, weights_only=False)["module"].keys()
    assert names and all("lora_" in name for name in names)
