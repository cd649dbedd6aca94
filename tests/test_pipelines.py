"""Converted checkpoints in transformers' own tools: pipelines, chat templates, offloading, compiling, safe files only."""

import pytest
import torch
from checkpoints import CHAT_TEMPLATE, make_checkpoint
from tiny_models import random_tokens, tiny_model
from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline

from conversion import convert_checkpoint
from modeling_longnet import LongNetForCausalLM, LongNetForSequenceClassification


PROMPTS = ["def main(", "import os\nimport sys\n\n\ndef read(path):\n    return open(path).read()", "x"]
OPTIONS = {"max_new_tokens": 12, "do_sample": False, "return_full_text": False}


@pytest.fixture(scope="module")
def converted(tmp_path_factory):
    """A converted checkpoint whose first segment is shorter than the longest prompt."""
    folder = tmp_path_factory.mktemp("tools")
    make_checkpoint(folder / "llama", max_position_embeddings=256)
    convert_checkpoint(
        folder / "llama", folder / "longnet", segment_lengths=(16, 32), dilation_rates=(1, 2), progress=False
    )
    return folder / "longnet"


def test_a_text_generation_pipeline_gives_what_generate_gives(converted):
    generator = pipeline("text-generation", model=str(converted))
    assert isinstance(generator.model, LongNetForCausalLM)
    tokenizer, model = generator.tokenizer, generator.model
    for prompt in PROMPTS:
        tokens = tokenizer(prompt, return_tensors="pt")
        generated = model.generate(**tokens, max_new_tokens=12, do_sample=False)[0, tokens.input_ids.shape[1] :]
        expected = tokenizer.decode(generated, skip_special_tokens=True)
        assert generator(prompt, **OPTIONS)[0]["generated_text"] == expected


def test_a_left_padded_batch_gives_each_prompts_own_continuation(converted):
    generator = pipeline("text-generation", model=str(converted))
    generator.tokenizer.pad_token = generator.tokenizer.eos_token
    generator.tokenizer.padding_side = "left"
    lengths = {len(generator.tokenizer(prompt).input_ids) for prompt in PROMPTS}
    assert len(lengths) == len(PROMPTS) and max(lengths) > 32  # past the last segment
    alone = [generator(prompt, **OPTIONS) for prompt in PROMPTS]
    assert generator(PROMPTS, batch_size=len(PROMPTS), **OPTIONS) == alone


def test_the_chat_template_is_carried_and_used_by_the_pipeline(converted):
    messages = [{"role": "user", "content": "Which files are open?"}]
    tokenizer = AutoTokenizer.from_pretrained(converted)
    assert tokenizer.chat_template == CHAT_TEMPLATE
    text = tokenizer.apply_chat_template(messages, tokenize=False)
    assert text == "<|user|>Which files are open?</s>"
    generator = pipeline("text-generation", model=str(converted))
    answer = generator(messages, max_new_tokens=8, do_sample=False)[0]["generated_text"][-1]
    prompt = tokenizer(text, add_special_tokens=False, return_tensors="pt")
    tokens = generator.model.generate(**prompt, max_new_tokens=8, do_sample=False)[0, prompt.input_ids.shape[1] :]
    assert answer == {"role": "assistant", "content": tokenizer.decode(tokens, skip_special_tokens=True)}


def test_the_text_classification_pipeline_labels_text(converted, tmp_path):
    model = LongNetForSequenceClassification.from_pretrained(converted, num_labels=3)
    model.config.pad_token_id = 1
    classifier = pipeline("text-classification", model=model, tokenizer=AutoTokenizer.from_pretrained(converted))
    with torch.no_grad():
        logits = model(**classifier.tokenizer(PROMPTS[1], return_tensors="pt")).logits[0]
    best = classifier(PROMPTS[1])[0]
    assert best["label"] == f"LABEL_{int(logits.argmax())}"
    assert best["score"] == pytest.approx(float(logits.softmax(-1).max()), rel=1e-5)


def test_layers_offloaded_by_a_device_map_compute_the_same(converted, tmp_path):
    tokens = random_tokens(1, 90)
    model = AutoModelForCausalLM.from_pretrained(converted)
    device_map = {
        "model.embed_tokens": "cpu", "model.layers.0": "cpu", "model.layers.1": "disk", "model.norm": "cpu",
        "model.rotary_emb": "cpu", "lm_head": "cpu",
    }  # fmt: skip
    offloaded = AutoModelForCausalLM.from_pretrained(converted, device_map=device_map, offload_folder=str(tmp_path))
    assert offloaded.model.layers[1].self_attn.q_proj.weight.device.type == "meta"
    with torch.no_grad():
        torch.testing.assert_close(offloaded(tokens).logits, model(tokens).logits, rtol=0, atol=0)
    options = {"max_new_tokens": 10, "do_sample": False}
    assert offloaded.generate(tokens, **options).tolist() == model.generate(tokens, **options).tolist()
    automatic = AutoModelForCausalLM.from_pretrained(converted, device_map="auto")
    with torch.no_grad():
        expected = model.to(automatic.device)(tokens.to(automatic.device)).logits
        torch.testing.assert_close(automatic(tokens.to(automatic.device)).logits, expected, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("device", "beyond"), [("cpu", "disk"), pytest.param(0, "cpu", marks=pytest.mark.gpu)], ids=["cpu", "gpu"]
)
def test_what_exceeds_a_devices_memory_goes_to_the_next(converted, tmp_path, device, beyond):
    tokens = random_tokens(1, 90)
    model = AutoModelForCausalLM.from_pretrained(converted)
    layer_bytes = sum(p.numel() * p.element_size() for p in model.model.layers[0].parameters())
    whole = sum(p.numel() * p.element_size() for p in model.parameters())
    memory = {device: whole - layer_bytes // 2} | ({"cpu": "4GiB"} if beyond == "cpu" else {})
    split = AutoModelForCausalLM.from_pretrained(
        converted, device_map="auto", max_memory=memory, offload_folder=str(tmp_path)
    )
    layers = [split.hf_device_map.get(f"model.layers.{i}") for i in range(len(model.model.layers))]
    assert layers[0] == device and layers[-1] == beyond, split.hf_device_map
    with torch.no_grad():
        torch.testing.assert_close(split(tokens).logits.cpu(), model(tokens).logits, rtol=1e-4, atol=1e-4)
    options = {"max_new_tokens": 10, "do_sample": False}
    assert split.generate(tokens.to(split.device), **options).tolist() == model.generate(tokens, **options).tolist()


def test_no_decoder_layer_is_split_between_devices():
    for backbone in ("llama", "magneto"):
        model = tiny_model(backbone=backbone)
        assert {type(layer).__name__ for layer in model.model.layers} <= set(model._no_split_modules)


@pytest.mark.parametrize("suffix", [".bin", ".pt", ".pkl"])
def test_a_checkpoint_holds_safe_files_only(converted, suffix, tmp_path):
    AutoModelForCausalLM.from_pretrained(converted).save_pretrained(tmp_path)
    for folder in (converted, tmp_path):
        assert list(folder.rglob(f"*{suffix}")) == []
        assert list(folder.glob("*.safetensors"))
