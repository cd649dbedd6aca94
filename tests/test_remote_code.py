"""Saved checkpoints carry their code: they load with trust_remote_code where the package is not installed.

A Hub download is loaded by other rules than a local folder (every file's imports are checked), so both are tried.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from tiny_models import random_tokens, tiny_model


NOT_INSTALLED = """
import importlib.abc, json, sys

class NotInstalled(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name.split(".")[0] in ("modeling_longnet", "conversion"):
            raise ModuleNotFoundError(f"{name} is not installed here")

sys.meta_path.insert(0, NotInstalled())
import torch
"""
LOAD = (
    NOT_INSTALLED
    + """
from transformers import (
    AutoModel, AutoModelForCausalLM, AutoModelForQuestionAnswering, AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)

source, again = sys.argv[1:]
tokens = torch.tensor(json.loads(sys.stdin.read()))
# The heads first: once AutoModel has loaded a checkpoint it knows the class, and hides a head that asks AutoModel for it.
for auto, shape in (
    (AutoModelForSequenceClassification, (1, 3)),
    (AutoModelForTokenClassification, (1, tokens.shape[1], 3)),
    (AutoModelForQuestionAnswering, (1, tokens.shape[1])),
):
    output = auto.from_pretrained(source, trust_remote_code=True, num_labels=3)(tokens)
    assert (output.start_logits if auto is AutoModelForQuestionAnswering else output.logits).shape == shape
model = AutoModelForCausalLM.from_pretrained(source, trust_remote_code=True)
assert "transformers_modules" in type(model).__module__, type(model)
generated = model.generate(tokens, max_new_tokens=20, do_sample=False, eos_token_id=None)
base = AutoModel.from_pretrained(source, trust_remote_code=True)
assert type(base).__name__ == "LongNetModel"
model.save_pretrained(again)
reloaded = AutoModelForCausalLM.from_pretrained(again, trust_remote_code=True)
assert torch.equal(reloaded(tokens).logits, model(tokens).logits)
print("RESULT", json.dumps(generated.tolist()))
"""
)


TRAIN = (
    NOT_INSTALLED
    + """
from peft import IA3Config, LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

source, folder = sys.argv[1:]
tokens = torch.tensor(json.loads(sys.stdin.read()))
rows = [{"input_ids": row, "labels": row} for row in tokens]
model = AutoModelForCausalLM.from_pretrained(source, trust_remote_code=True)
assert "transformers_modules" in type(model).__module__, type(model)
arguments = TrainingArguments(folder, use_cpu=True, report_to="none", label_smoothing_factor=0.3)
loss = Trainer(model, arguments, eval_dataset=rows).evaluate()["eval_loss"]
targets = []
for config in (LoraConfig(task_type="CAUSAL_LM"), IA3Config(task_type="CAUSAL_LM")):
    model = AutoModelForCausalLM.from_pretrained(source, trust_remote_code=True)
    targets.append(sorted(get_peft_model(model, config).peft_config["default"].target_modules))
print("RESULT", json.dumps([loss, targets]))
"""
)


def load_without_the_package(
    source: str, tokens: torch.Tensor, tmp_path: Path, script: str = LOAD, **environment
) -> list:
    """Generate with the checkpoint, or run another script, in a fresh process that cannot import this package."""
    process = subprocess.run(
        [sys.executable, "-c", script, source, str(tmp_path / "again")],
        input=json.dumps(tokens.tolist()),
        capture_output=True,
        text=True,
        cwd="/",
        env={**os.environ, "PYTHONPATH": "", "HF_HOME": str(tmp_path / "hf_home"), "HF_HUB_OFFLINE": "1"}
        | environment,
    )
    assert process.returncode == 0, process.stderr[-3000:]
    return json.loads(process.stdout.split("RESULT")[1])


@pytest.mark.parametrize(
    ("preset", "backbone", "place"),
    [
        ("paper", "llama", "hub"),
        ("retrofit", "llama", "folder"),
        ("paper", "magneto", "folder"),
        ("paper", "magneto", "hub"),
    ],
)
def test_a_saved_checkpoint_runs_where_the_package_is_not_installed(preset, backbone, place, tmp_path):
    model, tokens = tiny_model(preset, backbone=backbone).float(), random_tokens(1, 40)
    folder = tmp_path / "checkpoint"
    model.save_pretrained(folder)
    expected = model.generate(tokens, max_new_tokens=20, do_sample=False, eos_token_id=None).tolist()
    source = str(folder)
    if place == "hub":  # the layout that huggingface_hub leaves behind after a download
        repository = tmp_path / "hf_home" / "hub" / "models--someone--longnet"
        (repository / "refs").mkdir(parents=True)
        (repository / "refs" / "main").write_text("0" * 40)
        shutil.copytree(folder, repository / "snapshots" / ("0" * 40))
        shutil.rmtree(folder)
        source = "someone/longnet"
    assert load_without_the_package(source, tokens, tmp_path) == expected
    shipped = {path.name for path in (tmp_path / "again").iterdir()}
    assert {"modeling_longnet.py", "configuration_longnet.py", "dilation_pattern.py"} <= shipped


def test_a_model_that_came_with_its_code_trains_on_shifted_labels_and_tells_peft_its_modules(tmp_path):
    model, tokens = tiny_model().float(), random_tokens(2, 40)
    model.save_pretrained(tmp_path / "checkpoint")
    loss, targets = load_without_the_package(str(tmp_path / "checkpoint"), tokens, tmp_path, TRAIN)
    logits = model(tokens).logits[:, :-1].flatten(0, 1)
    expected = F.cross_entropy(logits, tokens[:, 1:].flatten(), label_smoothing=0.3).item()
    assert loss == pytest.approx(expected, rel=1e-4)
    assert targets == [["k_proj", "o_proj", "q_proj", "v_proj"], ["down_proj", "k_proj", "v_proj"]]


def test_every_class_saves_an_auto_map_for_all_of_them(tmp_path):
    from modeling_longnet import LongNetForTokenClassification

    tiny_model(model_class=LongNetForTokenClassification).save_pretrained(tmp_path)
    auto_map = json.loads((tmp_path / "config.json").read_text())["auto_map"]
    assert auto_map["AutoModelForCausalLM"] == "modeling_longnet.LongNetForCausalLM"
    assert len(auto_map) == 6
    for reference in auto_map.values():
        module, name = reference.split(".")
        assert f"class {name}(" in (tmp_path / f"{module}.py").read_text()
