"""Move a LoRA adapter between a dense model and its LongNet conversion: the same tensors for another base model."""

import json
import re
import warnings
from pathlib import Path

from huggingface_hub import ModelCard
from torch import nn
from transformers import PreTrainedModel

from modeling_longnet import LongNetConfig, LongNetForCausalLM

from .atomic_folder import atomic_folder, check_target, write_report
from .families import find_family, unfuse
from .hub import check_repo_id, find_folder, interruptible_upload, push_folder
from .steps import CARRIED_FILES, carry_files, check_apart, command_line, say, versions
from .stored_model import skeleton
from .weights import StoredTensor, read_header, read_json, write_file


CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"
PREFIX = "base_model.model."  # peft's, before the names of the base model
PLAIN_STARTS = (None, True, False, "gaussian", "orthogonal")  # of init_lora_weights; the others read base weights


def convert_adapter(
    source: str | Path,
    target: str | Path,
    adapter: str | Path,
    *,
    revision: str | None = None,
    push_to_hub: str | None = None,
    overwrite: bool = False,
    progress: bool = True,
) -> dict:
    """Move a peft adapter to another base model with the same modules: a LongNet conversion, or the way back.

    The tensors stay, byte for byte; what changes is the base model that ``adapter_config.json`` names. Every tensor
    must belong to a module of the new base model and have its sizes. Updates of Phi-3's fused projections become those
    of LongNet's single ones, which is exact; the reverse is not a LoRA of the same rank, and refused. Needs peft, which
    must find in the new base model exactly the tensors that are written.

    Args:
        source: folder, or model id on the Hugging Face Hub, of a peft adapter.
        target: folder to create.
        adapter: the new base model, folder or model id; of it only config.json is read.
        revision: branch, tag or commit of a source on the Hub.
        push_to_hub: repository to upload the finished target to; created, private, if it does not exist.
        overwrite: replace an earlier conversion at ``target``, in one step at the end.
        progress: print what is done.

    Returns:
        The report that is also written to ``conversion_report.json``.

    Raises:
        ValueError: if the source is no safetensors adapter, the base model lacks what it changes, peft is not installed
            or would load something else, or the target may not be written.
    """
    given = {"adapter": str(adapter), "revision": revision, "push_to_hub": push_to_hub, "overwrite": overwrite}
    command = command_line(source, target, given)
    target = Path(target).resolve()
    check_target(target, overwrite)
    check_repo_id(push_to_hub)
    folder, commit = find_folder(source, revision, [CONFIG_NAME, WEIGHTS_NAME, "README.md", *CARRIED_FILES])
    check_apart(folder, target)
    fields = read_json(folder / CONFIG_NAME)
    stored = read_header(folder / WEIGHTS_NAME)
    base_folder, base_commit = find_folder(adapter, None, ["config.json"])
    base = _build_base(read_json(base_folder / "config.json"))
    projections = _projections_before(base)
    _check_rows(projections, stored)
    tensors = unfuse(projections, stored)
    check_modules(base, tensors)
    if tensors.keys() != stored.keys():
        _check_start(fields)
    fields |= _unfused_fields(fields, projections, base.config.num_hidden_layers)

    name = str(adapter) if base_commit else str(base_folder)
    fields |= {"base_model_name_or_path": name, "revision": None}
    if fields.get("auto_mapping"):
        fields["auto_mapping"] = {"base_model_class": type(base).__name__, "parent_library": type(base).__module__}
    report = {
        "command": command,
        "source": {"name": str(source), "revision": commit},
        "base_model": {"name": name, "revision": base_commit, "architecture": type(base).__name__},
        "num_tensors": len(tensors),
        "versions": versions(),
    }
    with atomic_folder(target, overwrite) as partial:
        write_file(partial / WEIGHTS_NAME, tensors)
        (partial / CONFIG_NAME).write_text(json.dumps(fields, indent=2, sort_keys=True) + "\n")
        _check_loading(base, partial)
        carry_files(folder, partial)
        _carry_card(folder, partial, name)
        write_report(partial, report)
    with interruptible_upload(target, push_to_hub):
        if progress:
            say(f"{len(tensors)} tensors fit {type(base).__name__} at {name}\nwrote      {target}")
        if push_to_hub is not None:
            push_folder(target, push_to_hub, f"Move {source} to {name}")
    return report


def _build_base(fields: dict) -> PreTrainedModel:
    if fields.get("model_type") == LongNetConfig.model_type:
        return skeleton(LongNetForCausalLM, LongNetConfig.from_dict(fields))
    family = find_family(fields)
    return skeleton(family.model_class, family.read_config(fields))


def _projections_before(base: PreTrainedModel) -> dict[str, dict[str, int]]:
    """Return the fused modules of the model that a LongNet model was converted from, none for any other model."""
    fields = getattr(base.config, "source_config", None)
    if fields is None:
        return {}
    family = find_family(fields)
    return family.projections(family.read_config(fields))


def _check_rows(projections: dict[str, dict[str, int]], tensors: dict[str, StoredTensor]) -> None:
    for name, tensor in tensors.items():
        for fused, parts in projections.items():
            if f".{fused}." in name and ".lora_A." not in name and tensor.shape[:1] != (sum(parts.values()),):
                raise ValueError(
                    f"the adapter's {name} has {tensor.shape[0]} rows, but {fused} of the base model had "
                    f"{sum(parts.values())}"
                )


def _check_start(fields: dict) -> None:
    """Refuse a LoRA of fused projections whose loading takes the fused weights apart."""
    start = fields.get("init_lora_weights")
    if start not in PLAIN_STARTS:
        raise ValueError(
            f"the adapter starts from fused weights (init_lora_weights {start!r}), which single projections do not have; "
            "save it as a plain LoRA first (path_initial_model_for_weight_conversion of peft's save_pretrained)"
        )


def _unfused_fields(fields: dict, projections: dict[str, dict[str, int]], num_layers: int) -> dict:
    """Return the fields of adapter_config.json that name modules, fused ones replaced by their parts."""
    parts_of = {fused.split(".")[-1]: [part.split(".")[-1] for part in parts] for fused, parts in projections.items()}
    renamed = {}
    for field in ("target_modules", "modules_to_save"):
        names = fields.get(field)
        if isinstance(names, list):
            split = [name.rpartition(".") for name in names]
            renamed[field] = [above + dot + part for above, dot, last in split for part in parts_of.get(last, [last])]
    rest = {name: value for name, value in fields.items() if name not in renamed}
    named = [fused for fused in parts_of if fused in json.dumps(rest)]
    named += [fused.split(".")[-1] for fused in projections if _is_matched(fused, rest, num_layers)]
    if named:
        raise ValueError(
            f"adapter_config.json names {named[0]} other than in a list of modules, as a pattern perhaps; such an "
            "adapter cannot be moved to single projections"
        )
    return renamed


def _is_matched(module: str, fields: dict, num_layers: int) -> bool:
    """Say whether a pattern of adapter_config.json matches this module of any layer."""
    targets = fields.get("target_modules")
    patterns = [targets] if isinstance(targets, str) else []
    patterns += [*(fields.get("rank_pattern") or {}), *(fields.get("alpha_pattern") or {})]
    paths = [f"model.layers.{i}.{module}" for i in range(num_layers)]
    return any(re.fullmatch(rf"(.*\.)?({pattern})", path) for pattern in patterns for path in paths)


def _check_loading(base: PreTrainedModel, adapter: Path) -> None:
    """Check that peft looks in the base model for exactly the tensors that an adapter's folder holds.

    Weights of the base model that are saved with an adapter, such as a resized embedding, may come on top.

    Raises:
        ValueError: if it misses one, or would leave one unread.
    """
    try:
        from peft import PeftConfig, get_peft_model, get_peft_model_state_dict
    except ImportError as error:
        raise ValueError("an adapter is moved with the help of peft; install it: pip install peft") from error
    architecture, own_weights = type(base).__name__, base.state_dict()
    try:
        with warnings.catch_warnings(action="ignore"):
            config = PeftConfig.from_pretrained(adapter)
            if hasattr(config, "init_lora_weights"):
                config.init_lora_weights = False  # a model without weights has nothing to start from
            model = get_peft_model(base, config, low_cpu_mem_usage=True)
            wanted = set(get_peft_model_state_dict(model, save_embedding_layers=False))
    except Exception as error:  # every kind of adapter has refusals of its own
        raise ValueError(f"peft cannot put the moved adapter into {architecture}: {error}") from error
    written = set(read_header(adapter / WEIGHTS_NAME))
    unread = [
        name for name in written - wanted if name.removeprefix(PREFIX).replace(".base_layer.", ".") not in own_weights
    ]
    if unread:
        raise ValueError(f"peft would not load {min(unread)} of the moved adapter into {architecture}")
    if missing := wanted - written:
        raise ValueError(f"peft would look for {min(missing)} in the moved adapter, which does not hold it")


def check_modules(base: PreTrainedModel, tensors: dict[str, StoredTensor]) -> None:
    """Check that every tensor of an adapter belongs to a module of the base model and has its sizes.

    Raises:
        ValueError: if one does not.
    """
    modules = {name: module for name, module in base.named_modules() if not list(module.children())}
    architecture = type(base).__name__
    for name, tensor in tensors.items():
        path = name.removeprefix(PREFIX)
        owner = next((module for module in modules if path.startswith(f"{module}.")), None)
        if path == name or owner is None:
            raise ValueError(f"the adapter holds {name}, for which {architecture} has no module")
        expected = _expected_shape(modules[owner], path.removeprefix(f"{owner}."), tensor.shape)
        if expected is not None and tensor.shape != expected:
            raise ValueError(
                f"the adapter's {name} has shape {list(tensor.shape)}, but {owner} of {architecture} needs "
                f"{list(expected)}"
            )


def _expected_shape(module: nn.Module, part: str, shape: tuple[int, ...]) -> tuple[int, ...] | None:
    """Return the shape that a part of an adapter must have, None if only the adapter itself knows."""
    if part in dict(module.named_parameters()):  # a module trained in full
        return tuple(module.get_parameter(part).shape)
    weight = module.weight.shape  # [out, in] of a linear layer, [tokens, width] of an embedding
    rows, columns = weight[0], weight[-1]
    return {
        "lora_A.weight": (shape[0], columns),
        "lora_B.weight": (rows, shape[-1]),
        "lora_magnitude_vector.weight": (rows,),
        "lora_embedding_A": (shape[0], rows),
        "lora_embedding_B": (columns, shape[-1]),
    }.get(part)


def _carry_card(folder: Path, partial: Path, base: str) -> None:
    """Copy the adapter's card, its base model renamed."""
    if not (folder / "README.md").is_file():
        return
    content = (folder / "README.md").read_bytes()
    try:
        card = ModelCard(content.decode())
        card.data.base_model = base
        tags = [tag for tag in card.data.tags or [] if not tag.startswith("base_model:")]
        card.data.tags = [*tags, f"base_model:adapter:{base}"]
        content = str(card).encode()
    except Exception:  # a card is free text by anyone: one without readable front matter is copied as it is
        pass
    (partial / "README.md").write_bytes(content)
