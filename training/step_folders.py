"""Folders of a run's steps: without frozen weights, whole or not there, and taken up by the very run that saved them."""

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, broadcast_object_list
from peft import PeftModel
from torch import nn
from transformers import PreTrainedTokenizerBase


KEPT = 2  # the newest; one more would be there if saving is cut off


def digest_of_weights(model: nn.Module, accelerator: Accelerator) -> str:
    """Return what tells one model's weights from another's: of a sample of every tensor, as the main process holds it."""
    digest = [""]
    if accelerator.is_main_process:  # which has the numbers, however the model is loaded; with ZeRO-3 a part of them
        flat = [getattr(p, "ds_tensor", p).detach().flatten() for p in model.parameters()]
        some = torch.cat([x[:: 1 + len(x) // 64].cpu().float() for x in flat])
        digest = [hashlib.sha256(some.numpy()).hexdigest()[:16]]
    broadcast_object_list(digest)
    return digest[0]


class Progress:
    """The losses so far, to be registered for checkpointing: their number is the step."""

    def __init__(self) -> None:
        self.losses: list[float] = []

    def state_dict(self) -> dict[str, list[float]]:
        return {"losses": self.losses}

    def load_state_dict(self, state: dict[str, list[float]]) -> None:
        self.losses = state["losses"]


class StepFolders:
    """The states of an ``Accelerator`` after some steps, each in a folder ``step_<number>``.

    Weights that are not trained stay out, as they lie where the model came from. (Under FSDP they are saved all the
    same: Accelerate saves every process's part of them.)

    Args:
        folder: to save to and to take up from; None for neither.
        settings: what the steps follow from, to JSON. Folders of other settings are refused.
        source: where the model came from, for messages.
    """

    def __init__(self, folder: Path | None, accelerator: Accelerator, settings: dict[str, Any], source: str | None):
        self.folder, self.accelerator, self.source = folder, accelerator, source
        self.settings = settings | {
            "processes": accelerator.num_processes, "distributed": accelerator.distributed_type.value,
            "mixed_precision": accelerator.mixed_precision,
        }  # fmt: skip
        self.deepspeed = accelerator.distributed_type == DistributedType.DEEPSPEED
        accelerator.register_save_state_pre_hook(_leave_out_frozen)
        saved = sorted(folder.glob("step_*[0-9]")) if folder else []
        self.newest: Path | None = saved[-1] if saved else None

    def step(self, most: int) -> int:
        """Return the step that the newest folder was saved after, 0 if there is none; nothing of it is loaded.

        Args:
            most: steps that the run will take in all.

        Raises:
            ValueError: if the folder is no such folder, or another run's.
        """
        if self.newest is None:
            return 0
        try:
            saved = json.loads((self.newest / "settings.json").read_text())
        except (OSError, ValueError) as error:
            raise ValueError(f"{self.newest} holds no saved step ({error}); choose another folder") from None
        for name, own in self.settings.items():
            if (was := saved.get(name)) != own:
                raise ValueError(
                    f"{self.newest} was saved with {name} {was} (of {saved.get('source')}), this run has {own} (of "
                    f"{self.source}); repeat the options it was saved with, or choose another folder"
                )
        if saved["step"] > most:
            raise ValueError(f"{self.newest} has taken {saved['step']} steps already; ask for as many or more")
        return saved["step"]

    def load(self) -> None:
        """Load the newest folder into what the accelerator has prepared and registered."""
        if self.newest is not None:
            self.accelerator.load_state(self.newest, **{"load_module_strict" if self.deepspeed else "strict": False})

    def save(self, step: int) -> None:
        """Save the state after a step, whole or not at all; the last two stay. All processes call."""
        assert self.folder is not None
        folder = self.folder / f"step_{step:07}"
        self.accelerator.save_state(
            f"{folder}.part", **({"exclude_frozen_parameters": True} if self.deepspeed else {})
        )
        self.accelerator.wait_for_everyone()
        if self.accelerator.is_main_process:
            settings = self.settings | {"source": self.source, "step": step}
            Path(f"{folder}.part", "settings.json").write_text(json.dumps(settings, indent=2))
            Path(f"{folder}.part").rename(folder)
            for old in sorted(self.folder.glob("step_*[0-9]/settings.json"))[:-KEPT]:
                shutil.rmtree(old.parent)


def save_adapter(folder: Path, accelerator: Accelerator, model: PeftModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Save what PEFT has added to a model, for ``AutoPeftModelForCausalLM``, and the tokenizer. All processes call.

    Args:
        folder: to be created, whole or not at all.
        model: as the accelerator has prepared it.
    """
    state = accelerator.get_state_dict(model)  # on all processes: they put together what FSDP and ZeRO-3 have split
    if accelerator.is_main_process:
        accelerator.unwrap_model(model).save_pretrained(f"{folder}.part", state_dict=state)
        tokenizer.save_pretrained(f"{folder}.part")
        Path(f"{folder}.part").rename(folder)


def _leave_out_frozen(models: list[nn.Module], weights: list[dict[str, torch.Tensor]], folder: str) -> None:
    for model, state in zip(models, weights):
        for name in state.keys() - {name for name, p in model.named_parameters() if p.requires_grad}:
            del state[name]
