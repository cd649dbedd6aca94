"""Training: the stock Trainer, LoRA by default targets, and what LongNetTrainer refuses."""

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from tiny_models import VOCABULARY, random_tokens, tiny_model
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from modeling_longnet import LongNetForCausalLM, LongNetTrainer


def arguments(folder, **options) -> TrainingArguments:
    return TrainingArguments(
        output_dir=str(folder),
        **{
            "per_device_train_batch_size": 2,
            "learning_rate": 1e-2,
            "use_cpu": True,
            "report_to": "none",
            "save_strategy": "no",
            "disable_tqdm": True,
            "dataloader_pin_memory": False,
            **options,
        },
    )


def repeated_rows(rows: int, length: int) -> list[dict]:
    tokens = random_tokens(1, length)[0]
    return [{"input_ids": tokens, "labels": tokens} for _ in range(rows)]


@pytest.mark.parametrize("trainer_class", [Trainer, LongNetTrainer])
def test_training_lowers_the_loss_and_the_result_loads(trainer_class, tmp_path):
    model = tiny_model("retrofit", initializer_range=0.1).float()
    trainer = trainer_class(
        model, arguments(tmp_path, max_steps=12, logging_steps=1), train_dataset=repeated_rows(24, 70)
    )
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0] / 2
    trainer.save_model(tmp_path / "saved")
    loaded, tokens = AutoModelForCausalLM.from_pretrained(tmp_path / "saved"), random_tokens(1, 70)
    assert type(loaded) is LongNetForCausalLM
    torch.testing.assert_close(loaded(tokens).logits, model.eval()(tokens).logits)


def test_mixed_precision_training_lowers_the_loss(tmp_path):
    model = tiny_model("retrofit", initializer_range=0.1).float()
    trainer = Trainer(
        model, arguments(tmp_path, max_steps=12, logging_steps=1, bf16=True), train_dataset=repeated_rows(24, 70)
    )
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0] / 2
    assert {p.dtype for p in model.parameters()} == {torch.float32}


def test_gradient_accumulation_weighs_every_token_the_same(tmp_path):
    rows = []
    for length, seed in ((20, 0), (50, 1), (9, 2), (33, 3)):  # different numbers of labels per micro-batch
        tokens = random_tokens(1, 50, seed=seed)[0]
        labels = tokens.clone()
        labels[length:] = -100
        rows.append({"input_ids": tokens, "labels": labels})
    weights = []
    for batch, accumulation in ((4, 1), (1, 4)):
        model = tiny_model("paper").float()
        options = {
            "per_device_train_batch_size": batch,
            "gradient_accumulation_steps": accumulation,
            "optim": "sgd",
            "max_steps": 1,
            "max_grad_norm": 0.0,
        }
        Trainer(model, arguments(tmp_path, **options), train_dataset=rows).train()
        weights.append([p.detach() for p in model.parameters()])
    for one, accumulated in zip(*weights):
        torch.testing.assert_close(accumulated, one, rtol=1e-4, atol=1e-5)


def test_label_smoothing_shifts_the_labels(tmp_path):
    # Trainer looks the class up by name; one that it does not find gets unshifted labels, silently.
    model, tokens = tiny_model("paper").float(), random_tokens(2, 30)
    trainer = Trainer(model, arguments(tmp_path, label_smoothing_factor=0.1))
    loss = trainer.compute_loss(model, {"input_ids": tokens, "labels": tokens})
    logits = model(tokens).logits[:, :-1].reshape(-1, VOCABULARY)
    expected = F.cross_entropy(logits, tokens[:, 1:].reshape(-1), label_smoothing=0.1)
    torch.testing.assert_close(loss, expected)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # peft reads it
def test_lora_needs_no_target_modules_and_merges_back(tmp_path):
    model, tokens = tiny_model("retrofit").float(), random_tokens(1, 60)
    before = model(tokens).logits
    adapted = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", init_lora_weights=False))
    trainable = {name.split(".")[-4] for name, p in adapted.named_parameters() if p.requires_grad}
    assert trainable == {"q_proj", "k_proj", "v_proj", "o_proj"}
    adapted.eval()
    expected = adapted(tokens).logits
    assert (expected - before).abs().max() > 0.1
    merged = adapted.merge_and_unload()
    merged.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    torch.testing.assert_close(loaded(tokens).logits, expected, rtol=1e-4, atol=1e-4)


def test_the_trainer_refuses_other_models(tmp_path):
    llama = LlamaForCausalLM(
        LlamaConfig(vocab_size=9, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)
    )
    with pytest.raises(ValueError, match="needs a LongNet model, got LlamaForCausalLM"):
        LongNetTrainer(llama, arguments(tmp_path))
