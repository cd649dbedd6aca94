"""Converting checkpoints: the converted model is the source, the target appears whole or not at all."""

import contextlib
import ctypes
import dataclasses
import fcntl
import hashlib
import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from checkpoints import CONTEXT, ROPE, assert_same_bits, edit_json, make_checkpoint, stored_tensors
from huggingface_hub import ModelCard
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

import conversion.pipeline
import conversion.steps
import conversion.verify
import conversion.weights
from conversion import convert_checkpoint
from conversion.atomic_folder import atomic_folder, write_report
from conversion.plan_family import plan_conversion
from conversion.weights import copy_weights, read_header
from modeling_longnet import DilationPattern, LongNetForCausalLM


QUIET = {"progress": False}

VARIANTS = {
    "untied": {},
    "tied": {"tie_word_embeddings": True},
    "sharded": {"max_shard_size": "20KB"},
    "tied and sharded": {"tie_word_embeddings": True, "max_shard_size": "20KB"},
    "one KV head per query head": {"num_key_value_heads": 4},
    "one KV head": {"num_key_value_heads": 1},
    "biases": {"attention_bias": True, "mlp_bias": True},
    "wide heads": {"head_dim": 24},
    **{f"RoPE {name}": {"rope": name} for name in ROPE if name != "default"},
}


@pytest.fixture(scope="module")
def shared_source(tmp_path_factory) -> Path:
    """A source that tests read but never write to."""
    folder = tmp_path_factory.mktemp("shared") / "source"
    make_checkpoint(folder)
    return folder


@pytest.fixture
def source(shared_source, tmp_path) -> Path:
    """A source of the test's own, with room for the target next to it."""
    folder = tmp_path / "source"
    shutil.copytree(shared_source, folder)
    return folder


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("variant", VARIANTS)
def test_converted_logits_equal_the_sources_at_every_length_up_to_the_first_segment(tmp_path, variant):
    make_checkpoint(tmp_path / "source", **VARIANTS[variant])
    report = convert_checkpoint(tmp_path / "source", tmp_path / "target", max_position_embeddings=4 * CONTEXT, **QUIET)
    theirs = LlamaForCausalLM.from_pretrained(tmp_path / "source").eval()
    ours = AutoModelForCausalLM.from_pretrained(tmp_path / "target").eval()
    assert isinstance(ours, LongNetForCausalLM)
    first_segment = ours.config.segment_lengths[0]
    assert first_segment == (16 if "original_max_position_embeddings" in theirs.config.rope_parameters else CONTEXT)
    assert ours.config.segment_lengths[-1] == 4 * CONTEXT
    tokens = torch.randint(288, (2, first_segment), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        for length in range(1, first_segment + 1):
            expected = theirs(tokens[:, :length]).logits
            torch.testing.assert_close(ours(tokens[:, :length]).logits, expected, rtol=0, atol=1e-5)
    assert expected.abs().max() > 1
    assert report["verification"]["num_tokens"] == first_segment
    assert report["verification"]["relative_error"] < 1e-5
    assert_same_bits(stored_tensors(tmp_path / "target"), stored_tensors(tmp_path / "source"))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("max_shard_size", ["5GB", "20KB"])
def test_weights_keep_their_bits_whether_files_are_copied_or_laid_out_anew(tmp_path, dtype, max_shard_size):
    make_checkpoint(tmp_path / "source", dtype=dtype)
    report = convert_checkpoint(tmp_path / "source", tmp_path / "target", max_shard_size=max_shard_size, **QUIET)
    assert_same_bits(stored_tensors(tmp_path / "target"), stored_tensors(tmp_path / "source"))
    files = sorted(path.name for path in (tmp_path / "target").glob("*.safetensors"))
    if max_shard_size == "5GB":
        assert files == ["model.safetensors"]
        original = (tmp_path / "source" / "model.safetensors").read_bytes()
        assert (tmp_path / "target" / "model.safetensors").read_bytes() == original
    else:
        assert len(files) > 2
        largest_tensor = 288 * 32 * dtype.itemsize
        header = 4000
        sizes = [file["num_bytes"] for file in report["weights"]["files"].values()]
        assert all(size <= max(20_000, largest_tensor) + header for size in sizes)
    assert report["weights"]["files_unchanged"] == (max_shard_size == "5GB")
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "target").dtype == dtype


def test_mixed_dtypes_laid_out_anew_stay_readable_and_are_noted(source, tmp_path):
    tensors = load_file(source / "model.safetensors")
    tensors["model.norm.weight"] = tensors["model.norm.weight"][:31].repeat(2)[:32].bfloat16()
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    report = convert_checkpoint(source, tmp_path / "target", max_shard_size="20KB", **QUIET)
    assert_same_bits(stored_tensors(tmp_path / "target"), stored_tensors(source))
    assert any(note.startswith("weights are stored as") for note in report["notes"])


def test_tensors_laid_out_anew_start_at_multiples_of_their_item_size(tmp_path):
    stored = {"a": torch.ones(3).bfloat16(), "b": torch.arange(2.0), "c": torch.arange(5.0).double()}
    for name, x in stored.items():
        save_file({name: x}, tmp_path / f"{name}.safetensors")
    tensors = {}
    for name in stored:
        tensors |= read_header(tmp_path / f"{name}.safetensors")
    tensors["a again"] = dataclasses.replace(tensors["a"], name="a again")  # no file holds exactly these
    (path,) = copy_weights(tensors, tmp_path, "5GB")
    assert_same_bits(load_file(path), stored | {"a again": stored["a"]})
    for tensor in read_header(path).values():
        assert tensor.ranges[0].start % {"BF16": 2, "F32": 4, "F64": 8}[tensor.dtype] == 0


def test_writing_into_the_targets_weights_leaves_the_source_alone(source, tmp_path):
    convert_checkpoint(source, tmp_path / "target", **QUIET)
    before = (source / "model.safetensors").read_bytes()
    with open(tmp_path / "target" / "model.safetensors", "r+b") as file:
        file.write(b"overwritten in place")
    assert (source / "model.safetensors").read_bytes() == before


def test_copying_falls_back_to_reading_where_the_kernel_cannot(source, tmp_path, monkeypatch):
    def refuse(*args, **kwargs):
        raise OSError("not between these file systems")

    monkeypatch.setattr(os, "copy_file_range", refuse)
    monkeypatch.setattr(conversion.weights, "CHUNK_BYTES", 1000)
    convert_checkpoint(source, tmp_path / "copied", **QUIET)
    convert_checkpoint(source, tmp_path / "anew", max_shard_size="20KB", **QUIET)
    assert_same_bits(stored_tensors(tmp_path / "copied"), stored_tensors(source))
    assert_same_bits(stored_tensors(tmp_path / "anew"), stored_tensors(source))


def test_old_checkpoints_lose_only_their_stored_rope_frequencies(source, tmp_path):
    expected = load_file(source / "model.safetensors")
    stored = expected | {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": torch.ones(4) for i in range(2)}
    save_file(stored, source / "model.safetensors", metadata={"format": "pt"})
    edit_json(
        source / "config.json",
        rope_parameters=None,
        rope_theta=5000.0,
        rope_scaling={"type": "linear", "factor": 2.0},
        torch_dtype="float32",
        temperature=0.5,
    )
    convert_checkpoint(source, tmp_path / "target", **QUIET)
    assert_same_bits(stored_tensors(tmp_path / "target"), expected)
    ours = AutoModelForCausalLM.from_pretrained(tmp_path / "target")
    assert ours.config.rope_parameters == {
        "rope_type": "linear",
        "rope_theta": 5000.0,
        "factor": 2.0,
        "type": "linear",
    }
    tokens = torch.arange(40)[None]
    with torch.no_grad():
        theirs = LlamaForCausalLM.from_pretrained(source)
        torch.testing.assert_close(ours(tokens).logits, theirs(tokens).logits, rtol=0, atol=1e-5)


def test_generation_settings_of_an_old_config_move_to_their_own_file(source, tmp_path):
    (source / "generation_config.json").unlink()
    edit_json(source / "config.json", temperature=0.5, do_sample=True)
    convert_checkpoint(source, tmp_path / "target", **QUIET)
    assert "temperature" not in json.loads((tmp_path / "target" / "config.json").read_text())
    theirs = LlamaForCausalLM.from_pretrained(source).generation_config
    ours = AutoModelForCausalLM.from_pretrained(tmp_path / "target").generation_config
    for settings in (theirs, ours):
        assert (settings.temperature, settings.do_sample, settings.eos_token_id) == (0.5, True, 1)


@pytest.mark.parametrize("place", ["generation_config.json", "config.json"])
@pytest.mark.parametrize("cache", ["static", "quantized", "hybrid", "offloaded", "dynamic"])
def test_settings_that_ask_for_another_cache_are_left_out_with_a_word(source, tmp_path, place, cache):
    if place == "config.json":
        (source / "generation_config.json").unlink()
    edit_json(source / place, cache_implementation=cache, max_cache_len=8, temperature=0.5, do_sample=True)
    report = convert_checkpoint(source, tmp_path / "target", **QUIET)
    written = json.loads((tmp_path / "target" / "generation_config.json").read_text())
    assert (written["temperature"], written["do_sample"], written["eos_token_id"]) == (0.5, True, 1)
    told = f"generation settings ask for a {cache} cache: left out, since LongNet brings its own"
    assert (told in report["notes"]) == (cache not in ("offloaded", "dynamic"))
    if told not in report["notes"]:
        return
    assert not {"cache_implementation", "cache_config", "max_cache_len"} & {x for x in written if written[x]}
    prompt = torch.arange(40)[None]
    greedy = {"attention_mask": torch.ones_like(prompt), "do_sample": False, "max_new_tokens": 5, "pad_token_id": 1}
    ours = AutoModelForCausalLM.from_pretrained(tmp_path / "target").generate(prompt, **greedy)
    theirs = LlamaForCausalLM.from_pretrained(source, attn_implementation="eager")
    theirs.generation_config.cache_implementation = None
    assert torch.equal(ours, theirs.generate(prompt, **greedy))


def test_tokenizer_template_generation_config_and_licence_are_carried_byte_for_byte(source, tmp_path):
    (source / "LICENSE.txt").write_text("terms")
    (source / "additional_chat_templates").mkdir()
    (source / "additional_chat_templates" / "tools.jinja").write_text("{{ messages }}")
    (source / "tokenizer_code.py").write_text("raise SystemExit('code of the source must not travel')")
    (source / "optimizer.bin").write_bytes(b"not asked for")
    convert_checkpoint(source, tmp_path / "target", **QUIET)
    target = files_of(tmp_path / "target")
    for name in (
        "tokenizer.json",
        "tokenizer_config.json",
        "chat_template.jinja",
        "additional_chat_templates/tools.jinja",
        "generation_config.json",
        "LICENSE.txt",
    ):
        assert target[name] == (source / name).read_bytes()
    assert not {"tokenizer_code.py", "optimizer.bin"} & target.keys()
    chat = [{"role": "user", "content": "Call me Ishmael."}]
    theirs = AutoTokenizer.from_pretrained(source).apply_chat_template(chat)["input_ids"]
    assert AutoTokenizer.from_pretrained(tmp_path / "target").apply_chat_template(chat)["input_ids"] == theirs


def test_the_converted_checkpoint_generates_beyond_the_sources_context(source, tmp_path):
    convert_checkpoint(source, tmp_path / "target", **QUIET)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "target")
    prompt = torch.arange(100)[None] % 288
    settings = {"max_new_tokens": 8, "do_sample": False, "temperature": None, "eos_token_id": None, "pad_token_id": 1}
    cached = model.generate(prompt, attention_mask=torch.ones_like(prompt), **settings)
    uncached = model.generate(prompt, attention_mask=torch.ones_like(prompt), use_cache=False, **settings)
    assert cached.shape == (1, 108)
    assert torch.equal(cached, uncached)


LOAD_WITHOUT_PACKAGE = """
import sys, torch
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer
target, expected = sys.argv[1:]
tokenizer = AutoTokenizer.from_pretrained(target)
assert tokenizer.chat_template and tokenizer("Call me Ishmael.")["input_ids"]
model = AutoModelForCausalLM.from_pretrained(target, trust_remote_code=True)
with torch.no_grad():
    torch.testing.assert_close(model(torch.arange(40)[None]).logits, torch.load(expected), rtol=0, atol=1e-5)
assert type(AutoModel.from_pretrained(target, trust_remote_code=True)).__name__ == "LongNetModel"
heads = AutoModelForSequenceClassification.from_pretrained(target, trust_remote_code=True)
assert type(heads).__name__ == "LongNetForSequenceClassification"
assert "modeling_longnet" not in sys.modules and "conversion" not in sys.modules
"""


def test_target_loads_in_a_process_that_lacks_the_package(source, tmp_path):
    convert_checkpoint(source, tmp_path / "target", **QUIET)
    with torch.no_grad():
        logits = LlamaForCausalLM.from_pretrained(source)(torch.arange(40)[None]).logits
    torch.save(logits, tmp_path / "expected.pt")
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    run = subprocess.run(
        [sys.executable, "-c", LOAD_WITHOUT_PACKAGE, tmp_path / "target", tmp_path / "expected.pt"],
        cwd=tmp_path,
        env=environment | {"HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr


def planned(source: Path, **options) -> tuple:
    plan = plan_conversion(source, **options)
    pattern = plan.config.pattern
    return pattern.segment_lengths, pattern.dilation_rates, plan.config.max_position_embeddings


def test_default_pattern_doubles_the_trained_context_until_the_context_is_covered(source):
    assert planned(source) == ((64, 128, 256), (1, 2, 4), 256)
    assert planned(source, max_position_embeddings=1000) == ((64, 128, 256, 512, 1024), (1, 2, 4, 8, 16), 1000)
    assert planned(source, max_position_embeddings=50) == ((64,), (1,), 50)
    assert planned(source, segment_lengths=[32, 96]) == ((32, 96), (1, 3), 96)
    assert planned(source, segment_lengths=[32, 64], dilation_rates=[1, 4]) == ((32, 64), (1, 4), 64)
    edit_json(source / "config.json", max_position_embeddings=10_000)
    assert planned(source) == ((4096, 8192, 16384), (1, 2, 4), 16384)
    edit_json(source / "config.json", max_position_embeddings=131072, rope_parameters=ROPE["llama3"])
    lengths, rates, context = planned(source)
    assert (lengths[0], lengths[-1], rates[-1], context) == (16, 131072, 8192, 131072)


def test_presets_set_the_patterns_rules(source):
    for preset in ("paper", "torchscale", "retrofit"):
        assert plan_conversion(source, preset=preset).config.pattern == DilationPattern.preset(
            preset, (64, 128, 256), (1, 2, 4)
        )


def test_a_pattern_that_is_not_dense_on_short_inputs_is_verified_through_one_that_is(source, tmp_path):
    report = convert_checkpoint(source, tmp_path / "target", preset="paper", **QUIET)
    assert report["verification"]["relative_error"] < 1e-5
    assert not report["verification"]["pattern_used"]
    assert any("fine-tune before use" in note for note in report["notes"])
    ours = AutoModelForCausalLM.from_pretrained(tmp_path / "target")
    assert ours.config.pattern.count_overlaps
    tokens = torch.arange(60)[None]
    with torch.no_grad():
        difference = ours(tokens).logits - LlamaForCausalLM.from_pretrained(source)(tokens).logits
    assert difference.abs().max() > 0.1


@pytest.mark.parametrize("form", ["one file", "one storage", "shards", "tied"])
def test_pytorchs_own_files_are_converted_bit_for_bit(tmp_path, form):
    source = tmp_path / "source"
    model = make_checkpoint(source, dtype=torch.bfloat16, tie_word_embeddings=form == "tied")
    (source / "model.safetensors").unlink()
    weights = model.state_dict()
    if form == "shards":
        names = sorted(weights)
        halves = {"pytorch_model-00001-of-00002.bin": names[::2], "pytorch_model-00002-of-00002.bin": names[1::2]}
        for file, held in halves.items():
            torch.save({name: weights[name] for name in held}, source / file)
        weight_map = {name: file for file, held in halves.items() for name in held}
        (source / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
    elif form == "one storage":
        parts = torch.cat([x.flatten() for x in weights.values()]).split([x.numel() for x in weights.values()])
        torch.save(
            {name: part.view(weights[name].shape) for name, part in zip(weights, parts)}, source / "pytorch_model.bin"
        )
    else:
        torch.save(weights, source / "pytorch_model.bin")
    report = convert_checkpoint(source, tmp_path / "target", **QUIET)
    assert report["verification"]["max_error"] < 1e-3
    expected = {name: x for name, x in weights.items() if form != "tied" or name != "lm_head.weight"}
    assert_same_bits(stored_tensors(tmp_path / "target"), expected)
    assert report["weights"]["files_unchanged"] is False
    AutoModelForCausalLM.from_pretrained(tmp_path / "target")


def test_new_rope_is_completed_from_the_source_and_verified_against_llama_with_the_same_rope(source, tmp_path):
    yarn = {"rope_type": "yarn", "factor": 4.0}
    report = convert_checkpoint(source, tmp_path / "target", rope_parameters=yarn, **QUIET)
    expected = {**yarn, "rope_theta": 10000.0, "original_max_position_embeddings": CONTEXT}
    assert report["rope_parameters"] == expected
    assert report["verification"]["relative_error"] < 1e-5
    ours = AutoModelForCausalLM.from_pretrained(tmp_path / "target")
    theirs = LlamaForCausalLM.from_pretrained(source, rope_parameters=expected, max_position_embeddings=256)
    untouched = LlamaForCausalLM.from_pretrained(source)
    tokens = torch.arange(CONTEXT)[None]
    with torch.no_grad():
        logits = ours(tokens).logits
        torch.testing.assert_close(logits, theirs(tokens).logits, rtol=0, atol=1e-5)
        assert (logits - untouched(tokens).logits).abs().max() > 0.1


def test_new_rope_stretches_from_the_length_before_the_old_one(tmp_path):
    make_checkpoint(tmp_path / "source", rope="llama3")
    yarn = {"rope_type": "yarn", "factor": 8.0}
    plan = plan_conversion(tmp_path / "source", rope_parameters=yarn)
    assert plan.config.rope_parameters == {**yarn, "rope_theta": 10000.0, "original_max_position_embeddings": 16}


def test_dynamic_rope_keeps_stretching_from_the_trained_context(tmp_path):
    make_checkpoint(tmp_path / "source", rope="dynamic")
    report = convert_checkpoint(tmp_path / "source", tmp_path / "target", max_position_embeddings=256, **QUIET)
    assert report["pattern"]["segment_lengths"][-1] == 256
    ours = AutoModelForCausalLM.from_pretrained(tmp_path / "target")
    assert ours.config.max_position_embeddings == CONTEXT
    theirs = LlamaForCausalLM.from_pretrained(tmp_path / "source")
    hidden, positions = torch.zeros(1, 200, 32), torch.arange(200)[None]
    for mine, original in zip(ours.model.rotary_emb(hidden, positions), theirs.model.rotary_emb(hidden, positions)):
        torch.testing.assert_close(mine, original, rtol=0, atol=1e-4)


def test_report_and_card_say_what_was_done_and_measured(source, tmp_path):
    (source / "README.md").write_text("---\nlicense: llama3.2\nlanguage: [en]\n---\n# A model\n")
    report = convert_checkpoint(source, tmp_path / "target", **QUIET)
    target = tmp_path / "target"
    assert json.loads((target / "conversion_report.json").read_text()) == json.loads(json.dumps(report))
    assert report["config_sha256"] == hashlib.sha256((target / "config.json").read_bytes()).hexdigest()
    weights = (target / "model.safetensors").read_bytes()
    assert report["weights"]["files"] == {
        "model.safetensors": {"num_bytes": len(weights), "sha256": hashlib.sha256(weights).hexdigest()}
    }
    assert report["versions"]["torch"] == torch.__version__
    pattern = DilationPattern.preset("retrofit", (64, 128, 256), (1, 2, 4))
    assert report["costs"]["pattern_attention_flops"] == 2 * pattern.attention_flops(256, 4, 8, num_kv_heads=2)
    assert report["costs"]["pattern_kv_bytes"] == pattern.cache_entries(256) * 2 * 8 * 2 * 2 * 4
    assert report["costs"]["dense_kv_bytes"] == 256 * 2 * 8 * 2 * 2 * 4

    card = ModelCard.load(target / "README.md")
    assert card.data.license == "llama3.2"
    assert card.data.language == ["en"]
    assert card.data.library_name == "transformers"
    assert "longnet" in card.data.tags
    assert "| 128 | 2 |" in card.text
    assert f"{report['verification']['max_error']:.2g}" in card.text
    assert "As the source: llama3.2" in card.text
    assert "$" not in card.text
    assert report["weights"]["not_finite"] == {} and "NaN" not in card.text


@pytest.mark.parametrize("card", [None, "# no front matter", "---\nlicense: [oops\n---\n"])
def test_a_source_without_a_readable_card_gives_a_card_that_claims_no_licence(source, tmp_path, card):
    if card is not None:
        (source / "README.md").write_text(card)
    convert_checkpoint(source, tmp_path / "target", verify=False, **QUIET)
    card = ModelCard.load(tmp_path / "target" / "README.md")
    assert card.data.license is None
    assert "states no licence" in card.text
    assert "without verification" in card.text


def test_losses_are_the_models_own_however_the_vocabulary_is_sliced(source, tmp_path, monkeypatch):
    monkeypatch.setattr(conversion.verify, "SLICE", 100)  # of 288
    verification = convert_checkpoint(source, tmp_path / "target", verify_tokens=50, **QUIET)["verification"]
    tokens, _ = conversion.verify.verification_tokens(source, 288, 50)
    with torch.no_grad():
        output = LlamaForCausalLM.from_pretrained(source)(tokens, labels=tokens)
    assert verification["num_tokens"] == 50
    assert verification["source_loss"] == pytest.approx(float(output.loss), rel=1e-5)
    assert verification["target_loss"] == pytest.approx(float(output.loss), rel=1e-5)
    assert verification["max_logit"] == pytest.approx(float(output.logits.abs().max()), rel=1e-5)


def test_as_many_tokens_are_compared_as_the_first_segment_has(tmp_path):
    make_checkpoint(tmp_path / "source", max_position_embeddings=1500)
    verification = convert_checkpoint(tmp_path / "source", tmp_path / "target", **QUIET)["verification"]
    assert verification["num_tokens"] == 1500
    assert verification["text"] == "Moby-Dick's opening and Python's language reference"


def test_weights_that_are_not_finite_are_converted_and_reported(source, tmp_path, capsys):
    down_proj = "model.layers.1.mlp.down_proj.weight"
    spoil_tensors(source, lambda tensors: tensors[down_proj][0].fill_(float("nan")))
    report = convert_checkpoint(source, tmp_path / "target")
    assert report["verification"]["num_not_finite"] > 0
    assert report["weights"]["not_finite"] == {down_proj: 48}
    printed = capsys.readouterr().out
    assert "look for NaN weights" in printed
    assert f"warning    NaN or infinite weights, kept as they are, in {down_proj} (48)" in printed.splitlines()
    assert_same_bits(stored_tensors(tmp_path / "target"), stored_tensors(source))


@pytest.mark.parametrize("max_shard_size", ["5GB", "20KB"])
def test_infinite_weights_that_no_logit_shows_are_named_too(source, tmp_path, capsys, max_shard_size, monkeypatch):
    monkeypatch.setattr(conversion.weights, "SCAN_BYTES", 64)  # the last number is far behind the first stretch
    spoil_tensors(source, lambda tensors: tensors["model.embed_tokens.weight"][287, 31:].fill_(float("-inf")))
    report = convert_checkpoint(source, tmp_path / "target", verify=False, max_shard_size=max_shard_size)
    assert report["weights"]["not_finite"] == {"model.embed_tokens.weight": 1}
    assert "in model.embed_tokens.weight (1)" in capsys.readouterr().out
    assert "in model.embed_tokens.weight (1)." in (tmp_path / "target" / "README.md").read_text()


def test_without_a_tokenizer_the_logits_are_compared_on_spread_tokens(tmp_path):
    make_checkpoint(tmp_path / "source", tokenizer=False)
    report = convert_checkpoint(tmp_path / "source", tmp_path / "target", **QUIET)
    assert report["verification"]["text"].startswith("spread token ids")
    assert report["verification"]["num_tokens"] == CONTEXT


def test_memory_does_not_grow_with_the_checkpoint(source, tmp_path):
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is None or not Path("/proc/self/clear_refs").exists():
        pytest.skip("needs Linux with glibc: /proc/self/clear_refs to measure the peak, malloc_trim to start low")
    convert_checkpoint(source, tmp_path / "small", **QUIET)  # loads what is loaded once
    make_checkpoint(
        tmp_path / "large",
        dtype=torch.bfloat16,
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=6,
        num_attention_heads=8,
        vocab_size=4096,
    )
    assert (tmp_path / "large" / "model.safetensors").stat().st_size > 190e6

    def memory(line: str) -> int:
        status = dict(entry.split(":") for entry in Path("/proc/self/status").read_text().splitlines())
        return int(status[line].split()[0]) * 1024

    for options, allowed in (({"verify": False}, 40e6), ({"verify": True}, 100e6)):
        trim(0)
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
        before = memory("VmRSS")
        convert_checkpoint(
            tmp_path / "large", tmp_path / "target", max_shard_size="50MB", overwrite=True, **options, **QUIET
        )
        assert memory("VmHWM") - before < allowed


# Failures. Each spoils a good source; the message must name what is wrong.


def spoil_tensors(source: Path, change) -> None:
    tensors = load_file(source / "model.safetensors")
    change(tensors)
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})


def make_sharded(source: Path) -> None:
    shutil.rmtree(source)
    make_checkpoint(source, max_shard_size="20KB")


def edit_index(source: Path, change) -> None:
    make_sharded(source)
    path = source / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    change(index["weight_map"])
    path.write_text(json.dumps(index))


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1000])


def point_shard_outside(source: Path) -> None:
    edit_index(source, lambda names: names.update({"model.norm.weight": "../other.safetensors"}))


def link_shard_to_itself(source: Path) -> None:
    make_sharded(source)
    shard = source / "model-00002-of-00006.safetensors"
    shard.unlink()
    shard.symlink_to(shard.name)


def spoil_bin(change):
    """Save the weights in PyTorch's own file, and spoil that."""

    def spoil(source: Path) -> None:
        torch.save(load_file(source / "model.safetensors"), source / "pytorch_model.bin")
        (source / "model.safetensors").unlink()
        change(source / "pytorch_model.bin")

    return spoil


def save_with_code(path: Path) -> None:
    torch.save({**torch.load(path, weights_only=True), "hook": RunsCode(str(path.parent / RAN_CODE))}, path)


RAN_CODE = "code_was_run"


class RunsCode:
    """When unpickled, makes the folder ``mark``."""

    def __init__(self, mark: str):
        self.mark = mark

    def __reduce__(self):
        return os.mkdir, (self.mark,)


def compress(path: Path) -> None:
    with zipfile.ZipFile(path) as archive:
        records = {record.filename: archive.read(record) for record in archive.infolist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in records.items():
            archive.writestr(name, content)


def swap_records(path: Path) -> None:
    """Give two records of one archive each other's names: torch still reads it, but guesses where their bytes lie."""
    with zipfile.ZipFile(path) as archive:
        records = [(record.filename, archive.read(record)) for record in archive.infolist()]
    data = [i for i, (name, _) in enumerate(records) if "/data/" in name]
    records[data[0]], records[data[5]] = records[data[5]], records[data[0]]
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        for name, content in records:
            archive.writestr(name, content)


def spoil_directory(path: Path) -> None:
    """Break the name of the last record in the archive's list of them."""
    content = bytearray(path.read_bytes())
    content[content.rindex(b"PK\x01\x02")] = 0
    path.write_bytes(content)


def other_endian(path: Path) -> None:
    with zipfile.ZipFile(path) as archive:
        records = [(record.filename, archive.read(record)) for record in archive.infolist()]
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        for name, content in records:
            archive.writestr(name, b"big" if name.endswith("/byteorder") else content)


def edit_bin(change):
    def edit(path: Path) -> None:
        tensors = torch.load(path, weights_only=True)
        change(tensors)
        torch.save(tensors, path)

    return spoil_bin(edit)


def config(**fields):
    return lambda source: edit_json(source / "config.json", **fields)


def tensors(change):
    return lambda source: spoil_tensors(source, change)


Q_PROJ = "model.layers.0.self_attn.q_proj.weight"

BAD_SOURCES = {
    "no config": (lambda source: (source / "config.json").unlink(), "config.json is missing"),
    "broken config": (lambda source: truncate(source / "tokenizer.json") or (source / "config.json").write_text("{"),
                      "config.json is not valid JSON"),
    "config is a list": (lambda source: (source / "config.json").write_text("[]"), "must hold a JSON object, got list"),
    "other family": (config(architectures=["GemmaForCausalLM"], model_type="gemma"),
                     "GemmaForCausalLM (model_type 'gemma'), which is not supported; supported: LlamaForCausalLM, "),
    "other code": (config(model_type="deci"), "LlamaForCausalLM (model_type 'deci'), which is not supported"),
    "headless": (config(architectures=["LlamaModel"]), "the source is LlamaModel"),
    "nameless": (config(architectures=None), "the source is no architecture"),
    "LongNet already": (config(model_type="longnet"), "LongNet checkpoint already"),
    "quantized": (config(quantization_config={"quant_method": "gptq"}), "weights are quantized (gptq)"),
    "bad config value": (config(hidden_size="wide"), "config.json is not a valid LlamaConfig"),
    "architectures in a string": (config(architectures="LlamaForCausalLM"),
                                  """must list its architectures, as in ["LlamaForCausalLM"], got 'LlamaForCausalLM'"""),
    "dtype of integers": (config(dtype="int8"), "says dtype int8, in which no model computes; correct it to one of float64"),
    "brackets without end": (lambda source: (source / "config.json").write_text("[" * 100_000),
                             "config.json is not valid JSON: "),
    "bad activation": (config(hidden_act="nosuch"), "config.json does not describe a LlamaForCausalLM"),
    "heads do not divide": (config(num_attention_heads=5), "config.json is not a valid LlamaConfig"),
    "no weights": (lambda source: (source / "model.safetensors").unlink(), "has neither model.safetensors nor"),
    "other weights": (lambda source: (source / "model.safetensors").rename(source / "model.gguf"), "found model.gguf"),
    "pickled code": (spoil_bin(save_with_code), "would have to run code to be read, which is refused"),
    "pickle truncated": (spoil_bin(truncate), "pytorch_model.bin is not a zip archive of torch's: truncated"),
    "pickle of old": (spoil_bin(lambda path: torch.save({"x": torch.ones(2)}, path, _use_new_zipfile_serialization=False)),
                      "saved before torch 1.6"),
    "pickle compressed": (spoil_bin(compress), "pytorch_model.bin is compressed, which torch's files never are"),
    "pickle rearranged": (spoil_bin(swap_records), "has no place of its own"),
    "pickle unlisted": (spoil_bin(spoil_directory), "pytorch_model.bin is not a whole checkpoint of torch's"),
    "pickle of big ends": (spoil_bin(other_endian), "pytorch_model.bin was saved on a big-endian machine"),
    "pickled list": (spoil_bin(lambda path: torch.save([torch.ones(2)], path)), "holds no state dict"),
    "pickle transposed": (edit_bin(lambda x: x.update({Q_PROJ: x[Q_PROJ].T})), f"{Q_PROJ} in "),
    "pickle lacks one": (edit_bin(lambda x: x.pop(Q_PROJ)), f"lack the tensor {Q_PROJ}"),
    "pickle of integers": (edit_bin(lambda x: x.update({Q_PROJ: x[Q_PROJ].int()})), f"{Q_PROJ} is stored as int32"),
    "adapter": (lambda source: (source / "config.json").rename(source / "adapter_config.json"), "is an adapter"),
    "adapter beside": (lambda source: (source / "adapter_config.json").write_text("{}"), "holds an adapter beside the model"),
    "truncated": (lambda source: truncate(source / "model.safetensors"), "not a valid safetensors file"),
    "not safetensors": (lambda source: (source / "model.safetensors").write_bytes(b"PK" * 50),
                        "not a valid safetensors file"),
    "missing tensor": (tensors(lambda x: x.pop(Q_PROJ)), f"lack the tensor {Q_PROJ}"),
    "missing tensors": (tensors(lambda x: [x.pop(name) for name in list(x) if ".1." in name]), "lack 9 tensors"),
    "no output head": (tensors(lambda x: x.pop("lm_head.weight")), "lack the tensor lm_head.weight"),
    "extra tensor": (tensors(lambda x: x.update({"score.weight": torch.ones(2)})), "hold the tensor score.weight"),
    "more layers than config": (config(num_hidden_layers=1), "hold 9 tensors (model.layers.1."),
    "biases unannounced": (tensors(lambda x: x.update({Q_PROJ.replace("weight", "bias"): torch.ones(32)})),
                           "hold the tensor model.layers.0.self_attn.q_proj.bias"),
    "wrong shape": (tensors(lambda x: x.update({Q_PROJ: torch.ones(32, 31)})),
                    f"{Q_PROJ} has shape [32, 31], but with this config.json it has [32, 32]"),
    "wrong dtype": (tensors(lambda x: x.update({Q_PROJ: torch.ones(32, 32, dtype=torch.int8)})),
                    f"{Q_PROJ} is stored as I8; only F64, F32, F16, BF16"),
    "missing shard": (lambda source: make_sharded(source) or (source / "model-00002-of-00006.safetensors").unlink(),
                      "model-00002-of-00006.safetensors is missing"),
    "cyclic link": (link_shard_to_itself, "model-00002-of-00006.safetensors is missing"),
    "shard outside": (point_shard_outside, "names the shard '../other.safetensors'"),
    "tensor not indexed": (lambda source: edit_index(source, lambda names: names.pop(Q_PROJ)), "lists it nowhere"),
    "tensor elsewhere": (lambda source: edit_index(source, lambda names: names.update(
        {Q_PROJ: names["model.norm.weight"]})), f"tensor {Q_PROJ} lies in"),
    "tensor nowhere": (lambda source: edit_index(source, lambda names: names.update(
        {"ghost": names["model.norm.weight"]})), "lists ghost in"),
    "index without map": (lambda source: make_sharded(source) or edit_json(
        source / "model.safetensors.index.json", weight_map=None), "has no weight_map"),
}  # fmt: skip


def test_a_padding_token_beyond_the_rows_that_are_read_is_no_obstacle(tmp_path):
    make_checkpoint(tmp_path / "source", pad_token_id=287)  # the last of the vocabulary, as in Llama 3
    report = convert_checkpoint(tmp_path / "source", tmp_path / "target", **QUIET)
    assert report["verification"]["relative_error"] < 1e-5


@pytest.mark.parametrize("case", BAD_SOURCES)
def test_a_bad_source_is_refused_before_anything_is_written(source, tmp_path, case):
    spoil, message = BAD_SOURCES[case]
    spoil(source)
    before = sorted(tmp_path.iterdir())
    with pytest.raises(ValueError) as refusal:
        convert_checkpoint(source, tmp_path / "target", **QUIET)
    assert message in str(refusal.value)
    assert sorted(tmp_path.iterdir()) == before
    assert not (source / RAN_CODE).exists()


def test_weights_that_may_not_be_read_are_not_called_missing(source, tmp_path, monkeypatch):
    def say_that_there_is_none(path, framework):  # as safetensors does then
        raise FileNotFoundError(f"No such file or directory: {path}")

    def deny(path, mode):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr("conversion.weights.safe_open", say_that_there_is_none)
    monkeypatch.setattr("conversion.weights.open", deny, raising=False)  # root may read everything
    with pytest.raises(PermissionError, match="Permission denied: .*model.safetensors"):
        convert_checkpoint(source, tmp_path / "target", **QUIET)


BAD_OPTIONS = {
    "preset": ({"preset": "sparse"}, "preset must be one of"),
    "rates alone": ({"dilation_rates": [1, 2]}, "dilation_rates [1, 2] need segment_lengths"),
    "numbers differ": ({"segment_lengths": [64, 128], "dilation_rates": [1]}, "give one rate per segment"),
    "no default rates": ({"segment_lengths": [64, 100]}, "give dilation_rates"),
    "no segments": ({"segment_lengths": []}, "segment_lengths is empty"),
    "not nested": ({"segment_lengths": [64, 96], "dilation_rates": [1, 2]}, "does not divide the next one, 96"),
    "context": (
        {"max_position_embeddings": 0},
        "max_position_embeddings (--context) must be a positive integer, got 0",
    ),
    "rope word": (
        {"rope_parameters": "spiral"},
        "must be a dict or one of yarn, linear, ntk, llama3, none, got 'spiral'",
    ),
    "rope without stretch": (
        {"rope_parameters": "yarn", "max_position_embeddings": CONTEXT},
        "nothing to stretch: the context of 64 tokens is not longer than the 64",
    ),
    "local": ({"local": 0}, "local (--local) must be a positive integer, got 0"),
    "local twice": ({"local": 32, "segment_lengths": [32, 64]}, "local 32 and segment_lengths [32, 64] both set"),
    "dense layer": ({"dense_layers": [0, 2]}, "dense_layers names layer 2, but the 2 layers are numbered from 0 to 1"),
    "dtype": ({"dtype": "int8"}, "dtype must be one of float64, float32, float16, bfloat16, got 'int8'"),
    "revision of a folder": ({"revision": "v2"}, "is a folder, which has no revision v2"),
    "repository": ({"push_to_hub": "a/b/c"}, "push_to_hub names no repository: "),
    "rope type": ({"rope_parameters": {"rope_type": "spiral"}}, "rope_type among default, linear"),
    "rope without type": ({"rope_parameters": {"factor": 2.0}}, "rope_type among"),
    "rope without factor": ({"rope_parameters": {"rope_type": "linear"}}, "rope_parameters do not fit"),
    "rope with a word": ({"rope_parameters": {"rope_type": "yarn", "factor": "4"}}, "number as factor, got '4'"),
    "rope factor of 0": ({"rope_parameters": {"rope_type": "linear", "factor": 0}}, "number as factor, got 0"),
    "rope factor below 0": ({"rope_parameters": {"rope_type": "yarn", "factor": -3}}, "number as factor, got -3"),
    "rope factor is true": ({"rope_parameters": {"rope_type": "linear", "factor": True}}, "as factor, got True"),
    "rope factor infinite": (
        {"rope_parameters": {"rope_type": "dynamic", "factor": float("inf")}},
        "number as factor, got inf",
    ),
    "rope theta": (
        {"rope_parameters": {"rope_type": "default", "rope_theta": -5}},
        "rope_parameters need a positive finite number as rope_theta, got -5",
    ),
    "rope theta is a word": (
        {"rope_parameters": {"rope_type": "default", "rope_theta": "x"}},
        "number as rope_theta, got 'x'",
    ),
    "no tokens": ({"verify_tokens": 0}, "verify_tokens must be a positive integer, got 0"),
    "shard size": ({"max_shard_size": "5 apples"}, "max_shard_size must be bytes or a size"),
    "shard size of 0": ({"max_shard_size": 0}, 'max_shard_size must be bytes or a size such as "5GB", got 0'),
    "source": ({"source": "no/such/folder"}, "no/such/folder is not a folder"),
    "relative source": ({"source": "./absent"}, "the source ./absent is not a folder"),
    "source above": ({"source": "../absent"}, "the source ../absent is not a folder"),
}


@pytest.mark.parametrize("case", BAD_OPTIONS)
def test_a_bad_option_is_refused_before_anything_is_written(source, tmp_path, case):
    options, message = BAD_OPTIONS[case]
    with pytest.raises(ValueError) as refusal:
        convert_checkpoint(**({"source": source, "target": tmp_path / "target"} | options), **QUIET)
    assert message in str(refusal.value)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_an_existing_target_is_kept_unless_overwritten(source, tmp_path):
    target = tmp_path / "target"
    convert_checkpoint(source, target, segment_lengths=[32, 64], **QUIET)
    before = files_of(target)
    with pytest.raises(ValueError, match="exists already; choose another target or pass overwrite"):
        convert_checkpoint(source, target, **QUIET)
    assert files_of(target) == before
    (target / "__pycache__").mkdir()
    (target / "__pycache__" / "modeling_longnet.pyc").write_text("left by Python")
    (target / ".cache" / "huggingface" / "upload").mkdir(parents=True)  # left by an upload
    convert_checkpoint(source, target, overwrite=True, **QUIET)
    assert json.loads((target / "config.json").read_text())["segment_lengths"] == [64, 128, 256]
    assert not (target / "__pycache__").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source", "target"]


def test_overwriting_works_where_folders_cannot_be_exchanged(source, tmp_path, monkeypatch):
    target = tmp_path / "target"
    convert_checkpoint(source, target, segment_lengths=[32, 64], **QUIET)
    monkeypatch.setattr("conversion.atomic_folder._exchange", lambda one, other: False)
    convert_checkpoint(source, target, overwrite=True, **QUIET)
    assert json.loads((target / "config.json").read_text())["segment_lengths"] == [64, 128, 256]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source", "target"]


@pytest.mark.parametrize("exchanges", [True, False])
def test_a_link_to_a_checkpoint_stays_and_the_folder_behind_it_is_replaced(tmp_path, monkeypatch, exchanges):
    if not exchanges:
        monkeypatch.setattr("conversion.atomic_folder._exchange", lambda one, other: False)
    real, link = tmp_path / "disk" / "real", tmp_path / "link"
    real.mkdir(parents=True)
    (real / "config.json").write_text("old")
    link.symlink_to(real)
    (real.parent / ".real.partial").symlink_to(real)
    write_report(real, {})
    with atomic_folder(link, overwrite=True) as folder:
        (folder / "config.json").write_text("new")
        assert (real / "config.json").read_text() == "old"
    assert link.readlink() == real and not real.is_symlink()
    assert files_of(real) == {"config.json": b"new"}
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["config.json", "disk", "link", "real"]


FOREIGN = {
    "a file": (["thesis.txt"], "thesis.txt"),
    "the first of several": (["runs/events", "checkpoint-10/model.safetensors"], "checkpoint-10/"),
    "tuned weights in more files": (["model-00001-of-00002.safetensors"], "model-00001-of-00002.safetensors"),
    "beside the templates": (["additional_chat_templates/mine.jinja"], "additional_chat_templates/mine.jinja"),
    "beside the Hub's own": ([".cache/mine/notes"], ".cache/mine/"),
}


@pytest.mark.parametrize("case", FOREIGN)
def test_what_no_conversion_wrote_is_never_overwritten(source, tmp_path, case):
    (source / "additional_chat_templates").mkdir()
    (source / "additional_chat_templates" / "rag.jinja").write_text("{{ messages }}")
    target, (names, first) = tmp_path / "target", FOREIGN[case]
    convert_checkpoint(source, target, **QUIET)
    for name in names:
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        (target / name).write_text("precious")
    before = files_of(target)
    with pytest.raises(ValueError, match=rf"target holds {first}, which no conversion wrote, .* move that elsewhere"):
        convert_checkpoint(source, target, overwrite=True, **QUIET)
    assert files_of(target) == before
    for name in names:
        (target / name).unlink()
        if not any((target / name).parent.iterdir()):
            (target / name).parent.rmdir()
    convert_checkpoint(source, target, overwrite=True, **QUIET)


@pytest.mark.parametrize("report", [None, "{}", "[]", "not JSON", '{"files": [1]}'])
def test_a_folder_whose_report_lists_no_files_is_not_overwritten(source, tmp_path, report):
    target = tmp_path / "target"
    target.mkdir()
    (target / "config.json").write_text("{}")
    (target / "thesis.txt").write_text("precious")
    if report is not None:
        (target / "conversion_report.json").write_text(report)
    before = files_of(target)
    with pytest.raises(
        ValueError, match=r"no checkpoint folder of a conversion \(no conversion_report.json that lists"
    ):
        convert_checkpoint(source, target, overwrite=True, **QUIET)
    assert files_of(target) == before


def test_what_comes_into_the_target_while_it_is_converted_again_is_kept(source, tmp_path, monkeypatch):
    target = tmp_path / "target"
    convert_checkpoint(source, target, **QUIET)

    def copy_while_somebody_writes(tensors, folder, *args):
        (target / "notes.txt").write_text("precious")
        return conversion.weights.copy_weights(tensors, folder, *args)

    monkeypatch.setattr(conversion.pipeline, "copy_weights", copy_while_somebody_writes)
    with pytest.raises(ValueError, match="target holds notes.txt, which no conversion wrote"):
        convert_checkpoint(source, target, overwrite=True, **QUIET)
    assert (target / "notes.txt").read_text() == "precious"


def test_only_checkpoints_are_overwritten(source, tmp_path):
    precious = tmp_path / "target"
    precious.mkdir()
    (precious / "thesis.tex").write_text("years of work")
    with pytest.raises(ValueError, match="no checkpoint folder"):
        convert_checkpoint(source, precious, overwrite=True, **QUIET)
    assert files_of(precious) == {"thesis.tex": b"years of work"}
    with pytest.raises(ValueError, match="no checkpoint folder"):
        convert_checkpoint(source, precious / "thesis.tex", overwrite=True, **QUIET)
    with pytest.raises(ValueError, match="cannot be created because .*thesis.tex is not a folder"):
        convert_checkpoint(source, precious / "thesis.tex" / "a" / "target", **QUIET)
    assert files_of(precious) == {"thesis.tex": b"years of work"}


@pytest.mark.parametrize("place", [".", "inside", "..", "link"])
def test_source_and_target_must_lie_apart(source, tmp_path, place):
    if place == "link":
        (tmp_path / "link").symlink_to(source)
    write_report(source, {})  # it would pass for a converted checkpoint
    write_report(tmp_path, {})  # and so would the parent
    target = tmp_path / "link" if place == "link" else source / place
    before = files_of(source)
    with pytest.raises(ValueError, match="must not be or contain one another"):
        convert_checkpoint(source, target, overwrite=True, **QUIET)
    assert files_of(source) == before


def test_two_conversions_to_one_target_do_not_mix(source, tmp_path):
    partial = tmp_path / ".target.partial"
    partial.mkdir()
    descriptor = os.open(partial, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        with pytest.raises(ValueError, match="another process is writing"):
            convert_checkpoint(source, tmp_path / "target", **QUIET)
    finally:
        os.close(descriptor)
    (partial / "rest_of_a_killed_run").write_text("")
    convert_checkpoint(source, tmp_path / "target", **QUIET)
    assert not (tmp_path / "target" / "rest_of_a_killed_run").exists()


def test_a_folder_that_went_between_opening_and_locking_is_made_anew(source, tmp_path, monkeypatch):
    lock, target, partial = fcntl.flock, tmp_path / "target", tmp_path / ".target.partial"

    def lock_too_late(descriptor, operation):
        monkeypatch.setattr(fcntl, "flock", lock)
        partial.rename(tmp_path / "published")  # as the previous holder does in the end
        lock(descriptor, operation)

    monkeypatch.setattr(fcntl, "flock", lock_too_late)
    convert_checkpoint(source, target, **QUIET)
    assert (target / "config.json").exists() and not any((tmp_path / "published").iterdir())


def test_all_is_on_disk_before_it_appears(source, tmp_path, monkeypatch):
    target, synced = tmp_path / "target", []

    def record(descriptor):
        assert not target.exists() or synced[-1] != tmp_path
        synced.append(Path(os.readlink(f"/proc/self/fd/{descriptor}")))

    monkeypatch.setattr(os, "fsync", record)
    convert_checkpoint(source, target, **QUIET)
    written = {path.relative_to(target) for path in target.rglob("*")} | {Path(".")}
    partial = tmp_path / ".target.partial"
    assert {path.relative_to(partial) for path in synced[:-1]} >= written
    assert synced[-1] == tmp_path  # the new name itself


def test_a_disk_without_room_is_noticed_before_writing(source, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=10_000))
    with pytest.raises(ValueError, match="10 kB free, but the weights need 136 kB"):
        convert_checkpoint(source, tmp_path / "target", **QUIET)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_a_target_that_appears_meanwhile_is_not_replaced(source, tmp_path, monkeypatch):
    target = tmp_path / "target"

    def copy_while_another_publishes(tensors, folder, *args):
        make_checkpoint(target)
        return conversion.weights.copy_weights(tensors, folder, *args)

    monkeypatch.setattr(conversion.pipeline, "copy_weights", copy_while_another_publishes)
    with pytest.raises(ValueError, match="target exists already"):
        convert_checkpoint(source, target, **QUIET)
    assert json.loads((target / "config.json").read_text())["model_type"] == "llama"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source", "target"]


@pytest.mark.parametrize("failures", [1, 2])
def test_logits_are_compared_once_more_before_they_count_as_wrong(failures, source, tmp_path, monkeypatch):
    compare, compared = conversion.steps.compare_logits, []

    def compare_wrongly_at_first(*arguments):
        found = compare(*arguments)
        compared.append(found)
        return dataclasses.replace(found, max_error=1.0) if len(compared) <= failures else found

    monkeypatch.setattr(conversion.steps, "compare_logits", compare_wrongly_at_first)
    refusal = pytest.raises(ValueError, match="differ from the source's by 1 ")
    with refusal if failures == 2 else contextlib.nullcontext():
        convert_checkpoint(source, tmp_path / "target", **QUIET)
    assert len(compared) == 2 and (tmp_path / "target").exists() == (failures == 1)


def test_wrong_logits_refuse_the_target(source, tmp_path, monkeypatch):
    def copy_with_one_wrong_number(tensors, folder, *args):
        files = conversion.weights.copy_weights(tensors, folder, *args)
        weights = load_file(files[0])
        weights["model.layers.1.mlp.up_proj.weight"][3, 4] += 0.1
        save_file(weights, files[0], metadata={"format": "pt"})
        return files

    monkeypatch.setattr(conversion.pipeline, "copy_weights", copy_with_one_wrong_number)
    with pytest.raises(ValueError, match="logits differ from the source's by .* nothing was written"):
        convert_checkpoint(source, tmp_path / "target", **QUIET)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


# Runs one conversion after another, each killed one file-system change later than the one before, and prints after each
# what is at the target: a digest of all its files, or nothing.
KILL_AT_EVERY_CHANGE = """
import hashlib, os, pathlib, shutil, signal, sys
from conversion import convert_checkpoint

os.fsync = lambda descriptor: None  # guards against power cuts, not kills, and takes most of the time

source, target, old = sys.argv[1], pathlib.Path(sys.argv[2]), sys.argv[3:]

def digest(folder):
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return hashlib.sha256(repr([(str(p.relative_to(folder)), p.read_bytes()) for p in files]).encode()).hexdigest()

def kill_self_before(change):
    seen = 0
    def count(event, arguments):
        nonlocal seen
        changes = event in ("os.mkdir", "os.rename", "os.remove", "os.rmdir", "shutil.rmtree")
        if event == "open":
            changes = arguments[2] & (os.O_WRONLY | os.O_RDWR)
        # The copies of the package's many files are all alike: one of them will do.
        name = str(arguments[0]) if arguments else ""
        if name.endswith(".py") and not name.endswith("cache_longnet.py"):
            return
        if changes and str(target.parent) in str(arguments):
            seen += 1
            if seen == change:
                os.kill(os.getpid(), signal.SIGKILL)
    sys.addaudithook(count)

change, status = 0, None
while status != 0:
    change += 1
    shutil.rmtree(target, ignore_errors=True)
    if old:
        shutil.copytree(old[0], target)
    child = os.fork()
    if child == 0:
        kill_self_before(change)
        convert_checkpoint(source, target, overwrite=bool(old), verify=False, progress=False)
        os._exit(0)
    status = os.waitpid(child, 0)[1]
    assert status == 0 or os.WTERMSIG(status) == signal.SIGKILL, status
    print(digest(target) if target.exists() else "nothing")
print(*sorted(path.name for path in target.parent.iterdir()))
"""


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_kill_at_any_moment_leaves_what_was_there_or_a_finished_checkpoint(
    shared_source, tmp_path_factory, overwrite
):
    old = tmp_path_factory.mktemp("old") / "checkpoint"
    target = tmp_path_factory.mktemp("killed") / "target"
    convert_checkpoint(shared_source, old, segment_lengths=[32, 64], verify=False, **QUIET)
    run = subprocess.run(
        [sys.executable, "-c", KILL_AT_EVERY_CHANGE, shared_source, target, *([old] if overwrite else [])],
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert run.returncode == 0, run.stderr
    *states, left = run.stdout.splitlines()
    finished = states[-1]
    switch = states.index(finished)
    assert len(states) > 20
    assert set(states[switch:]) == {finished}
    assert len(set(states[:switch])) == 1
    assert states[0] != "nothing" if overwrite else states[0] == "nothing"
    assert states[0] != finished
    assert left == "target"
