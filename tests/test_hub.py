"""The Hub, over HTTP: what is pushed arrives complete, and loads by id and revision where the package is missing."""

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from checkpoints import make_checkpoint
from hub_stand_in import TOKEN, HubStandIn, hub_stand_in
from tiny_models import random_tokens, tiny_model

from modeling_longnet import LongNetForCausalLM


ROOT = Path(__file__).parents[1]

LOAD = """
import importlib.abc, json, sys

class NotInstalled(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name.split(".")[0] in ("modeling_longnet", "conversion"):
            raise ModuleNotFoundError(f"{name} is not installed here")

sys.meta_path.insert(0, NotInstalled())
import torch
from transformers import AutoModelForCausalLM

source, tokens, *revisions = sys.argv[1:]
tokens, found = torch.tensor(json.loads(tokens)), []
for revision in revisions:
    model = AutoModelForCausalLM.from_pretrained(source, revision=revision, trust_remote_code=True)
    _, owner, name, commit, _ = type(model).__module__.split(".")
    assert f"{owner}/{name}" == source
    found.append([commit, model.generate(tokens, max_new_tokens=9, do_sample=False).tolist()])
print("RESULT", json.dumps(found))
"""

PUSH = """
import json, sys
from modeling_longnet import LongNetForCausalLM

folder, repository = sys.argv[1:]
model = LongNetForCausalLM.from_pretrained(folder)
pushed = model.push_to_hub(repository, commit_message="first", private=True, tags=["longnet"])
print("RESULT", json.dumps(pushed.oid))
"""

CONVERT = """
import sys
from conversion.cli import main

main(sys.argv[1:])
print('RESULT "done"')
"""


@pytest.fixture
def hub():
    with hub_stand_in() as served:
        yield served


def client(hub: HubStandIn, tmp_path: Path, script: str, *arguments: str, with_package: bool):
    """Run a script in a fresh process whose Hub is the stand-in; huggingface_hub reads its endpoint at import."""
    environment = {
        **os.environ,
        "HF_ENDPOINT": hub.url,
        "HF_TOKEN": TOKEN,
        "HF_HOME": str(tmp_path / "hf_home"),
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_OFFLINE": "0",
        "PYTHONPATH": str(ROOT) if with_package else "",
        "OMP_NUM_THREADS": "1",
    }
    process = subprocess.run(
        [sys.executable, "-c", script, *arguments], cwd="/", env=environment, capture_output=True, text=True
    )
    assert process.returncode == 0, f"{process.stderr[-3000:]}\n{hub.requests[-5:]}"
    return json.loads(process.stdout.rpartition("RESULT")[2])


def test_a_pushed_checkpoint_loads_by_id_and_revision_where_the_package_is_not_installed(hub, tmp_path):
    model, tokens = tiny_model("retrofit").float(), random_tokens(1, 40)
    model.generation_config.eos_token_id = None
    model.save_pretrained(tmp_path / "first")
    commit = client(hub, tmp_path, PUSH, str(tmp_path / "first"), "me/tiny", with_package=True)

    repository = hub.repositories["me/tiny"]
    files = repository.commits[commit]
    assert repository.private and repository.names["main"] == commit
    code = {path.name for path in (tmp_path / "first").glob("*.py")}
    assert code >= {"modeling_longnet.py", "configuration_longnet.py", "dilation_pattern.py", "cache_longnet.py"}
    assert set(files) >= code | {"config.json", "generation_config.json", "README.md"}
    assert {name for name in files if name.endswith(".safetensors")} == {"model.safetensors"}
    for name in code:
        assert files[name] == (ROOT / "modeling_longnet" / name).read_bytes(), name
    local = hashlib.sha256((tmp_path / "first" / "model.safetensors").read_bytes()).hexdigest()
    assert hashlib.sha256(files["model.safetensors"]).hexdigest() == local
    assert "tags:" in files["README.md"].decode() and "longnet" in files["README.md"].decode()

    with torch.no_grad():  # a second commit on main: the first one has to be asked for by its name
        changed = LongNetForCausalLM.from_pretrained(tmp_path / "first")
        changed.lm_head.weight.mul_(-1)
    changed.save_pretrained(tmp_path / "second")
    repository.names["v1"] = commit
    newer = repository.commit("main", {"model.safetensors": (tmp_path / "second" / "model.safetensors").read_bytes()})
    loaded = client(hub, tmp_path, LOAD, "me/tiny", json.dumps(tokens.tolist()), "v1", "main", with_package=False)
    texts = [source.generate(tokens, max_new_tokens=9, do_sample=False).tolist() for source in (model, changed)]
    assert loaded == [[commit, texts[0]], [newer, texts[1]]]


def test_a_conversion_is_pushed_complete_with_tokenizer_and_card(hub, tmp_path):
    make_checkpoint(tmp_path / "llama")
    arguments = (str(tmp_path / "llama"), str(tmp_path / "longnet"), "--segment-lengths", "8,16")
    arguments += ("--dilation-rates", "1,2", "--push-to-hub", "me/llama-longnet")
    client(hub, tmp_path, CONVERT, *arguments, with_package=True)
    repository = hub.repositories["me/llama-longnet"]
    files = repository.commits[repository.names["main"]]
    written = {
        p.relative_to(tmp_path / "longnet").as_posix(): p for p in (tmp_path / "longnet").rglob("*") if p.is_file()
    }
    assert set(written) <= set(files)
    for name, path in written.items():
        assert files[name] == path.read_bytes(), name
    assert {"tokenizer.json", "tokenizer_config.json", "README.md", "modeling_longnet.py"} <= set(files)
    assert repository.private


def test_a_conversion_that_is_pushed_again_leaves_no_weights_of_other_shards(hub, tmp_path):
    make_checkpoint(tmp_path / "llama")
    arguments = [str(tmp_path / "llama"), str(tmp_path / "longnet"), "--segment-lengths", "8,16", "--overwrite"]
    arguments += ["--dilation-rates", "1,2", "--push-to-hub", "me/llama-longnet", "--no-verify"]
    others = {"adapter_model.safetensors": b"an adapter", "model_notes.md": b"notes"}
    for push, shards in enumerate(("5GB", "20KB", "5GB")):
        client(hub, tmp_path, CONVERT, *arguments, "--max-shard-size", shards, with_package=True)
        repository = hub.repositories["me/llama-longnet"]
        found = {name for name in repository.commits[repository.names["main"]] if name not in others}
        assert found == {path.name for path in (tmp_path / "longnet").iterdir()}
        assert shards == "5GB" or len([name for name in found if name.endswith(".safetensors")]) > 1
        if push == 0:
            repository.commit("main", others)
    assert set(others) <= set(repository.commits[repository.names["main"]])
