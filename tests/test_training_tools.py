"""The tools around a model: TRL, LoRA with embeddings, and perplexity by position."""

import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from tiny_models import VOCABULARY, checkpointed, random_tokens, tiny_model
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedTokenizerFast

from modeling_longnet import head_loss, sequence_tiles
from modeling_longnet.head_loss import next_tokens, token_losses
from training import offload_checkpoints
from training.checkpoint_offload import HostCheckpoints
from training.perplexity import PerplexityByPosition


# Runs a script as if no tracker were installed, whatever is.
WITHOUT_TRACKERS = """
import importlib.util, runpy, sys
find = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name in ("tensorboard", "trackio") else find(name, *rest)
sys.argv = {0!r}
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def test_perplexity_by_position_is_the_mean_of_the_losses_there():
    metric = PerplexityByPosition([2, 5])
    metric.add_batch(predictions=[[1.0, 2.0, 3.0], [4.0, 5.0]], references=[[0, 1, 2], [4, -100]])
    metric.add_batch(predictions=[[7.0]], references=[[9]])
    found = metric.compute()
    assert found == pytest.approx(
        {
            "perplexity": math.exp((1 + 2 + 3 + 4 + 7) / 5), "perplexity_0_2": math.exp(1.5),
            "perplexity_2_5": math.exp(3.5), "perplexity_5_": math.exp(7),
        }
    )  # fmt: skip
    with pytest.raises(ValueError, match=r"edges must be positive and ascend, got \[5, 2\]"):
        PerplexityByPosition([5, 2])


def test_perplexity_of_a_model_is_that_of_its_logits():
    model, tokens = tiny_model().float(), random_tokens(2, 40)
    hidden = model.model(tokens).last_hidden_state
    targets = next_tokens(tokens)
    losses = token_losses(hidden, model.lm_head, targets)
    positions = torch.arange(40).expand(2, -1).masked_fill(targets == -100, -100)
    metric = PerplexityByPosition([20])
    metric.add_batch(predictions=losses.tolist(), references=positions.tolist())
    found = metric.compute()
    exact = F.cross_entropy(model(tokens).logits[:, :-1].transpose(1, 2), tokens[:, 1:], reduction="none")
    assert found["perplexity"] == pytest.approx(exact.mean().exp().item(), rel=1e-5)
    assert found["perplexity_20_"] == pytest.approx(exact[:, 20:].mean().exp().item(), rel=1e-5)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # peft reads it
@pytest.mark.parametrize("tied", [False, True])
def test_embeddings_and_norms_train_beside_lora(tied, tmp_path, monkeypatch):
    model = tiny_model("retrofit", tie_word_embeddings=tied).float()
    modules = ["embed_tokens", "norm", "input_layernorm", "post_attention_layernorm"]
    config = LoraConfig(task_type="CAUSAL_LM", modules_to_save=modules, ensure_weight_tying=tied)
    adapted = get_peft_model(model, config).train()
    trainable = {name for name, p in adapted.named_parameters() if p.requires_grad}
    for part in ("lora_A", "embed_tokens", "model.norm.", "input_layernorm", "post_attention_layernorm"):
        assert any(part in name for name in trainable), part
    assert not any("mlp" in name or "q_proj.base_layer" in name for name in trainable)
    tokens = random_tokens(1, 40)
    monkeypatch.setattr(head_loss, "CHUNK_LOGITS", 8 * VOCABULARY)
    rows = []
    handle = adapted.base_model.model.lm_head.register_forward_hook(lambda _, inputs, output: rows.append(len(output)))
    optimizer = torch.optim.SGD([p for p in adapted.parameters() if p.requires_grad], lr=0.1)
    adapted(input_ids=tokens, labels=tokens).loss.backward()
    assert all(p.grad is not None for name, p in adapted.named_parameters() if name in trainable)
    handle.remove()
    assert rows == [8, 8, 8, 8, 7], "logits of a chunk at a time"
    optimizer.step()
    adapted.eval()
    expected = adapted(input_ids=tokens).logits
    merged = adapted.merge_and_unload()
    merged.save_pretrained(tmp_path)
    loaded = type(merged).from_pretrained(tmp_path)
    torch.testing.assert_close(loaded(tokens).logits, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning", "ignore::UserWarning")
def test_qlora_trains_through_tiles_and_chunks(tmp_path, monkeypatch):
    pytest.importorskip("bitsandbytes")
    monkeypatch.setattr(sequence_tiles, "TILE_TOKENS", 16)
    monkeypatch.setattr(head_loss, "CHUNK_LOGITS", 16 * VOCABULARY)
    fields = {"hidden_size": 64, "intermediate_size": 128, "initializer_range": 0.1}
    tiny_model("retrofit", **fields).float().save_pretrained(tmp_path)
    four_bits = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=four_bits, dtype=torch.bfloat16)
    assert type(model.model.layers[0].mlp.up_proj).__name__ == "Linear4bit"
    adapted = get_peft_model(checkpointed(model), LoraConfig(task_type="CAUSAL_LM"))
    tokens, losses = random_tokens(1, 70).to(model.device), []  # bitsandbytes puts the model where CUDA is
    optimizer = torch.optim.AdamW([p for p in adapted.train().parameters() if p.requires_grad], lr=1e-2)
    for _ in range(8):
        loss = adapted(input_ids=tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.85 * losses[0]


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning", "ignore::UserWarning")
def test_trl_fine_tunes_with_packing(tmp_path):
    trl = pytest.importorskip("trl")
    import datasets

    words = {f"w{i}": i for i in range(VOCABULARY)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w1"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="w2", pad_token="w0")
    text = " ".join(f"w{i}" for i in random_tokens(1, 60)[0].tolist())
    arguments = trl.SFTConfig(
        str(tmp_path), max_steps=8, per_device_train_batch_size=1, learning_rate=2e-2, report_to="none", use_cpu=True,
        save_strategy="no", logging_steps=1, max_length=128, bf16=False, packing=True, dataloader_pin_memory=False,
        disable_tqdm=True,
    )  # fmt: skip
    trainer = trl.SFTTrainer(
        tiny_model("retrofit", initializer_range=0.1).float(), arguments, processing_class=tokenizer,
        train_dataset=datasets.Dataset.from_dict({"text": [text] * 16}), peft_config=LoraConfig(task_type="CAUSAL_LM"),
    )  # fmt: skip
    trainer.train()
    losses = [float(entry["loss"]) for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < 0.9 * losses[0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--qlora"], "--qlora holds the weights of --model in 4 bits; give --model"),
        (["--log-with", "tensorboard"], "needs the package; pip install tensorboard"),
        (["--log-with", "trackio"], "needs the package; pip install trackio"),
    ],
    ids=str,
)
def test_the_accelerate_loop_does_not_ignore_what_it_cannot_do(options, message, tmp_path):
    example = Path(__file__).parents[1] / "examples" / "finetune_accelerate.py"
    environment = {**os.environ, "PYTHONPATH": str(example.parents[1])}
    command = [sys.executable, "-c", WITHOUT_TRACKERS.format([str(example), *options])]
    finished = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=200)
    assert finished.returncode == 2
    assert message in finished.stderr


def test_offloading_needs_checkpoints():
    with pytest.raises(ValueError, match="call activation_checkpointing_enable"):
        offload_checkpoints(tiny_model())


@pytest.mark.parametrize("layers", [-1, 3])
def test_offloading_refuses_layers_that_there_are_not(layers):
    model = checkpointed(tiny_model(num_hidden_layers=2))
    with pytest.raises(ValueError, match=f"layers must be from 0 to 2, the layers that checkpoint, got {layers}"):
        offload_checkpoints(model, layers)


def test_offloading_takes_the_first_layers_checkpoints_and_nothing_else(monkeypatch):
    stored, fetched = [], []
    monkeypatch.setattr(HostCheckpoints, "store", lambda self, x: stored.append(x) or len(stored) - 1)
    monkeypatch.setattr(HostCheckpoints, "fetch", lambda self, i: fetched.append(i) or stored[i])
    model, tokens = checkpointed(tiny_model("retrofit", num_hidden_layers=5)), random_tokens(1, 30)
    model(tokens, labels=tokens).loss.backward()
    expected = [p.grad.clone() for p in model.parameters()]
    offload_checkpoints(model, 3)
    model.zero_grad()
    model(tokens, labels=tokens).loss.backward()
    torch.testing.assert_close([p.grad for p in model.parameters()], expected, rtol=0, atol=0)
    hidden = [i for i, x in enumerate(stored) if x.shape == (1, 30, 32)]
    assert len(hidden) == 3, "one hidden state per layer"
    assert [i for i in fetched if i in hidden] == hidden[::-1]
    assert sum(x.numel() for x in stored) == 3 * 30 * 32


@pytest.mark.gpu
@pytest.mark.parametrize("layers", [None, 2])
def test_on_a_gpu_offloaded_checkpoints_leave_it_and_come_back(layers):
    model = checkpointed(tiny_model("retrofit", num_hidden_layers=6).float().cuda())
    tokens = random_tokens(1, 20_000).cuda()

    def step() -> tuple[dict, int]:
        model.zero_grad()
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        loss = model(tokens, labels=tokens).loss
        torch.cuda.synchronize()
        kept = torch.cuda.memory_allocated() - before
        loss.backward()
        return {name: p.grad.clone() for name, p in model.named_parameters()}, kept

    def equal(found: dict) -> bool:
        # PyTorch's own gradient of an embedding differs from one call to the next where tokens repeat this often.
        torch.testing.assert_close(found[embedding], expected[embedding], rtol=1e-4, atol=1e-6)
        return all(torch.equal(found[name], expected[name]) for name in expected if name != embedding)

    expected, _ = step()  # the first step also allocates cuBLAS's workspace
    (embedding,) = [name for name in expected if "embed_tokens" in name]
    again, kept = step()
    assert equal(again), "two steps without offloading differ"
    offload_checkpoints(model, layers)
    for _ in range(2):
        found, kept_now = step()
        assert equal(found)
    assert kept - kept_now == pytest.approx((layers or 6) * 20_000 * 32 * 4, rel=0.1)
