"""What a conversion may be asked for: new RoPE, dense layers, another dtype, an upload; and the proof in that dtype."""

import json
from pathlib import Path

import pytest
import torch
from checkpoints import CONTEXT, assert_same_bits, edit_json, make_checkpoint, stored_tensors
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import conversion.weights
from conversion import convert_checkpoint
from conversion.plan_family import plan_conversion
from conversion.verify import verification_tokens
from modeling_longnet import LongNetModel


QUIET = {"progress": False}


@pytest.fixture
def source(tmp_path) -> Path:
    make_checkpoint(tmp_path / "source")
    return tmp_path / "source"


ROPE_WORDS = {
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": CONTEXT},
    "linear": {"rope_type": "linear", "factor": 4.0},
    "llama3": {"rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
               "original_max_position_embeddings": CONTEXT},
    "ntk": {"rope_type": "default", "rope_theta": 10000.0 * 4.0 ** (8 / 6)},
    "none": {"rope_type": "default"},
}  # fmt: skip


@pytest.mark.parametrize("word", ROPE_WORDS)
def test_a_word_for_rope_stretches_the_trained_context_to_the_new_one(source, tmp_path, word):
    options = {"rope_parameters": word, "max_position_embeddings": 4 * CONTEXT}
    report = convert_checkpoint(source, tmp_path / "target", **options, **QUIET)
    expected = {"rope_theta": 10000.0, **ROPE_WORDS[word]}
    assert report["rope_parameters"] == expected
    assert report["verification"]["relative_error"] < 1e-5
    ours = AutoModelForCausalLM.from_pretrained(tmp_path / "target")
    theirs = LlamaForCausalLM.from_pretrained(source, rope_parameters=expected, max_position_embeddings=4 * CONTEXT)
    tokens = torch.arange(CONTEXT)[None]
    with torch.no_grad():
        torch.testing.assert_close(ours(tokens).logits, theirs(tokens).logits, rtol=0, atol=1e-5)


def test_ntk_leaves_the_fastest_rotation_alone_and_stretches_the_slowest_by_the_factor(source):
    plan = plan_conversion(source, rope_parameters="ntk", max_position_embeddings=8 * CONTEXT)
    before, after = (
        LlamaForCausalLM(config).model.rotary_emb.inv_freq
        for config in (LlamaConfig.from_pretrained(source), plan.reference.config)
    )
    assert after[0] == before[0]
    torch.testing.assert_close(before[-1] / after[-1], torch.tensor(8.0))


def test_a_part_that_rotates_stays_that_part_under_new_rope(tmp_path):
    rope = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}
    make_checkpoint(tmp_path / "source", family="phi3", rope_parameters=rope)
    options = {"rope_parameters": "ntk", "max_position_embeddings": 8 * CONTEXT}
    convert_checkpoint(tmp_path / "source", tmp_path / "target", **options, **QUIET)  # verified against Phi-3's own
    converted = AutoModelForCausalLM.from_pretrained(tmp_path / "target")
    assert converted.config.rope_parameters["partial_rotary_factor"] == 0.5
    inv_freq = converted.model.rotary_emb.inv_freq
    assert len(inv_freq) == 2 and 1e-2 / inv_freq[-1] == pytest.approx(8.0)


def test_new_rope_rotates_whole_heads_where_the_source_reads_no_part(source, tmp_path):
    edit_json(source / "config.json", partial_rotary_factor=0.5)
    options = {"rope_parameters": "linear", "max_position_embeddings": 4 * CONTEXT}
    report = convert_checkpoint(source, tmp_path / "target", **options, **QUIET)  # verified against Llama's own
    assert report["rope_parameters"] == {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}


def test_the_trained_context_is_kept_in_the_config(tmp_path):
    make_checkpoint(tmp_path / "source", rope="llama3")
    convert_checkpoint(tmp_path / "source", tmp_path / "target", max_position_embeddings=256, **QUIET)
    assert json.loads((tmp_path / "target" / "config.json").read_text())["trained_context"] == 16
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "target")
    model.save_pretrained(tmp_path / "again")
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "again").config.trained_context == 16


@pytest.mark.parametrize(("layers", "late"), [(1, 0), (2, 1), (4, 3), (6, 4)])
def test_late_is_the_layer_at_three_quarters_of_the_depth(tmp_path, layers, late):
    make_checkpoint(tmp_path / "source", num_hidden_layers=layers)
    assert plan_conversion(tmp_path / "source", dense_layers="late").config.dense_layers == (late,)


def test_dense_layers_are_ordinary_attention_and_cost_as_much(source, tmp_path):
    options = {"local": 16, "max_position_embeddings": 256}
    report = convert_checkpoint(source, tmp_path / "target", dense_layers=[1], **options, **QUIET)
    all_dense = convert_checkpoint(source, tmp_path / "dense", dense_layers=[0, 1], **options, **QUIET)
    none_dense = plan_conversion(source, **options)
    for cost in ("attention_flops", "kv_bytes"):
        sparse, dense = none_dense.costs()[f"pattern_{cost}"], none_dense.costs()[f"dense_{cost}"]
        assert sparse < dense
        assert report["costs"][f"pattern_{cost}"] == (sparse + dense) / 2
        assert all_dense["costs"][f"pattern_{cost}"] == dense
    assert report["pattern"]["dense_layers"] == [1]
    assert "dense      layers 0, 1" in plan_conversion(source, dense_layers=[0, 1]).describe().splitlines()
    assert "Layer 1 keeps ordinary attention" in (tmp_path / "target" / "README.md").read_text()
    tokens = torch.arange(60)[None]
    with torch.no_grad():
        expected = LlamaForCausalLM.from_pretrained(source)(tokens).logits
        dense, mixed = (
            AutoModelForCausalLM.from_pretrained(tmp_path / name)(tokens).logits for name in ("dense", "target")
        )
    torch.testing.assert_close(dense, expected, rtol=0, atol=1e-5)
    assert (mixed - expected).abs().max() > 0.1


@pytest.mark.parametrize("max_shard_size", ["5GB", "20KB"])
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "float64"])
def test_weights_are_rounded_to_another_dtype_on_request(source, tmp_path, monkeypatch, dtype, max_shard_size):
    monkeypatch.setattr(conversion.weights, "CHUNK_BYTES", 1000)
    options = {"dtype": dtype, "max_shard_size": max_shard_size}
    report = convert_checkpoint(source, tmp_path / "target", **options, **QUIET)
    expected = {name: x.to(getattr(torch, dtype)) for name, x in stored_tensors(source).items()}
    assert_same_bits(stored_tensors(tmp_path / "target"), expected)
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "target").dtype == getattr(torch, dtype)
    assert report["verification"]["relative_error"] < 1e-5
    assert report["weights"]["dtypes"] == [dtype]
    assert report["weights"]["num_bytes"] == sum(x.nbytes for x in expected.values())
    assert any("rounded to" in note for note in report["notes"]) == (dtype != "float32")
    card = (tmp_path / "target" / "README.md").read_text()
    assert ("bit for bit" in card) == (dtype == "float32")
    if max_shard_size == "20KB":
        index = json.loads((tmp_path / "target" / "model.safetensors.index.json").read_text())
        assert index["metadata"]["total_size"] == report["weights"]["num_bytes"]


def test_a_number_too_large_for_the_dtype_is_refused(source, tmp_path):
    tensors = load_file(source / "model.safetensors")
    tensors["model.norm.weight"] *= 1e6
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"model.norm.weight holds .*e\+06, more than F16 can"):
        convert_checkpoint(source, tmp_path / "target", dtype="float16", **QUIET)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_logits_are_compared_in_the_checkpoints_own_dtype_too(tmp_path, dtype):
    make_checkpoint(tmp_path / "source", dtype=dtype)
    own = convert_checkpoint(tmp_path / "source", tmp_path / "target", **QUIET)["verification"]["own_dtype"]
    assert own["dtype"] == str(dtype).removeprefix("torch.")
    with torch.no_grad():
        tokens, _ = verification_tokens(tmp_path / "source", 288, CONTEXT)
        exact, rounded, ours = (
            AutoModelForCausalLM.from_pretrained(tmp_path / name, dtype=wanted)(tokens).logits.float()
            for name, wanted in (("source", torch.float32), ("source", dtype), ("target", dtype))
        )
    assert own["max_error"] == pytest.approx(float((ours - rounded).abs().max()), abs=1e-6)
    assert own["source_rounding"] == pytest.approx(float((rounded - exact).square().mean().sqrt()), rel=1e-3)
    assert own["target_rounding"] == pytest.approx(float((ours - exact).square().mean().sqrt()), rel=1e-3)
    assert own["source_rounding"] > 0


@pytest.mark.parametrize(
    ("factor", "message"),
    [(1.1, "logits are .* at most twice"), (float("nan"), "logits are NaN or infinite in other places")],
)
def test_a_model_that_is_wrong_in_its_own_dtype_only_is_refused(tmp_path, monkeypatch, factor, message):
    def wrong_in_bfloat16(self, *args, **kwargs):
        output = forward(self, *args, **kwargs)
        if output.last_hidden_state.dtype == torch.bfloat16:
            output.last_hidden_state = output.last_hidden_state * factor
        return output

    make_checkpoint(tmp_path / "source", dtype=torch.bfloat16)
    forward = LongNetModel.forward
    monkeypatch.setattr(LongNetModel, "forward", wrong_in_bfloat16)
    with pytest.raises(ValueError, match=f"in bfloat16 the converted model's {message}"):
        convert_checkpoint(tmp_path / "source", tmp_path / "target", **QUIET)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_logits_that_are_not_finite_prove_nothing_where_all_weights_are(source, tmp_path):
    edit_json(source / "config.json", rms_norm_eps=-1e9)
    with pytest.raises(ValueError, match=r"logits of the source and of .* are NaN or infinite although no weight is"):
        convert_checkpoint(source, tmp_path / "target", **QUIET)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def spoil_forward(monkeypatch, times: int, factor: float) -> None:
    """Multiply what the converted model computes, in its first ``times`` runs."""

    def wrong(self, *args, **kwargs):
        output = forward(self, *args, **kwargs)
        if next(runs, None) is not None:
            output.last_hidden_state = output.last_hidden_state * factor
        return output

    runs, forward = iter(range(times)), LongNetModel.forward
    monkeypatch.setattr(LongNetModel, "forward", wrong)


def test_a_converted_model_that_is_nan_where_the_source_is_not_is_refused(source, tmp_path, monkeypatch):
    spoil_forward(monkeypatch, 2, float("nan"))
    with pytest.raises(ValueError, match="NaN or infinite in other places than the source's, of which 0 are"):
        convert_checkpoint(source, tmp_path / "target", **QUIET)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_a_comparison_that_fails_only_at_first_is_logged_with_its_numbers(source, tmp_path, monkeypatch, caplog):
    spoil_forward(monkeypatch, 1, 1.1)
    convert_checkpoint(source, tmp_path / "target", **QUIET)
    (record,) = [record for record in caplog.records if record.name == "conversion.steps"]
    assert record.levelname == "WARNING"
    assert "first comparison failed (the converted model's logits differ from the source's by" in record.getMessage()


class RecordingHub:
    """Stands in for HfApi and records what it is asked for."""

    calls: list

    def create_repo(self, repo_id, **options):
        self.calls.append(("create", repo_id, options))

    def upload_folder(self, *, repo_id, folder_path, commit_message, delete_patterns):
        self.calls.append(("upload", repo_id, sorted(path.name for path in Path(folder_path).iterdir())))


def test_a_finished_checkpoint_is_uploaded_on_request(source, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(RecordingHub, "calls", [], raising=False)
    monkeypatch.setattr("conversion.hub.HfApi", RecordingHub)
    convert_checkpoint(source, tmp_path / "target", push_to_hub="me/llama-longnet", verify=False)
    created, uploaded = RecordingHub.calls
    assert created == ("create", "me/llama-longnet", {"private": True, "exist_ok": True})
    assert uploaded == ("upload", "me/llama-longnet", sorted(path.name for path in (tmp_path / "target").iterdir()))
    assert {"config.json", "model.safetensors", "modeling_longnet.py", "README.md"} <= set(uploaded[2])
    assert capsys.readouterr().out.splitlines()[-1] == "uploaded   me/llama-longnet"


def test_a_failed_upload_leaves_the_finished_checkpoint_and_says_so(source, tmp_path, monkeypatch):
    def refuse(self, repo_id, **options):
        raise ConnectionError("no way out")

    monkeypatch.setattr(RecordingHub, "create_repo", refuse)
    monkeypatch.setattr("conversion.hub.HfApi", RecordingHub)
    refused = (
        r"target is finished, but uploading it to me/x failed: no way out; upload it with: hf upload --private me/x /"
    )
    with pytest.raises(ValueError, match=refused):
        convert_checkpoint(source, tmp_path / "target", push_to_hub="me/x", verify=False, **QUIET)
    assert (tmp_path / "target" / "model.safetensors").exists()


def test_what_was_pushed_can_be_converted_again(source, tmp_path, monkeypatch):
    monkeypatch.setattr(RecordingHub, "calls", [], raising=False)
    monkeypatch.setattr("conversion.hub.HfApi", RecordingHub)
    for _ in range(2):
        convert_checkpoint(source, tmp_path / "target", push_to_hub="me/x", verify=False, overwrite=True, **QUIET)
    assert [call[0] for call in RecordingHub.calls] == ["create", "upload"] * 2
