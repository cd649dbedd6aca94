"""The command longnet-convert: help that fits a terminal, one line per failure, progress for people."""

import inspect
import io
import json
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from checkpoints import edit_json, make_checkpoint

from conversion import convert_adapter, convert_checkpoint, convert_to_dense, convert_torchscale
from conversion.cli import build_parser, main


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("shared") / "source"
    make_checkpoint(folder)
    return folder


# As ``python -m conversion``; transformers imports these where they are installed, which may complain on stderr.
RUN = (
    "import runpy, sys; sys.modules['torchao'] = sys.modules['bitsandbytes'] = None; "
    "runpy.run_module('conversion', run_name='__main__')"
)


def run(*arguments, **settings) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-c", RUN, *map(str, arguments)], capture_output=True, text=True, **settings
    )


def test_a_conversion_prints_its_plan_and_outcome_and_nothing_on_stderr(source, tmp_path):
    target = tmp_path / "target"
    options = [
        "--context",
        "128",
        "--segment-lengths",
        "32,128",
        "--dilation-rates",
        "1,2",
        "--max-shard-size",
        "20KB",
    ]
    # transformers logs a warning that 4 is not 128 / 64; here it must not
    rope = ["--rope", '{"rope_type": "yarn", "factor": 4.0}']
    result = run(source, target, *options, *rope)
    assert (result.returncode, result.stderr) == (0, "")
    for line in (
        "segments   32, 128",
        "rates      1, 2",
        "positions  RoPE yarn, theta 10000, factor 4",
        "at 128 tokens:",
    ):
        assert line in result.stdout.splitlines()
    assert "verified   logits differ by at most" in result.stdout
    assert result.stdout.splitlines()[-1] == f"wrote      {target}"
    config = json.loads((target / "config.json").read_text())
    assert (config["segment_lengths"], config["dilation_rates"]) == ([32, 128], [1, 2])
    assert config["max_position_embeddings"] == 128
    assert config["rope_parameters"]["factor"] == 4.0
    assert (target / "model.safetensors.index.json").exists()


def test_a_failure_is_one_line_on_stderr_and_status_1(tmp_path):
    offline = os.environ | {"HF_HUB_CACHE": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "1"}
    result = run("org/absent", tmp_path / "target", env=offline)
    assert result.returncode == 1
    assert len(result.stderr.splitlines()) == 1
    expected = "longnet-convert: error: org/absent is neither a folder nor a model that the Hub hands out: "
    assert result.stderr.startswith(expected)
    assert not (tmp_path / "target").exists()


def test_a_hub_model_is_converted_from_the_cache_and_named_in_the_card(source, tmp_path):
    repo = tmp_path / "hub" / "models--org--tiny-llama"
    snapshot = repo / "snapshots" / "0123abcd"
    snapshot.mkdir(parents=True)
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text("0123abcd")
    (repo / "blobs").mkdir()
    for path in source.iterdir():
        (repo / "blobs" / path.name).write_bytes(path.read_bytes())
        (snapshot / path.name).symlink_to(f"../../blobs/{path.name}")
    environment = os.environ | {"HF_HUB_CACHE": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "1"}
    result = run("org/tiny-llama", tmp_path / "target", "--revision", "main", env=environment)
    assert (result.returncode, result.stderr) == (0, "")
    report = json.loads((tmp_path / "target" / "conversion_report.json").read_text())
    assert report["source"] == {"name": "org/tiny-llama", "revision": "0123abcd", "architecture": "LlamaForCausalLM"}
    card = (tmp_path / "target" / "README.md").read_text()
    assert "base_model: org/tiny-llama" in card
    assert "https://huggingface.co/org/tiny-llama" in card
    weights = tmp_path / "target" / "model.safetensors"
    assert weights.is_file() and not weights.is_symlink()


def test_the_report_holds_the_command_that_repeats_the_conversion(source, tmp_path):
    given = [str(source), str(tmp_path / "a target"), "--quiet", "--no-verify"]
    options = [
        "--context=256",
        "--local=16",
        "--dense-layers=1",
        "--dtype=float64",
        "--rope",
        '{"rope_type": "default"}',
    ]
    assert main([*given, *options]) == 0
    report = json.loads((tmp_path / "a target" / "conversion_report.json").read_text())
    program, *arguments = shlex.split(report["command"])
    assert program == "longnet-convert"
    shutil.rmtree(tmp_path / "a target")
    assert main([*arguments, "--quiet"]) == 0
    assert json.loads((tmp_path / "a target" / "conversion_report.json").read_text()) == report
    assert report["pattern"]["segment_lengths"] == [16, 32, 64, 128, 256]


def test_the_revision_asked_for_is_the_one_downloaded(source, tmp_path, monkeypatch):
    def download(repo_id, revision, allow_patterns):
        assert (repo_id, revision) == ("org/tiny-llama", "v2")
        assert {"config.json", "model*.safetensors", "tokenizer*"} <= set(allow_patterns)
        return str(source)

    monkeypatch.setattr("conversion.hub.snapshot_download", download)
    arguments = ["org/tiny-llama", str(tmp_path / "target"), "--revision", "v2", "--quiet", "--no-verify"]
    assert main(arguments) == 0


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_progress_bars_show_on_a_terminal_only(source, tmp_path, monkeypatch):
    for stderr, shown in ((Terminal(), True), (io.StringIO(), False)):
        monkeypatch.setattr(sys, "stderr", stderr)
        assert main([str(source), str(tmp_path / f"target{shown}")]) == 0
        assert ("writing weights: 100%" in stderr.getvalue()) == shown
        assert ("verifying logits: 100%" in stderr.getvalue()) == shown


FAILURES = {
    "no arguments": ([], "the following arguments are required: SOURCE, TARGET"),
    "unknown option": (["{source}", "{target}", "--fast"], "unrecognized arguments: --fast"),
    "not integers": (["{source}", "{target}", "--segment-lengths", "32;64"], "'32;64' is not a list of integers"),
    "no such RoPE": (["{source}", "{target}", "--rope", "spiral"], "one of yarn, linear, ntk, llama3, none, got 'spiral'"),
    "no such layers": (["{source}", "{target}", "--dense-layers", "early"], "indices of layers or 'late', got 'early'"),
    "late and a number": (["{source}", "{target}", "--dense-layers", "late,1"],
                          "'late,1' is neither late nor a list of layer numbers, from 0 on, such as 3,7"),
    "a layer twice": (["{source}", "{target}", "--dense-layers", "1,0,1"],
                      "dense_layers (--dense-layers) names layer 1 more than once"),
    "shards of words": (["{source}", "{target}", "--max-shard-size", "5 apples"], "max_shard_size must be bytes or a size"),
    "not JSON": (["{source}", "{target}", "--rope", "[yarn"], "'[yarn' is not JSON"),
    "not a JSON object": (["{source}", "{target}", "--rope", "[4]"], "'[4]' is not a JSON object"),
    "bad preset": (["{source}", "{target}", "--preset", "sparse"], "preset must be one of"),
    "not nested": (["{source}", "{target}", "--segment-lengths", "32,48", "--dilation-rates", "1,2"],
                   "does not divide the next one, 48; or choose preset=\"paper\" (--preset paper)"),
    "no source": (["{target}/absent", "{target}"], "is not a folder"),
    "target exists": (["{source}", "{source}"], "exists already; choose another target or pass overwrite (--overwrite)"),
    "dry run of no source": (["{target}/absent", "{target}", "--dry-run"], "is not a folder"),
    "dry run, target exists": (["{source}", "{source}", "--dry-run"], "exists already; choose another target or pass"),
    "dry run, target in the source": (["{source}", "{source}/a/b", "--dry-run"], "must not be or contain one another"),
    "dry run, target in a file": (["{source}", "{source}/config.json/a", "--dry-run"], "config.json is not a folder"),
    "dry run, no conversion": (["{source}", "{source}", "--dry-run", "--overwrite"], "is no checkpoint folder of a conv"),
    "dry run, no repository": (["{source}", "{target}", "--dry-run", "--push-to-hub", "a/b/c"], "names no repository"),
}  # fmt: skip


@pytest.mark.parametrize("case", FAILURES)
def test_every_failure_is_one_line_with_status_1(source, tmp_path, capsys, case):
    arguments, message = FAILURES[case]
    arguments = [part.format(source=source, target=tmp_path / "target") for part in arguments]
    try:
        status = main(arguments)
    except SystemExit as exit:  # argparse's own way out
        status = exit.code
    assert status == 1
    printed = capsys.readouterr()
    assert len(printed.err.splitlines()) == 1
    assert printed.err.startswith("longnet-convert: error: ")
    assert message in printed.err
    assert not (tmp_path / "target").exists()


def test_a_message_of_several_lines_becomes_one(tmp_path, capsys):
    make_checkpoint(tmp_path / "source")
    edit_json(tmp_path / "source" / "config.json", hidden_size="wide")
    capsys.readouterr()
    assert main([str(tmp_path / "source"), str(tmp_path / "target")]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert "hidden_size" in line


def test_a_read_only_place_is_one_line_too(source, capsys):
    assert main([str(source), "/proc/target", "--quiet"]) == 1
    printed = capsys.readouterr()
    assert len(printed.err.splitlines()) == 1
    assert "/proc" in printed.err


@pytest.mark.parametrize("options", [[], ["--dry-run"], ["--overwrite"]], ids=str)
def test_a_folder_that_may_not_be_written_to_is_named_before_the_source_is_read(
    source, tmp_path, capsys, monkeypatch, options
):
    (tmp_path / "a").mkdir()
    monkeypatch.setattr("os.access", lambda path, mode: Path(path) != tmp_path / "a")  # root may write everywhere
    monkeypatch.setattr("conversion.plan_family.find_folder", lambda *source: pytest.fail("was read"))
    target = tmp_path / "a" / ("b" if "--overwrite" in options else "b/target")
    if "--overwrite" in options:
        target.mkdir()
    assert main([str(source), str(target), *options]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.endswith(
        f"{target} cannot be created because {tmp_path / 'a'} may not be written to; choose another target"
    )
    assert not any(target.parent.glob(".*")) and not (tmp_path / "a" / "b" / "target").exists()


def test_a_dry_run_looks_for_room_unless_a_killed_run_will_make_some(source, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=10_000))
    assert main([str(source), str(tmp_path / "a" / "target"), "--dry-run"]) == 1
    assert f"{tmp_path} has 10 kB free, but the weights need 136 kB" in capsys.readouterr().err
    (tmp_path / ".target.partial").mkdir()
    assert main([str(source), str(tmp_path / "target"), "--dry-run"]) == 0
    assert [path.name for path in tmp_path.iterdir()] == [".target.partial"]


def test_a_dry_run_with_overwrite_is_of_what_may_be_replaced(source, tmp_path, capsys):
    arguments = [str(source), str(tmp_path / "target"), "--quiet"]
    assert main([*arguments, "--no-verify"]) == 0
    assert main([*arguments, "--dry-run", "--overwrite"]) == 0
    assert main([*arguments, "--dry-run"]) == 1
    printed = capsys.readouterr()
    assert printed.out == "" and "exists already" in printed.err


def test_debug_shows_the_traceback(source, tmp_path):
    with pytest.raises(ValueError, match="is not a folder"):
        main([str(tmp_path / "absent"), str(tmp_path / "target"), "--debug"])


def test_an_interrupt_leaves_nothing_and_says_so(source, tmp_path, capsys, monkeypatch):
    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr("conversion.pipeline.copy_weights", interrupt)
    assert main([str(source), str(tmp_path / "target"), "--quiet"]) == 1
    assert capsys.readouterr().err == "longnet-convert: error: interrupted; nothing was written\n"
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_names_the_target_and_leaves_nothing(source, tmp_path):
    limit = "import resource, signal, sys; signal.signal(signal.SIGXFSZ, signal.SIG_IGN); "
    limit += "resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, resource.RLIM_INFINITY)); "
    command = [sys.executable, "-c", limit + RUN, source, tmp_path / "target", "--quiet"]
    finished = subprocess.run(command, capture_output=True, text=True)
    (line,) = finished.stderr.splitlines()
    said = f"longnet-convert: error: {tmp_path / 'target'} is not written, its disk has no room (File too large; "
    assert finished.returncode == 1 and line.startswith(said) and line.endswith("choose a target elsewhere")
    assert list(tmp_path.iterdir()) == []


def interrupted_upload(self, **options):
    raise KeyboardInterrupt


def test_an_interrupted_upload_says_that_the_target_is_finished_and_how_to_go_on(
    source, tmp_path, capsys, monkeypatch
):
    target = tmp_path / "a target"
    command = [str(source), str(target), "--quiet", "--no-verify", "--push-to-hub", "me/x"]
    monkeypatch.setattr("huggingface_hub.HfApi.create_repo", lambda self, repo_id, **options: None)
    monkeypatch.setattr("huggingface_hub.HfApi.upload_folder", interrupted_upload)
    assert main(command) == 1
    assert capsys.readouterr().err == (
        f"longnet-convert: error: interrupted; {target} is finished, but its upload to me/x is not; upload it with: "
        f"hf upload --private me/x '{target}' . --delete 'model*.safetensors*' --delete 'pytorch_model*'\n"
    )
    assert (target / "model.safetensors").exists() and [path.name for path in tmp_path.iterdir()] == ["a target"]
    monkeypatch.setattr("huggingface_hub.HfApi.upload_folder", lambda self, **options: None)
    assert main([*command, "--overwrite"]) == 0


def test_an_interrupt_after_the_target_appeared_does_not_say_that_there_is_none(source, tmp_path, capsys, monkeypatch):
    def interrupt(verification):
        raise KeyboardInterrupt

    monkeypatch.setattr("conversion.pipeline.describe_outcome", interrupt)
    assert main([str(source), str(tmp_path / "target"), "--no-verify"]) == 1
    assert capsys.readouterr().err == f"longnet-convert: error: interrupted; {tmp_path / 'target'} is finished\n"


def test_dry_run_prints_the_plan_and_writes_nothing(source, tmp_path, capsys):
    assert main([str(source), str(tmp_path / "target"), "--dry-run", "--context", "1024"]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert "segments   64, 128, 256, 512, 1,024" in printed
    assert any(line.startswith("KV cache ") for line in printed)
    assert any(line.startswith("attention ") for line in printed)
    assert list(tmp_path.iterdir()) == []


def test_a_context_that_no_layer_reaches_is_noted(source, tmp_path, capsys):
    options = ["--dry-run", "--segment-lengths", "32,64", "--context", "1024"]
    note = "no layer reaches the whole context of 1,024 tokens, the longest segment has 64"
    for more, noted in (([], True), (["--dense-layers", "late"], False)):
        assert main([str(source), str(tmp_path / "target"), *options, *more]) == 0
        assert (note in " ".join(capsys.readouterr().out.split())) == noted


def test_a_shard_size_may_be_a_plain_number(source, tmp_path):
    target = tmp_path / "target"
    assert main([str(source), str(target), "--quiet", "--no-verify", "--max-shard-size", "20000"]) == 0
    assert (target / "model.safetensors.index.json").exists()


def test_the_help_names_every_dtype():
    assert all(name in build_parser().format_help() for name in ("float64", "float32", "float16", "bfloat16"))


def test_quiet_prints_nothing(source, tmp_path, capsys):
    assert main([str(source), str(tmp_path / "target"), "--quiet", "--no-verify"]) == 0
    assert capsys.readouterr() == ("", "")
    assert json.loads((tmp_path / "target" / "conversion_report.json").read_text())["verification"] is None


def test_overwrite_replaces_the_target(source, tmp_path):
    arguments = [str(source), str(tmp_path / "target"), "--quiet", "--no-verify"]
    assert main([*arguments, "--segment-lengths", "32,64"]) == 0
    assert main([*arguments, "--overwrite"]) == 0
    assert json.loads((tmp_path / "target" / "config.json").read_text())["segment_lengths"] == [64, 128, 256]


def test_plan_and_help_fit_80_columns(source, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make_checkpoint(Path("notable"), num_key_value_heads=1)
    edit_json(Path("notable/config.json"), auto_map={"AutoModelForCausalLM": "code.Model"}, dtype="bfloat16")
    assert main(["notable", "target", "--dry-run", "--preset", "paper"]) == 0
    plan = capsys.readouterr().out
    assert plan.count("note ") == 4
    for text in (plan, build_parser().format_help()):
        assert max(map(len, text.splitlines())) <= 80


def test_help_names_every_option_of_every_conversion():
    not_arguments = {"help", "dry_run", "debug", "quiet", "to_dense", "from"}
    options = {action.dest for action in build_parser()._actions} - not_arguments
    functions = (convert_checkpoint, convert_to_dense, convert_torchscale, convert_adapter)
    arguments = set().union(*(inspect.signature(function).parameters for function in functions))
    assert options == arguments - {"progress"}


# A pipe whose reader has gone, and a full disk, as stdout of a process of its own.
CLOSED = (
    "import os, sys; from conversion.cli import main; read, write = os.pipe(); os.close(read); os.dup2(write, 1); "
)
UPLOAD = (
    "import conversion.pipeline; "
    "conversion.pipeline.push_folder = lambda folder, *rest: (folder.parent / 'uploaded').touch(); "
)
FULL = "import os, sys; from conversion.cli import main; os.dup2(os.open('/dev/full', os.O_WRONLY), 1); "


@pytest.mark.parametrize(("stdout", "told"), [(CLOSED, ""), (FULL, "stdout takes no more: No space left on device")])
def test_a_conversion_is_finished_and_uploaded_where_nobody_reads_what_it_prints(source, tmp_path, stdout, told):
    arguments = [source, tmp_path / "target", "--push-to-hub", "me/x"]
    hidden = "import sys; sys.modules['torchao'] = sys.modules['bitsandbytes'] = None; "
    script = hidden + stdout + UPLOAD + "sys.exit(main(sys.argv[1:]))"
    finished = subprocess.run([sys.executable, "-c", script, *arguments], capture_output=True, text=True)
    assert finished.returncode == 0, finished.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["target", "uploaded"]
    assert finished.stderr.splitlines() == ([told] if told else [])
    planned = subprocess.run(
        [sys.executable, "-c", script, source, tmp_path / "planned", "--dry-run"], capture_output=True, text=True
    )
    assert (planned.returncode, planned.stderr.splitlines()) == ((1, [told]) if told else (0, []))
