"""Training a model: the loss without logits, tiles and checkpoints together, and what they cost in memory."""

import pytest
import torch
import torch.nn.functional as F
from matmul_flops import MatmulFlops
from peak_bytes import TensorWatch
from peft import LoraConfig, get_peft_model
from tiny_models import VOCABULARY, checkpointed, left_padding, random_tokens, tiny_config, tiny_model
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from modeling_longnet import (
    LongNetForCausalLM,
    LongNetForQuestionAnswering,
    LongNetForSequenceClassification,
    LongNetForTokenClassification,
    LongNetTrainer,
    head_loss,
    sequence_tiles,
)
from modeling_longnet.configuration_longnet import LOSS_IMPLEMENTATIONS
from modeling_longnet.head_loss import _IMPLEMENTATIONS


@pytest.fixture
def small_stretches(monkeypatch):
    """Let tiles and chunks be shorter than the tests' sequences."""
    monkeypatch.setattr(sequence_tiles, "TILE_TOKENS", 16)
    monkeypatch.setattr(head_loss, "CHUNK_LOGITS", 16 * VOCABULARY)


def gradients(model, **inputs) -> list[torch.Tensor]:
    model.zero_grad()
    output = model(use_cache=False, **inputs)
    output.loss.backward()
    return [output.loss.detach().double(), *(p.grad.clone() for p in model.parameters())]


def plain_gradients(model, labels: torch.Tensor, **inputs) -> list[torch.Tensor]:
    """The same from all logits at once, in float64, with nothing tiled, chunked or recomputed."""
    model.eval().zero_grad()
    logits = model(use_cache=False, **inputs).logits[:, :-1].flatten(0, 1)
    loss = F.cross_entropy(logits, labels[:, 1:].flatten())
    loss.backward()
    return [loss.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]


@pytest.mark.parametrize("preset", ["paper", "retrofit"])
@pytest.mark.parametrize("backbone", ["llama", "magneto"])
@pytest.mark.parametrize("options", [{}, {"every_n_layers": 2}], ids=str)
def test_checkpoints_tiles_and_the_chunked_loss_change_no_gradient(preset, backbone, options, small_stretches):
    fields = {"xpos": False} if backbone == "magneto" else {}
    model, tokens = tiny_model(preset, backbone=backbone, **fields), random_tokens(2, 70)
    mask = left_padding(0, 9, length=70)
    labels = tokens.masked_fill(mask == 0, -100)
    inputs = {"input_ids": tokens, "attention_mask": mask, "labels": labels}
    expected = plain_gradients(model, **inputs)
    torch.testing.assert_close(gradients(checkpointed(model, **options), **inputs), expected)


@pytest.mark.gpu
@pytest.mark.parametrize("offload", [False, True])
def test_on_a_gpu_checkpoints_tiles_and_the_chunked_loss_change_no_gradient(offload, small_stretches):
    model, tokens = tiny_model("retrofit").cuda(), random_tokens(2, 70).cuda()
    expected = plain_gradients(model, tokens, input_ids=tokens)
    found = gradients(checkpointed(model, offload=offload), input_ids=tokens, labels=tokens)
    torch.testing.assert_close(found, expected)


def test_packed_documents_train_as_they_do_alone(small_stretches):
    model = checkpointed(tiny_model("retrofit"))
    documents = [random_tokens(1, n, seed=n) for n in (50, 3, 41)]
    packed = torch.cat(documents, dim=1)
    positions = torch.cat([torch.arange(d.shape[1]) for d in documents])[None]
    labels = packed.clone()
    labels[positions == 0] = -100
    together = gradients(model, input_ids=packed, position_ids=positions, labels=labels, num_items_in_batch=91)
    alone = [gradients(model, input_ids=d, labels=d, num_items_in_batch=91) for d in documents]
    torch.testing.assert_close(together, [sum(g) for g in zip(*alone)])


def test_training_returns_the_loss_alone_and_evaluation_the_logits_too():
    model, tokens = tiny_model(), random_tokens(2, 20)
    with_logits = model.eval()(tokens, labels=tokens)
    assert with_logits.logits.shape == (2, 20, VOCABULARY)
    alone = model.train()(tokens, labels=tokens)
    assert alone.logits is None
    torch.testing.assert_close(alone.loss.float(), with_logits.loss)
    assert model(tokens).logits.shape == (2, 20, VOCABULARY)
    (loss,) = model(tokens, labels=tokens, use_cache=False, return_dict=False)
    torch.testing.assert_close(loss, alone.loss)


def test_skip_logits_decides_for_one_call():
    model, tokens = tiny_model(), random_tokens(1, 20)
    assert model.eval()(tokens, labels=tokens, skip_logits=True).logits is None
    assert model.train()(tokens, labels=tokens, skip_logits=False).logits is not None
    assert model.eval()(tokens, skip_logits=True).logits is not None, "without labels logits are all there is"


def test_the_implementation_is_a_field_of_the_config():
    assert set(LOSS_IMPLEMENTATIONS) == {*_IMPLEMENTATIONS, "logits"}
    model, tokens = tiny_model(loss_implementation="logits").train(), random_tokens(1, 20)
    assert model(tokens, labels=tokens).logits is not None
    assert model(tokens, labels=tokens, skip_logits=True).logits is None
    with pytest.raises(ValueError, match="loss_implementation must be one of .*, got 'fused'"):
        tiny_config(loss_implementation="fused")
    with pytest.raises(ValueError, match='"liger"'):
        tiny_model(loss_implementation="liger").train()(tokens, labels=tokens)


def test_items_shifted_labels_and_smoothing_reach_the_loss_with_and_without_logits():
    model, tokens = tiny_model(), random_tokens(2, 20)
    logits = model(tokens).logits
    targets = torch.cat([tokens[:, 1:], torch.full((2, 1), -100)], dim=1)
    expected = F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), label_smoothing=0.2, reduction="sum")
    for mode in (True, False):
        model.train(mode)
        for given in ({"labels": tokens}, {"labels": tokens, "shift_labels": targets}, {"shift_labels": targets}):
            loss = model(tokens, num_items_in_batch=7, label_smoothing=0.2, **given).loss
            torch.testing.assert_close(loss.float(), expected / 7, msg=f"{mode} {list(given)}")


def test_a_loss_function_of_the_users_own_gets_logits():
    model, tokens = tiny_model().train(), random_tokens(1, 20)
    model.loss_function = lambda logits, labels, **kwargs: logits[..., 0].sum() + labels.sum()
    output = model(tokens, labels=tokens)
    torch.testing.assert_close(output.loss, output.logits[..., 0].sum() + tokens.sum())


def arguments(folder, **options) -> TrainingArguments:
    return TrainingArguments(
        output_dir=str(folder), use_cpu=True, report_to="none", save_strategy="no", disable_tqdm=True,
        dataloader_pin_memory=False, **options,
    )  # fmt: skip


def test_metrics_get_their_logits(tmp_path):
    model, tokens = tiny_model().float(), random_tokens(4, 20)
    rows = [{"input_ids": row, "labels": row} for row in tokens]
    seen = []

    def metrics(prediction):
        seen.append(prediction.predictions.shape)
        return {}

    trainer = Trainer(model, arguments(tmp_path), eval_dataset=rows, compute_metrics=metrics)
    trainer.evaluate()
    assert seen == [(4, 20, VOCABULARY)]


def test_evaluating_the_loss_alone_makes_no_logits(tmp_path, small_stretches):
    tokens = random_tokens(1, 200)
    trainer = LongNetTrainer(
        tiny_model().float(), arguments(tmp_path), eval_dataset=[{"input_ids": tokens[0], "labels": tokens[0]}]
    )
    with TensorWatch() as watch:
        loss = trainer.evaluate()["eval_loss"]
    assert watch.largest < 200 * VOCABULARY
    assert loss == pytest.approx(trainer.model(tokens, labels=tokens).loss.item(), rel=1e-5)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # peft reads it
@pytest.mark.parametrize("lora", [False, True], ids=["plain", "lora"])
@pytest.mark.parametrize("trainer_class", [Trainer, LongNetTrainer])
def test_label_smoothing_is_the_same_in_both_trainers(trainer_class, lora, tmp_path, small_stretches):
    model, tokens = tiny_model("paper").float().train(), random_tokens(2, 40)
    if lora:
        model = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", init_lora_weights=False))
    trainer = trainer_class(model, arguments(tmp_path, label_smoothing_factor=0.1))
    with TensorWatch() as watch:
        loss = trainer.compute_loss(model, {"input_ids": tokens, "labels": tokens})
    logits = model(tokens).logits[:, :-1].flatten(0, 1)
    torch.testing.assert_close(loss, F.cross_entropy(logits, tokens[:, 1:].flatten(), label_smoothing=0.1))
    # The stock Trainer smooths from all logits; ours leaves it to the chunked loss.
    assert (watch.largest >= 2 * 40 * VOCABULARY) == (trainer_class is Trainer)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # peft reads it
@pytest.mark.parametrize("lora", [False, True], ids=["plain", "lora"])
@pytest.mark.parametrize(
    ("model_class", "task_type", "labels"),
    [
        (LongNetForCausalLM, "CAUSAL_LM", {"labels": random_tokens(2, 40)}),
        (LongNetForSequenceClassification, "SEQ_CLS", {"labels": torch.tensor([0, 2])}),
        (LongNetForTokenClassification, "TOKEN_CLS", {"labels": random_tokens(2, 40) % 3}),
        (
            LongNetForQuestionAnswering,
            "QUESTION_ANS",
            {n: torch.tensor([3, 9]) for n in ("start_positions", "end_positions")},
        ),
    ],
)
def test_every_head_trains_and_evaluates_on_smoothed_labels_as_with_the_stock_trainer(
    model_class, task_type, labels, lora, tmp_path
):
    model = tiny_model("paper", model_class, num_labels=3, classifier_dropout=0.0).float()
    if lora:
        model = get_peft_model(model, LoraConfig(task_type=task_type, init_lora_weights=False))
    inputs = {"input_ids": random_tokens(2, 40, seed=1), **labels}
    rows = [{name: x[i] for name, x in inputs.items()} for i in range(2)]
    losses = {}
    for trainer_class, factor in ((Trainer, 0.3), (LongNetTrainer, 0.3), (LongNetTrainer, 0.0)):
        trainer = trainer_class(model, arguments(tmp_path, label_smoothing_factor=factor), eval_dataset=rows)
        found = losses[trainer_class, factor] = [trainer.compute_loss(model.train(), dict(inputs)).item()]
        found.append(trainer.evaluate()["eval_loss"])
        trainer.args.prediction_loss_only = True
        found.append(trainer.evaluate()["eval_loss"])
    assert losses[LongNetTrainer, 0.3] == pytest.approx(losses[Trainer, 0.3], rel=1e-5)
    has_labels = "labels" in labels  # spans have none: transformers does not smooth them
    assert (losses[LongNetTrainer, 0.0] == pytest.approx(losses[Trainer, 0.3], rel=1e-3)) != has_labels


def products_of_a_step(model, tokens: torch.Tensor) -> int:
    """Count the operations of a training step's matrix products, the attention's own apart."""
    with MatmulFlops() as flops:
        if isinstance(model, LongNetForCausalLM):
            loss = model(tokens, labels=tokens, use_cache=False).loss
        else:
            hidden = model.model(tokens, use_cache=False).last_hidden_state
            loss = head_loss.head_loss(hidden, model.lm_head, head_loss.next_tokens(tokens))
        loss.backward()
    return flops.count


@pytest.mark.parametrize("backbone", ["llama", "magneto"])
def test_a_step_with_checkpoints_multiplies_each_weight_four_times_and_none_a_fifth(backbone, small_stretches):
    """Forward, recomputation and two gradients; but the last product of a layer and the head are not recomputed."""
    model, tokens = tiny_model("retrofit", backbone=backbone), random_tokens(2, 70)
    layers = sum(p.numel() for p in model.model.layers.parameters() if p.ndim == 2)
    last = sum(layer.mlp.down_proj.weight.numel() for layer in model.model.layers)
    head = 3 * model.lm_head.weight.numel() * 2 * 69  # the last token of a row predicts nothing
    expected = 2 * ((4 * layers - last) * tokens.numel() + head)
    assert products_of_a_step(checkpointed(model), tokens) == expected
    assert products_of_a_step(tiny_model("retrofit", backbone=backbone).train(), tokens) == 2 * (
        3 * layers * tokens.numel() + head
    )


def test_a_step_multiplies_no_more_than_llamas(small_stretches):
    model, tokens = tiny_model("retrofit"), random_tokens(2, 70)
    names = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    fields = {name: getattr(model.config, name) for name in (*names, "num_key_value_heads")}
    llama = LlamaForCausalLM(LlamaConfig(**fields)).double()
    assert products_of_a_step(checkpointed(model), tokens) == products_of_a_step(checkpointed(llama), tokens)


def step_peak(length: int, layers: int = 2, **fields) -> tuple[int, int]:
    """Measure a training step's peak and largest tensor, forward and backward, in bfloat16 with checkpoints."""
    config = tiny_config(
        "retrofit", segment_lengths=(64, 128), dilation_rates=(1, 2), num_hidden_layers=layers, hidden_size=32,
        **fields,
    )  # fmt: skip
    model = checkpointed(LongNetForCausalLM(config).to(torch.bfloat16))
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    tokens = random_tokens(1, length)
    with TensorWatch() as watch:
        model(tokens, labels=tokens, use_cache=False).loss.backward()
    return watch.peak_bytes, watch.largest


def test_memory_does_not_depend_on_vocabulary_or_mlp_and_one_more_layer_costs_its_input(monkeypatch):
    monkeypatch.setattr(sequence_tiles, "TILE_TOKENS", 64)
    length, hidden_bytes = 4096, 2 * 32
    base = {"intermediate_size": 48, "vocab_size": VOCABULARY}
    monkeypatch.setattr(head_loss, "CHUNK_LOGITS", 64 * VOCABULARY)
    peak, _ = step_peak(length, **base)
    deeper, _ = step_peak(length, layers=6, **base)
    assert deeper - peak == pytest.approx(4 * length * hidden_bytes, rel=0.1)
    wide, _ = step_peak(length, **{**base, "intermediate_size": 480})
    assert wide - peak < 0.1 * peak + 12 * 64 * 480 * 2
    monkeypatch.setattr(head_loss, "CHUNK_LOGITS", 64 * 20 * VOCABULARY)
    large, largest = step_peak(length, **{**base, "vocab_size": 20 * VOCABULARY})
    assert largest < length * 20 * VOCABULARY / 10
    assert large - peak < 0.5 * peak


def test_peak_memory_per_token_is_what_the_readme_says(monkeypatch):
    """One hidden state per layer, and 20 for the layer at work (16 with dilated queries), with the torch backend."""
    monkeypatch.setattr(sequence_tiles, "TILE_TOKENS", 64)
    monkeypatch.setattr(head_loss, "CHUNK_LOGITS", 64 * VOCABULARY)
    short, _ = step_peak(2048)
    long, _ = step_peak(8192)
    hidden_states_per_token = (long - short) / (8192 - 2048) / (2 * 32)
    assert 20 < hidden_states_per_token < 2 + 21


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # peft reads it
def test_lora_trains_through_tiles_and_checkpoints(small_stretches):
    model = tiny_model("retrofit")
    adapted = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear")).double()
    tokens = random_tokens(1, 70)
    trainable = [p for p in adapted.parameters() if p.requires_grad]
    expected = plain_gradients(adapted, tokens, input_ids=tokens)[1:]
    checkpointed(adapted).zero_grad()
    adapted(input_ids=tokens, labels=tokens, use_cache=False).loss.backward()
    torch.testing.assert_close([p.grad for p in trainable], expected)
    assert all(p.grad is None for p in adapted.parameters() if not p.requires_grad)
