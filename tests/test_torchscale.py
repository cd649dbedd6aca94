"""Checkpoints of the official LongNet code: read safely, converted to the official logits, or refused by name.

Where numbers of the official code itself exist (no xPos, no Sub-LN) they are the truth; elsewhere the independent
float64 decoder of ``torchscale_decoder.py`` stands for it.
"""

import argparse
import json
import os
import shlex
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.testing import assert_close
from torchscale_decoder import ARGUMENTS, decoder_logits, random_weights
from transformers import AutoModelForCausalLM

from conversion import convert_torchscale
from conversion.cli import main


QUIET = {"progress": False}
GOLDEN = Path(__file__).parent / "data" / "longnet_decoder_plain.safetensors"
PLAIN = {"subln": False, "xpos_rel_pos": False}


def golden() -> tuple[dict, dict]:
    """Return the official decoder's weights and arguments."""
    tensors = load_file(GOLDEN)
    weights = {name.removeprefix("weights/"): x for name, x in tensors.items() if name.startswith("weights/")}
    return weights, {**ARGUMENTS, **PLAIN, "decoder_ffn_embed_dim": 64}


def save_safetensors(folder: Path, weights: dict, arguments: dict) -> Path:
    folder.mkdir()
    save_file({name: x.clone() for name, x in weights.items()}, folder / "decoder.safetensors")
    save_file({"n48/logits": torch.zeros(1)}, folder / "io.safetensors")
    (folder / "config.json").write_text(json.dumps({"model": "LongNetDecoder", "config": arguments}))
    return folder


def save_fairseq(folder: Path, weights: dict, arguments: dict) -> Path:
    """As fairseq does: the decoder's names behind a prefix, arguments as a namespace, lists in it as text."""
    folder.mkdir()
    arguments = {name: str(x) if isinstance(x, list) else x for name, x in arguments.items()}
    content = {
        "model": {f"decoder.{name}": x for name, x in weights.items()} | {"decoder.version": torch.tensor([3.0])},
        "args": argparse.Namespace(**arguments, bos=0, pad=1, eos=2, tokens_per_sample=2048),
        "extra_state": {"epoch": 3},
    }
    torch.save(content, folder / "checkpoint_best.pt")
    torch.save({"model": {}}, folder / "checkpoint_last.pt")
    return folder / "checkpoint_best.pt"


def save_bare(folder: Path, weights: dict, arguments: dict) -> Path:
    folder.mkdir()
    torch.save(weights, folder / "longnet.bin")
    (folder / "args.json").write_text(json.dumps(arguments))
    return folder


FORMS = {"safetensors": save_safetensors, "fairseq": save_fairseq, "bare": save_bare}
every_form = pytest.mark.parametrize("form", FORMS)


def load(folder: Path) -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)


@every_form
def test_the_official_codes_logits_come_out(tmp_path, form):
    source = FORMS[form](tmp_path / "source", *golden())
    report = convert_torchscale(source, tmp_path / "target", **QUIET)
    model, runs = load(tmp_path / "target"), load_file(GOLDEN)
    for run in ("n48", "n77"):
        with torch.no_grad():
            logits = model(runs[f"{run}/input_ids"]).logits
        assert_close(logits, runs[f"{run}/logits"], rtol=0, atol=1e-9)
    assert report["source"]["architecture"] == "LongNetDecoder"
    assert report["pattern"]["preset"] == "torchscale"
    assert report["verification"]["max_error"] < 1e-4


VARIANTS = {
    "xPos and Sub-LN": {},
    "fast decay": {"xpos_scale_base": 16},
    "xPos alone": {"subln": False},
    "Sub-LN alone": {"xpos_rel_pos": False},
    "scaled embeddings": {"no_scale_embedding": False},
    "tied embeddings": {"share_decoder_input_output_embed": True},
    "ReLU, another epsilon": {"activation_fn": "relu", "layernorm_eps": 0.01},
    "other sizes": {"decoder_embed_dim": 48, "decoder_attention_heads": 3, "decoder_layers": 3, "vocab_size": 51,
                    "segment_length": [8, 24], "dilated_ratio": [1, 3]},
}  # fmt: skip


@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_are_the_definitions_with_xpos_and_sub_layernorm(tmp_path, variant):
    form = list(FORMS.values())[len(variant) % len(FORMS)]
    weights, arguments = random_weights(**VARIANTS[variant])
    convert_torchscale(form(tmp_path / "source", weights, arguments), tmp_path / "target", **QUIET)
    stored = load_file(tmp_path / "target" / "model.safetensors")
    assert ("lm_head.weight" in stored) == (not arguments["share_decoder_input_output_embed"])
    model = load(tmp_path / "target")
    for length in (5, 48, 100):
        tokens = torch.randint(
            0, arguments["vocab_size"], (2, length), generator=torch.Generator().manual_seed(length)
        )
        expected = decoder_logits(weights, tokens, arguments)
        with torch.no_grad():
            assert_close(model(tokens, use_cache=False).logits, expected, rtol=0, atol=1e-9)
            first = model(tokens[:, :-3], use_cache=True)
            rest = [first.logits]
            for i in range(length - 3, length):
                step = model(tokens[:, i : i + 1], past_key_values=first.past_key_values)
                rest.append(step.logits)
            assert_close(torch.cat(rest, dim=1), expected, rtol=0, atol=1e-9)


def test_every_part_of_the_reference_shows_in_its_logits():
    """Else the test above could not tell a part that is wrong."""
    weights, arguments = random_weights()
    tokens = torch.randint(0, 97, (1, 60), generator=torch.Generator().manual_seed(0))
    expected = decoder_logits(weights, tokens, arguments)
    for change in ({"xpos_rel_pos": False}, {"xpos_scale_base": 256}, {"subln": False}, {"activation_fn": "relu"},
                   {"dilated_ratio": [1, 2, 2]}, {"no_scale_embedding": False}, {"layernorm_eps": 1e-3}):  # fmt: skip
        assert (decoder_logits(weights, tokens, arguments | change) - expected).abs().max() > 1e-3, change
    for name in weights:
        if "xpos" not in name and not name.endswith("k_proj.bias"):
            changed = decoder_logits(weights | {name: weights[name].flip(0)}, tokens, arguments)
            assert (changed - expected).abs().max() > 1e-3, name


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_weights_keep_their_bits_but_for_the_order_that_xpos_needs(tmp_path, dtype):
    weights, arguments = random_weights()
    weights = {name: x.to(dtype) for name, x in weights.items()}  # xPos' scales are rounded, too
    convert_torchscale(save_bare(tmp_path / "source", weights, arguments), tmp_path / "target", **QUIET)
    stored = load_file(tmp_path / "target" / "model.safetensors")
    layer, ours = "layers.1.", "model.layers.1."
    assert torch.equal(stored[f"{ours}self_attn.o_proj.weight"], weights[f"{layer}self_attn.out_proj.weight"])
    assert torch.equal(stored[f"{ours}mlp.inner_norm.bias"], weights[f"{layer}ffn.ffn_layernorm.bias"])
    theirs = weights[f"{layer}self_attn.q_proj.weight"].unflatten(0, (4, 4, 2))  # heads, pairs, both of a pair
    assert torch.equal(stored[f"{ours}self_attn.q_proj.weight"].unflatten(0, (4, 2, 4)), theirs.transpose(1, 2))
    assert all(x.dtype == dtype for x in stored.values())
    assert len(stored) == len(weights) - 2  # the scales of two layers
    assert json.loads((tmp_path / "target" / "config.json").read_text())["dtype"] == str(dtype).removeprefix("torch.")


def test_training_arguments_reach_config_and_notes(tmp_path):
    weights, arguments = random_weights(segment_length=[8, 16, 24], dilated_ratio=[1, 2, 5])
    arguments |= {"dropout": 0.1, "attention_dropout": 0.2}
    report = convert_torchscale(save_fairseq(tmp_path / "source", weights, arguments), tmp_path / "target", **QUIET)
    config = json.loads((tmp_path / "target" / "config.json").read_text())
    assert (config["bos_token_id"], config["pad_token_id"], config["eos_token_id"]) == (0, 1, 2)
    assert (config["attention_dropout"], config["trained_context"]) == (0.2, 2048)
    shifts, dropout, dictionary = report["notes"]
    assert "rate 5 of 24 does not divide its segment" in shifts
    assert "dropout 0.1: not carried over" in dropout
    assert "dictionary of tokens is not converted" in dictionary
    card = (tmp_path / "target" / "README.md").read_text()
    assert "positions: xPos, theta 10000, scale base 512" in card
    assert "a `LongNetDecoder` of the official LongNet code" in card
    assert "$" not in card


def test_a_wrong_order_of_rows_is_noticed(tmp_path, monkeypatch):
    source = save_bare(tmp_path / "source", *random_weights())
    monkeypatch.setattr("conversion.torchscale._halves_of_heads", lambda name, tensor, num_heads: tensor)
    with pytest.raises(ValueError, match="logits differ from the source's by .* nothing was written"):
        convert_torchscale(source, tmp_path / "target", **QUIET)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


class RunsCode:
    def __reduce__(self):
        return os.system, ("touch /tmp/longnet_ran_code",)


def test_pickled_code_is_refused_and_never_run(tmp_path):
    weights, arguments = random_weights()
    torch.save({"model": weights, "args": argparse.Namespace(**arguments), "hook": RunsCode()}, tmp_path / "model.pt")
    Path("/tmp/longnet_ran_code").unlink(missing_ok=True)
    with pytest.raises(ValueError, match="would have to run code to be read, which is refused.*posix.system"):
        convert_torchscale(tmp_path / "model.pt", tmp_path / "target", **QUIET)
    assert not Path("/tmp/longnet_ran_code").exists()


def rename(weights: dict, old: str, new: str) -> None:
    weights[new] = weights.pop(old)


# How a good decoder is spoilt, by its weights or its arguments, and what the refusal must name.
REFUSED = {
    "experts": ({"moe_freq": 2}, "mixtures of experts (moe_freq = 2)"),
    "modalities": ({"multiway": True}, "separate weights for each modality (multiway = True)"),
    "DeepNorm": ({"deepnorm": True}, "scales its residuals (DeepNorm) (deepnorm = True)"),
    "norm after": ({"decoder_normalize_before": False, "subln": False}, "(decoder_normalize_before = False)"),
    "normed embeddings": ({"layernorm_embedding": True}, "normalises its embeddings (layernorm_embedding = True)"),
    "headless": ({"no_output_layer": True}, "no output layer (no_output_layer = True)"),
    "relative bias": ({"rel_pos_buckets": 32, "max_rel_pos": 128}, "relative position biases"),
    "activation": ({"activation_fn": "swish"}, "activation_fn must be one of gelu, relu, got 'swish'"),
    "no heads": ({"decoder_attention_heads": None}, "no arguments|lack decoder_attention_heads"),
    "no segments": ({"segment_length": None}, "the arguments lack segment_length"),
    "odd heads": ({"decoder_attention_heads": 5}, "decoder_embed_dim 32 is not a multiple of decoder_attention_heads 5"),
    "segments of words": ({"segment_length": "eight"}, "segment_length should be a list of integers, got 'eight'"),
    "code for segments": ({"segment_length": "__import__('os').getpid()"}, "should be a list of integers"),
    "rates short": ({"dilated_ratio": [1, 2]}, "segment_lengths has 3 entries"),
    "width of words": ({"decoder_ffn_embed_dim": "wide"}, "decoder_ffn_embed_dim should be like 3072, got 'wide'"),
    "number of flags": ({"decoder_layers": True}, "decoder_layers should be like 12, got True"),
    "flag of numbers": ({"subln": 1}, "subln should be like True, got 1"),
    "more layers": ({"decoder_layers": 3}, "lack 20 tensors (layers.2."),
    "fewer layers": ({"decoder_layers": 1}, "hold 20 tensors (layers.1."),
    "other width": ({"decoder_ffn_embed_dim": 64}, "has shape [48, 32], but with these arguments it has [64, 32]"),
    "Sub-LN unsaid": ({"subln": False}, "hold 8 tensors (layers.0."),
    "xPos unsaid": ({"xpos_rel_pos": False}, "xpos.scale, but the arguments say xpos_rel_pos = False"),
    "positions": (lambda w: w.update({"embed_positions.weight": torch.ones(64, 32)}),
                  "embeddings of absolute positions (embed_positions.weight)"),
    "encoder too": (lambda w: w.update({"encoder.embed_tokens.weight": torch.ones(97, 32)}),
                    "has one embed_tokens.weight, these weights have 2"),
    "no embedding": (lambda w: w.pop("embed_tokens.weight"), "has one embed_tokens.weight, these weights have 0|found none"),
    "missing": (lambda w: w.pop("layers.0.ffn.fc1.bias"), "lack the tensor layers.0.ffn.fc1.bias"),
    "extra": (lambda w: w.update({"layers.0.extra.weight": torch.ones(2)}), "hold the tensor layers.0.extra.weight"),
    "integers": (lambda w: w.update({"layer_norm.bias": torch.ones(32, dtype=torch.int64)}), "stored as"),
    "other scale": (lambda w: w.update({"layers.1.self_attn.xpos.scale": torch.ones(4)}), "is not the scale of xPos: 1, "),
    "scale of other heads": (lambda w: w.update({"layers.1.self_attn.xpos.scale": torch.ones(5)}), "xPos has [4] numbers"),
}  # fmt: skip


@pytest.mark.parametrize("form", ["safetensors", "bare"])
@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_converted_is_refused_by_name(tmp_path, case, form):
    spoil, message = REFUSED[case]
    weights, arguments = random_weights()
    arguments |= spoil if isinstance(spoil, dict) else {}
    if callable(spoil):
        spoil(weights)
    arguments = {name: value for name, value in arguments.items() if value is not None}
    source = FORMS[form](tmp_path / "source", weights, arguments)
    with pytest.raises(ValueError) as refusal:
        convert_torchscale(source, tmp_path / "target", **QUIET)
    assert any(part in str(refusal.value) for part in message.split("|")), refusal.value
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_sources_that_do_not_say_what_they_are_are_refused(tmp_path):
    weights, arguments = random_weights()
    folder = save_bare(tmp_path / "source", weights, arguments)
    (folder / "args.json").unlink()
    with pytest.raises(ValueError, match=r"neither does a file beside it \(longnet.json, args.json, .*--arguments"):
        convert_torchscale(folder, tmp_path / "target", **QUIET)
    (tmp_path / "mine.json").write_text(json.dumps({"lr": 1e-4}))
    with pytest.raises(ValueError, match=r"mine.json holds no arguments of a LongNetDecoder"):
        convert_torchscale(folder, tmp_path / "target", arguments=tmp_path / "mine.json", **QUIET)
    with pytest.raises(ValueError, match="absent.json is missing"):
        convert_torchscale(folder, tmp_path / "target", arguments=tmp_path / "absent.json", **QUIET)
    torch.save(weights, folder / "other.pt")
    with pytest.raises(
        ValueError, match=r"should hold one file of a decoder's weights, found longnet.bin, other.pt; name"
    ):
        convert_torchscale(folder, tmp_path / "target", **QUIET)
    (tmp_path / "mine.json").write_text(json.dumps({"args": arguments}))
    convert_torchscale(
        folder / "other.pt", tmp_path / "target", arguments=tmp_path / "mine.json", verify=False, **QUIET
    )
    (folder / "other.pt").write_bytes((folder / "other.pt").read_bytes()[:5000])
    with pytest.raises(ValueError, match="truncated"):
        convert_torchscale(folder / "other.pt", tmp_path / "target", overwrite=True, **QUIET)
    with pytest.raises(ValueError, match="nosuch.pt is missing"):
        convert_torchscale(folder / "nosuch.pt", tmp_path / "again", **QUIET)
    with pytest.raises(ValueError, match=r"mine.json is no file of weights \(.safetensors, .bin, .pt, .pth\)"):
        convert_torchscale(tmp_path / "mine.json", tmp_path / "again", **QUIET)
    with pytest.raises(ValueError, match="is a file, which has no revision v2"):
        convert_torchscale(folder / "longnet.bin", tmp_path / "again", revision="v2", **QUIET)
    with pytest.raises(ValueError, match="holds no state dict"):
        torch.save([1, 2], folder / "other.pt")
        convert_torchscale(folder / "other.pt", tmp_path / "again", **QUIET)


def test_the_command_plans_converts_and_can_be_repeated(tmp_path, capsys):
    source = save_fairseq(tmp_path / "source", *random_weights())
    given = [str(source), str(tmp_path / "target"), "--from", "torchscale"]
    assert main([*given, "--dry-run"]) == 0
    plan = capsys.readouterr().out
    assert "LongNetDecoder" in plan and "positions  xPos, theta 10000, scale base 512" in plan
    assert max(map(len, plan.splitlines()[1:])) <= 80  # the first names the source
    assert not (tmp_path / "target").exists()
    assert main([*given, "--dtype", "float64"]) == 0
    report = json.loads((tmp_path / "target" / "conversion_report.json").read_text())
    program, *arguments = shlex.split(report["command"])
    shutil.rmtree(tmp_path / "target")
    assert program == "longnet-convert" and main([*arguments, "--quiet"]) == 0
    assert json.loads((tmp_path / "target" / "conversion_report.json").read_text()) == report
    assert {"backbone_magneto.py", "xpos_decay.py", "README.md"} <= set(os.listdir(tmp_path / "target"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--from", "fairseq"], "invalid choice"),
        (["--from", "torchscale", "--to-dense"], "--to-dense does not go with this kind of conversion"),
        (["--from", "torchscale", "--adapter", "x"], "--adapter does not go with this kind of conversion"),
        (["--from", "torchscale", "--context", "64"], "--context does not go with this kind of conversion"),
        (["--arguments", "args.json"], "--arguments does not go with this kind of conversion"),
    ],
)
def test_options_of_another_conversion_are_refused(tmp_path, capsys, options, message):
    source = save_bare(tmp_path / "source", *random_weights())
    try:
        status = main([str(source), str(tmp_path / "target"), *options])
    except SystemExit as end:
        status = end.code
    assert status == 1
    assert message in capsys.readouterr().err
    assert not (tmp_path / "target").exists()
