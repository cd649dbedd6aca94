"""longnet-inspect: its averages are counts of what ``DilationPattern.reach`` lists, its costs the pattern's own."""

import json
import math
import re
import subprocess
import sys
from dataclasses import replace

import pytest
from checkpoints import make_checkpoint
from tiny_models import tiny_config
from transformers import Qwen3Config

from conversion.plan_family import default_config, plan_conversion
from inspection import ModelShape, measure_costs, measure_coverage, suggest_pattern
from inspection.cli import main
from inspection.coverage import count_reached, reaching_branches
from inspection.plots import drawn_distances
from modeling_longnet import DilationPattern
from modeling_longnet.dilation_pattern import PRESETS


PATTERNS = {
    **{preset: DilationPattern.preset(preset, (8, 16, 32), (1, 2, 4)) for preset in PRESETS},
    "rates that divide nothing": DilationPattern((6, 20), (2, 3)),
    "no undilated branch": DilationPattern((16,), (4,)),
    "blind at edges": DilationPattern((12,), (5,), dilate_queries=False),
    "a head that keeps nothing": DilationPattern((3, 6), (3, 7), dilate_queries=False, window="sliding"),
}


@pytest.mark.parametrize("pattern", PATTERNS.values(), ids=PATTERNS)
def test_coverage_counts_what_reach_lists(pattern):
    heads, period = 4, math.lcm(*pattern.segment_lengths)
    coverage = measure_coverage(pattern, heads)
    assert coverage.exact
    queries = range(2 * period, 3 * period)
    reached = [[set(pattern.reach(q, g, num_kv_heads=heads)) for g in range(heads)] for q in queries]
    for column, distance in enumerate(coverage.distances):
        for g in range(heads):
            count = sum(q - distance in seen[g] for q, seen in zip(queries, reached))
            assert coverage.per_head[g][column] == count / period
        count = sum(any(q - distance in keys for keys in seen) for q, seen in zip(queries, reached))
        assert coverage.any_head[column] == count / period
    assert coverage.blind == pytest.approx(sum(not keys for seen in reached for keys in seen) / period / heads)
    missed = sum(not any(q - 1 in keys for keys in seen) for q, seen in zip(queries, reached))
    assert coverage.nearest_missed == missed / period


@pytest.mark.parametrize("pattern", PATTERNS.values(), ids=PATTERNS)
def test_counting_without_listing_gives_the_length_of_the_list(pattern):
    for query in range(100):
        for g in range(5):
            assert count_reached(pattern, query, g, 5) == len(pattern.reach(query, g, num_kv_heads=5)), (query, g)


@pytest.mark.parametrize("pattern", PATTERNS.values(), ids=PATTERNS)
def test_what_is_drawn_holds_every_near_key_and_some_of_each_branch(pattern):
    longest = max(pattern.segment_lengths)
    for factor in (1, 50):
        larger = replace(pattern, segment_lengths=tuple(factor * w for w in pattern.segment_lengths))
        query = 2 * factor * longest - 1
        for g in range(4):
            drawn = drawn_distances(larger, query, g, 4)
            assert set(range(min(64, factor * longest))) <= set(drawn) and drawn[-1] < factor * longest
            for key in (query - d for d in drawn if 64 <= d < factor * longest - 1):
                kept = [(key % w) % r == larger.offset(i, g, 4) for i, (w, r) in enumerate(larger.branches)]
                assert any(kept), key
            listed = larger.reach(query, g, num_kv_heads=4)
            found = [i for d in drawn for i in reaching_branches(larger, query, query - d, g, 4)]
            if factor == 1:
                assert len(found) == len(listed)
            for i in range(len(larger.branches)):
                single = set(listed) - set(replace(larger, **shorter(larger, i)).reach(query, g, num_kv_heads=4))
                assert not single or i in found


def shorter(pattern: DilationPattern, i: int) -> dict[str, tuple[int, ...]]:
    """Fields of a pattern without branch ``i`` (one that reaches its own token is left where there is no other)."""
    without = [branch for k, branch in enumerate(pattern.branches) if k != i] or [(1, 1)]
    return {"segment_lengths": tuple(w for w, _ in without), "dilation_rates": tuple(r for _, r in without)}


@pytest.mark.parametrize("pattern", PATTERNS.values(), ids=PATTERNS)
def test_what_is_reached_through_a_branch_is_what_a_pattern_without_it_lacks(pattern):
    heads, period = 6, math.lcm(*pattern.segment_lengths)  # more than there are offsets: some heads are alike
    coverage = measure_coverage(pattern, heads)
    up_to = [
        replace(pattern, segment_lengths=pattern.segment_lengths[:i], dilation_rates=pattern.dilation_rates[:i])
        for i in range(1, len(pattern.branches) + 1)
    ]
    counts = []
    for column, distance in enumerate(coverage.distances):
        before = 0
        for i, shorter in enumerate(up_to):
            places = ((q, g) for q in range(2 * period, 3 * period) for g in range(heads))
            count = sum(shorter.reach(q, g, num_kv_heads=heads).count(q - distance) for q, g in places)
            counts.append(count - before)
            assert coverage.per_branch[i][column] == pytest.approx((count - before) / period / heads)
            before = count
    assert any(counts)


def test_a_sample_of_positions_stays_close_to_all_of_them(monkeypatch):
    pattern = PATTERNS["paper"]
    exact = measure_coverage(pattern, 4)
    monkeypatch.setattr("inspection.coverage.MAX_POSITIONS", 31)
    sampled = measure_coverage(pattern, 4)
    assert exact.exact and not sampled.exact
    assert sampled.mean_head == pytest.approx(exact.mean_head, abs=0.1)


def test_segments_are_blind_at_their_edges_and_windows_are_not():
    assert measure_coverage(PATTERNS["paper"], 4).nearest_missed == 1 / 8  # each first token of a segment of 8
    assert measure_coverage(PATTERNS["retrofit"], 4).nearest_missed == 0
    assert measure_coverage(PATTERNS["no undilated branch"], 1).blind == 3 / 4


def test_costs_are_the_patterns_formulas_over_all_layers():
    config = tiny_config("retrofit", dense_layers=[1])
    shape = ModelShape.of(config)
    for costs in measure_costs(shape, [5, 32, 400]):
        dense = DilationPattern((costs.length,), (1,)).attention_flops(costs.length, 4, 8, num_kv_heads=2)
        sparse = config.pattern.attention_flops(costs.length, 4, 8, num_kv_heads=2)
        assert (costs.flops, costs.dense_flops) == (dense + sparse, 2 * dense)
        per_entry = 2 * 2 * 8 * shape.bytes_per_value  # keys and values of two KV heads
        assert costs.kv_bytes == (config.pattern.cache_entries(costs.length) + costs.length) * per_entry
        assert costs.dense_kv_bytes == 2 * costs.length * per_entry


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize(("context", "budget"), [(4096, 0.3), (50_000, 0.05), (2**20, 0.01), (512, 1.0)])
def test_the_suggestion_fits_the_budget_and_a_longer_first_segment_does_not(context, budget, preset):
    pattern, share = suggest_pattern(context, budget, preset=preset)
    assert max(pattern.segment_lengths) >= context
    dense = DilationPattern((context,), (1,)).attention_flops(context, 8, 1)
    assert share == pattern.attention_flops(context, 8, 1) / dense <= budget
    first, last = pattern.segment_lengths[0], pattern.segment_lengths[-1]
    if first < last:
        longer = DilationPattern.geometric(first * 2, last, preset=preset)
        assert longer.attention_flops(context, 8, 1) / dense > budget


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize(("context", "entries"), [(4096, 700), (50_000, 4000), (2**20, 20_000), (512, 10**6)])
def test_the_suggestion_holds_no_more_than_the_cache_may(context, entries, preset):
    pattern, _ = suggest_pattern(context, cache_budget=entries, preset=preset)
    first, last = pattern.segment_lengths[0], pattern.segment_lengths[-1]
    assert last >= context and pattern.cache_entries(context) <= entries
    if first < last:
        assert DilationPattern.geometric(first * 2, last, preset=preset).cache_entries(context) > entries


@pytest.mark.parametrize(("text", "entries"), [("1MiB", 2**20 // 512), ("0.5 MB", 976), ("400000", 781)])
def test_a_budget_in_bytes_counts_all_layers_and_kv_heads(text, entries, tmp_path, capsys):
    config = tiny_config("retrofit", num_hidden_layers=4, num_key_value_heads=2, head_dim=16, dtype="bfloat16")
    config.save_pretrained(tmp_path)  # 4 layers * 2 tensors * 2 heads * 16 * 2 bytes = 512 bytes an entry
    assert main([str(tmp_path), "--kv-bytes", text, "--context", "4000"]) == 0
    pattern, _ = suggest_pattern(4000, cache_budget=entries, num_kv_heads=2)
    text = capsys.readouterr().out
    assert text.startswith(f"segment_lengths {','.join(map(str, pattern.segment_lengths))}\n")
    held, budget = pattern.cache_entries(4000) * 512, float(text.partition("KV cache of ")[2].split()[0])
    assert budget == pytest.approx(held / 1024, rel=1e-3) and held <= entries * 512


def test_dense_layers_are_named_and_counted_with_other_branches_too(tmp_path, capsys):
    shape = {"num_hidden_layers": 4, "num_key_value_heads": 2, "head_dim": 16, "dtype": "bfloat16"}
    tiny_config("retrofit", **shape, dense_layers=(3,)).save_pretrained(tmp_path)
    for options in (["--suggest", "0.5"], ["--kv-bytes", "1MB"], ["--compare"], []):
        assert main([str(tmp_path), "--context", "4000", "--lengths", "4000", *options]) == 0
        text = capsys.readouterr().out
        assert "\nlayer 3 is dense\n" in "\n" + text
        cells = re.findall(r"\(([\d.]+)x\)", text.splitlines()[-1])
        assert cells and all(float(times) <= 4 for times in cells), "one layer in four is dense"
    assert main([str(tmp_path), "--kv-bytes", "1MB", "--context", "4000"]) == 0
    text = capsys.readouterr().out
    pattern, _ = suggest_pattern(4000, cache_budget=(10**6 - 4000 * 128) // (3 * 128), num_kv_heads=2)
    assert text.startswith(f"segment_lengths {','.join(map(str, pattern.segment_lengths))}\n")
    held = (3 * pattern.cache_entries(4000) + 4000) * 128
    assert float(text.partition("KV cache of ")[2].split()[0]) == pytest.approx(held / 1024, rel=1e-3)
    assert main([str(tmp_path), "--suggest", "0.5", "--context", "4000"]) == 0
    text = capsys.readouterr().out
    pattern, share = suggest_pattern(4000, 1 / 3, num_kv_heads=2)
    assert f"attention costs {(3 * share + 1) / 4:.2%} of dense at 4000 tokens" in text
    for options, message in (
        (["--suggest", "0.25"], "1 of 4 layers are dense and alone cost 0.25 of dense attention, no less"),
        (["--kv-bytes", "500KB"], "1 of 4 layers are dense and alone hold 500 KiB at 4000 tokens, the budget is"),
    ):
        assert main([str(tmp_path), "--context", "4000", *options]) == 2
        assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([4096, 1.0, {"cache_budget": 100}], "no pattern reaches 4096 tokens with 100 cache entries per KV head"),
        ([4096, 1.0, {"cache_budget": 0}], "at least one entry per KV head, got 0"),
        ([10, 0.5], "context must be at least 64 tokens, got 10"),
        ([4096, 1.5], "between 0 and 1, got 1.5"),
        ([4096, 1e-3], "no pattern reaches 4096 tokens for 0.001 of dense attention"),
    ],
)
def test_impossible_suggestions_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        keywords = arguments.pop() if isinstance(arguments[-1], dict) else {}
        suggest_pattern(*arguments, **keywords)


def test_the_command_describes_a_checkpoint_and_a_llama_that_is_to_become_one(tmp_path, capsys):
    tiny_config("retrofit").save_pretrained(tmp_path / "longnet")
    assert main([str(tmp_path / "longnet"), "--lengths", "64,1024"]) == 0
    text = capsys.readouterr().out
    assert "pattern: interleaved offsets, all queries, sliding windows, overlaps counted once" in text
    assert "       32      4                  8   0 1" in text
    costs = measure_costs(ModelShape.of(tiny_config("retrofit")), [1024])[0]
    assert f"1,024{f'{costs.flops:.3g} ({costs.dense_flops / costs.flops:.1f}x)':>26}" in text
    make_checkpoint(tmp_path / "llama")
    capsys.readouterr()
    assert main([str(tmp_path / "llama"), "--suggest", "0.2", "--context", "2000"]) == 0
    pattern, share = suggest_pattern(2000, 0.2, num_kv_heads=2)
    text = capsys.readouterr().out
    assert text.startswith(f"segment_lengths {','.join(map(str, pattern.segment_lengths))}\n")
    assert f"attention costs {share:.2%} of dense at 2000 tokens" in text


@pytest.mark.parametrize("file", ["", "config.json"])
def test_a_llama_is_shown_as_the_converter_would_make_it(file, tmp_path, capsys):
    make_checkpoint(tmp_path / "llama", max_position_embeddings=64)
    source = tmp_path / "llama" / file
    assert main([str(source)]) == 0
    text = capsys.readouterr().out
    config = plan_conversion(tmp_path / "llama").config
    assert text.startswith(f"{source} is a LlamaForCausalLM; shown is what longnet-convert makes of it by default\n")
    assert "all queries, sliding windows, overlaps counted once" in text
    for w, r in config.pattern.branches:
        assert f"\n{w:>9} {r:>6} " in text
    fields, architecture = default_config(json.loads((tmp_path / "llama" / "config.json").read_text()))
    assert architecture == "LlamaForCausalLM"
    for (
        name,
        value,
    ) in fields.to_dict().items():  # what only a conversion knows: its source, and what weights there are
        if name not in ("source_config", "trained_context", "dtype", "architectures"):
            assert value == config.to_dict()[name], name
    assert main([str(source), "--segment-lengths", "16,48", "--dilation-rates", "1,3"]) == 0
    assert "longnet-convert makes of it with these branches\n" in capsys.readouterr().out


def test_a_configuration_saved_without_a_model_is_read_too(tmp_path, capsys):
    window = {"use_sliding_window": True, "sliding_window": 128, "max_window_layers": 1}
    Qwen3Config(num_hidden_layers=2, max_position_embeddings=256, **window).save_pretrained(tmp_path)
    config, _ = default_config(json.loads((tmp_path / "config.json").read_text()))
    assert config.segment_lengths[0] == 128 and config.local_layers == (1,)
    assert main([str(tmp_path)]) == 0
    assert "is a Qwen3ForCausalLM" in capsys.readouterr().out


def test_branches_that_a_sliding_window_rules_out_are_neither_shown_nor_suggested(tmp_path, capsys):
    window = {"use_sliding_window": True, "sliding_window": 128, "max_window_layers": 1}
    Qwen3Config(num_hidden_layers=2, max_position_embeddings=256, **window).save_pretrained(tmp_path)
    longer = [str(tmp_path), "--segment-lengths", "256,512", "--dilation-rates", "1,2"]
    assert main(longer) == 2
    assert "a sliding window of 128 tokens" in capsys.readouterr().err  # as longnet-convert says
    assert main([*longer, "--preset", "paper"]) == 0
    capsys.readouterr()
    for options, first in (([], "128,256,512,1024"), (["--preset", "paper"], "1024")):
        assert main([str(tmp_path), "--suggest", "1", "--context", "1000", *options]) == 0
        assert capsys.readouterr().out.startswith(f"segment_lengths {first}\n")
    with pytest.raises(ValueError, match="the first segment may have 63 tokens at most"):
        suggest_pattern(1000, longest_first=63)


def test_the_presets_stand_side_by_side_and_in_the_picture(tmp_path, capsys):
    picture = tmp_path / "presets.png"
    arguments = ["--segment-lengths", "8,16,32", "--dilation-rates", "1,2,4", "--compare", "--plot", str(picture)]
    assert main(arguments) == 0
    text = capsys.readouterr().out
    for preset in PRESETS:
        assert f"{preset}:" in text and f"{preset} FLOPs" in text
        coverage = measure_coverage(PATTERNS[preset], 32)
        assert f"{coverage.nearest_missed:.2%}" in text
    assert picture.read_bytes().startswith(b"\x89PNG") and picture.stat().st_size > 10_000


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "name a checkpoint, or give --segment-lengths and --dilation-rates"),
        (["--segment-lengths", "8,16"], "--segment-lengths and --dilation-rates go together"),
        (["--segment-lengths", "8,16", "--dilation-rates", "1"], "segment_lengths has 2 entries"),
        (["--segment-lengths", "8", "--dilation-rates", "1", "--plot", "x.pdf"], "the plot is a PNG"),
        (["empty"], "empty/config.json is missing"),
        (["./nowhere"], "./nowhere is not a folder"),
        (["nowhere"], "nowhere is neither a folder nor a model that the Hub hands out"),
        (["bert.json"], "(model_type 'bert'), which is not supported; supported: LlamaForCausalLM"),
        (["broken.json"], "broken.json is not valid JSON"),
        (["misspelt.json"], "no field 'segment_lenghts'; did you mean 'segment_lengths'?"),
        (["text.json"], "text.json holds no valid configuration: Validation error for field 'hidden_size'"),
        (["good.json", "--lengths", "0"], "at least 1, got 0"),
        (["good.json", "--context", "0"], "at least 1, got 0"),
        (["good.json", "--lengths", f"64,{2**62 + 1}"], "numbers of tokens, at most 2^62, got 4611686018427387905"),
        (["good.json", "--suggest", "1", "--context", str(2**63)], "at most 2^62, got 9223372036854775808"),
        (["headless.json"], "num_attention_heads must be at least 1, got 0"),
        (["untrained.json"], "must say how many tokens the source was trained for"),
        (["no_layers.json"], "the model has no layers (num_hidden_layers 0), so there is no attention to inspect"),
        (["float15.json"], "float15.json holds no valid configuration: module 'torch' has no attribute 'float15'"),
        (["good.json", "--compare", "--suggest", "0.5"], "--compare shows all presets of the given branches"),
        (["good.json", "--compare", "--preset", "paper"], "--compare shows all presets of the given branches"),
        (
            ["good.json", "--suggest", "1", "--segment-lengths", "8", "--dilation-rates", "1"],
            "find the branches; leave",
        ),
    ],
)
def test_bad_arguments_end_in_one_line(arguments, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken.json").write_text("{nope")
    for name, fields in (
        ("good", {}),
        ("bert", {"model_type": "bert"}),
        ("misspelt", {"segment_lenghts": [3]}),
        ("text", {"hidden_size": "wide"}),
        ("headless", {"num_attention_heads": 0}),
        ("untrained", {"model_type": "llama", "max_position_embeddings": 0}),
        ("no_layers", {"num_hidden_layers": 0}),
        ("float15", {"dtype": "float15"}),
    ):
        (tmp_path / f"{name}.json").write_text(json.dumps(tiny_config().to_dict() | fields))
    before = sorted(tmp_path.iterdir())
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert message in captured.err and captured.err.count("\n") == 1, captured.err
    assert captured.out == "" and sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--sugest", "0.1"], "unrecognized arguments: --sugest"),
        (["--kv-bytes", ".."], "'..' is no number of bytes; write 536870912, 512MiB or 0.5GiB"),
        (["--kv-bytes", "1XB"], "'1XB' is no number of bytes"),
        (["--segment-lengths", "2048,"], "'2048,' is not a list of integers such as 2048,4096,8192"),
        (["--suggest", "much"], "invalid float value: 'much'"),
    ],
)
def test_misspelt_options_and_values_are_named(arguments, message, capsys):
    with pytest.raises(SystemExit, match="2"):
        main(arguments)
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line


@pytest.mark.parametrize(
    ("longest", "lengths"), [(1, [4]), (3, [12]), (2**62, [2**62 >> k for k in range(7, -1, -1)])]
)
def test_the_shortest_and_the_longest_segment_have_costs_too(longest, lengths, capsys):
    assert main(["--segment-lengths", str(longest), "--dilation-rates", "1"]) == 0
    rows = capsys.readouterr().out.partition("times less than dense\n")[2].splitlines()[1:]
    assert [int(row.split()[0].replace(",", "")) for row in rows] == lengths


def test_a_picture_that_fails_leaves_the_earlier_one(tmp_path, capsys, monkeypatch):
    picture = tmp_path / "reach.png"
    picture.write_bytes(b"earlier")

    def fill_the_disk(self, target, **options):
        target.write_bytes(b"half")
        raise OSError(28, "No space left on device", str(target))

    monkeypatch.setattr("matplotlib.figure.Figure.savefig", fill_the_disk)
    assert main(["--segment-lengths", "8,16", "--dilation-rates", "1,2", "--plot", str(picture)]) == 2
    assert "No space left on device" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == [picture] and picture.read_bytes() == b"earlier"


def test_an_interrupt_is_one_line(capsys, monkeypatch):
    def interrupt(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr("inspection.cli.measure_coverage", interrupt)
    assert main(["--segment-lengths", "8,16", "--dilation-rates", "1,2"]) == 2
    assert capsys.readouterr().err == "longnet-inspect: interrupted\n"


@pytest.mark.parametrize(
    ("stdout", "status", "told"),
    [
        ("read, write = os.pipe(); os.close(read); os.dup2(write, 1)", 0, []),
        ("os.dup2(os.open('/dev/full', os.O_WRONLY), 1)", 2, ["stdout takes no more: No space left on device"]),
    ],
)
def test_a_reader_that_has_read_enough_is_no_failure_and_a_full_disk_is_one(stdout, status, told, tmp_path):
    tiny_config().save_pretrained(tmp_path)
    hidden = "import os, sys; sys.modules['torchao'] = sys.modules['bitsandbytes'] = None; "
    code = f"{hidden}from inspection.cli import main; {stdout}; sys.exit(main(sys.argv[1:]))"
    process = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True)
    assert (process.returncode, process.stderr.splitlines()) == (status, told)


def test_it_runs_as_a_module_and_needs_no_matplotlib_for_tables(tmp_path):
    tiny_config().save_pretrained(tmp_path)
    code = (
        "import sys; sys.modules['matplotlib'] = None; from inspection.cli import main; sys.exit(main(sys.argv[1:]))"
    )
    process = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    assert "share of queries" in process.stdout
    assert json.loads((tmp_path / "config.json").read_text())["segment_lengths"] == [8, 16, 32]
