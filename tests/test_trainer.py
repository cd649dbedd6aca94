"""Training: the stock Trainer, LoRA by default targets, and what LongNetTrainer refuses."""

import pytest
import torch
import torch.nn.functional as F
from peft import CPTConfig, LoraConfig, PrefixTuningConfig, get_peft_model
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.utils import constants as peft_constants
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


@pytest.mark.filterwarnings("ignore:.*nan:UserWarning")
@pytest.mark.parametrize("trainer_class", [Trainer, LongNetTrainer])
def test_a_batch_without_a_label_leaves_the_weights_numbers(trainer_class, tmp_path):
    rows = repeated_rows(3, 20)
    rows[0] = {"input_ids": rows[0]["input_ids"], "labels": torch.full((20,), -100)}
    model = tiny_model("retrofit").float()
    options = {"per_device_train_batch_size": 1, "num_train_epochs": 1}
    trainer_class(model, arguments(tmp_path, **options), train_dataset=rows).train()
    assert all(p.isfinite().all() for p in model.parameters())


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


# Methods of PEFT that find their modules by the model's type, or add tokens, with what they want besides.
METHODS = {
    "ADALORA": {"total_step": 10},
    "C3A": {"block_size": 8},
    "FOURIERFT": {"n_frequency": 20},
    "HRA": {},
    "IA3": {},
    "LN_TUNING": {},
    "LOHA": {},
    "LOKR": {},
    "LORA": {"use_dora": True},
    "OFT": {},
    "POLY": {"r": 2, "n_tasks": 1, "n_skills": 1},
    "PROMPT_TUNING": {"num_virtual_tokens": 4},
    "P_TUNING": {"num_virtual_tokens": 4},
    "RANDLORA": {},
    "VBLORA": {"vector_length": 16, "num_vectors": 8},
    "VERA": {},
}


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # peft reads it
@pytest.mark.filterwarnings("ignore:Unsupported layer type:UserWarning")  # what peft says of every norm
@pytest.mark.parametrize("backbone", ["llama", "magneto"])
@pytest.mark.parametrize("method", METHODS)
def test_peft_trains_without_being_told_the_modules(method, backbone):
    config_class = {kind.value: config for kind, config in PEFT_TYPE_TO_CONFIG_MAPPING.items()}[method]
    model, tokens = tiny_model("retrofit", backbone=backbone).float(), random_tokens(1, 40)
    adapted = get_peft_model(model, config_class(task_type="CAUSAL_LM", **METHODS[method])).train()
    trainable = [p for p in adapted.parameters() if p.requires_grad]
    before = [p.detach().clone() for p in trainable]
    options = {"task_ids": torch.tensor([0])} if method == "POLY" else {}
    adapted(input_ids=tokens, labels=tokens, **options).loss.backward()
    torch.optim.SGD(trainable, lr=0.1).step()
    assert any(not torch.equal(p, old) for p, old in zip(trainable, before))


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # peft reads it
def test_context_aware_prompt_tuning_reads_logits_which_the_config_has_it_get():
    tokens = random_tokens(1, 40)
    config = CPTConfig(task_type="CAUSAL_LM", cpt_token_ids=[3, 4], cpt_mask=[1, 1], cpt_tokens_type_mask=[1, 1])
    adapted = get_peft_model(tiny_model(loss_implementation="logits").float(), config).train()
    adapted(input_ids=tokens, labels=tokens).loss.backward()
    assert all(p.grad is not None for p in adapted.parameters() if p.requires_grad)


def test_every_table_of_peft_that_knows_llama_knows_longnet():
    tables = {name: x for name, x in vars(peft_constants).items() if isinstance(x, dict) and "llama" in x}
    assert len(tables) > 10
    for name, targets in tables.items():
        own = ["q_proj", "k_proj", "v_proj", "o_proj"] if name.endswith("_TO_LORA_TARGET_MODULES_MAPPING") else None
        assert targets["longnet"] == (own or targets["llama"]), name


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # peft reads it
def test_prefix_tuning_is_refused_for_the_cache_that_it_brings():
    adapted = get_peft_model(tiny_model().float(), PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4))
    with pytest.raises(ValueError, match="LongNet needs a LongNetCache, got DynamicCache"):
        adapted(input_ids=random_tokens(1, 40))


def test_the_trainer_refuses_other_models(tmp_path):
    llama = LlamaForCausalLM(
        LlamaConfig(vocab_size=9, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)
    )
    with pytest.raises(ValueError, match="needs a LongNet model, got LlamaForCausalLM"):
        LongNetTrainer(llama, arguments(tmp_path))
