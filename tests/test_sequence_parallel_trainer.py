"""LongNetTrainer with ``ParallelismConfig(cp_size=k)`` over gloo processes equals the stock Trainer in one process."""

import math
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from accelerate import ParallelismConfig
from ranks import Ranks
from tiny_models import random_tokens, tiny_model

from modeling_longnet import LongNetTrainer


def rows(count: int = 8, length: int = 77) -> list[dict]:
    """Make rows with very different numbers of labels: some slices have none at all."""
    result = []
    for index in range(count):
        tokens = random_tokens(1, length, seed=index)[0]
        labels = tokens.clone()
        labels[(45, 9, 77, 33, 60, 21, 5, 77)[index] :] = -100
        result.append({"input_ids": tokens, "labels": labels})
    return result


class Stream(torch.utils.data.IterableDataset):
    """Rows that come one after the other, and nobody knows how many."""

    def __init__(self, rows: list[dict]):
        self.rows = rows

    def __iter__(self):
        return iter(self.rows)


def arguments(folder: str, batch_size: int, **options):
    from transformers import TrainingArguments

    defaults = {"save_strategy": "no", "optim": "sgd", "learning_rate": 0.1, "max_steps": 2}
    return TrainingArguments(
        output_dir=folder, use_cpu=True, report_to="none", disable_tqdm=True,
        gradient_accumulation_steps=2, logging_steps=1, dataloader_pin_memory=False,
        lr_scheduler_type="constant", per_device_train_batch_size=batch_size, per_device_eval_batch_size=batch_size,
        **defaults | options,
    )  # fmt: skip


class OnCpu(ParallelismConfig):
    def _validate_accelerator(self, accelerator):  # Accelerate has no context parallelism on CPUs
        pass


def parallelism(cp_size: int, dp_shard_size: int):
    from accelerate.state import AcceleratorState, GradientState, PartialState

    for state in (AcceleratorState, GradientState, PartialState):  # of the test before
        state._reset_state()
    return OnCpu(cp_size=cp_size, dp_shard_size=dp_shard_size)


def on_fsdp(trainer_class):
    """Let Accelerate shard the model by FSDP2, which it does by itself on GPUs only."""
    from accelerate.state import PartialState
    from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin

    class OnFsdp(trainer_class):
        def create_accelerator_and_postprocess(self):
            super().create_accelerator_and_postprocess()
            state = self.accelerator.state
            PartialState._shared_state["distributed_type"] = state.distributed_type = DistributedType.FSDP
            state.fsdp_plugin = FullyShardedDataParallelPlugin(
                fsdp_version=2, auto_wrap_policy="transformer_based_wrap",
                transformer_cls_names_to_wrap=["LongNetDecoderLayer"],
            )  # fmt: skip
            self.is_fsdp_enabled = True

    return OnFsdp


def train(trainer_class, folder: str, batch_size: int, cp_size: int, fsdp: bool = False, **options):
    """Train two steps of two accumulated batches; return (parameters, losses, loss in evaluation, parameter type)."""
    torch.manual_seed(0)
    if cp_size > 1:
        options["parallelism_config"] = parallelism(cp_size, dist.get_world_size() // cp_size)
    model = tiny_model("retrofit", **options.pop("fields", {})).float()
    evaluated, stream = options.pop("evaluated", 6), options.pop("stream", False)
    data, held_out = (Stream(rows()), Stream(rows()[:evaluated])) if stream else (rows(), rows()[:evaluated])
    chosen = on_fsdp(trainer_class) if fsdp else trainer_class
    trainer = chosen(model, arguments(folder, batch_size, **options), train_dataset=data, eval_dataset=held_out)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    parameters = [p.full_tensor() if hasattr(p, "full_tensor") else p for p in trainer.model.parameters()]
    kind = type(next(trainer.model.parameters())).__name__
    return [p.detach().clone() for p in parameters], losses, trainer.evaluate()["eval_loss"], kind


@pytest.fixture(scope="module")
def two_ranks():
    ranks = Ranks(2)
    yield ranks
    ranks.close()


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    return train(LongNetTrainer, str(tmp_path_factory.mktemp("one")), 2, 1)


def assert_equal_training(answers, reference) -> None:
    for parameters, losses, eval_loss, _ in answers:
        assert losses == pytest.approx(reference[1], rel=1e-5)
        assert eval_loss == pytest.approx(reference[2], rel=1e-5)
        for a, b in zip(parameters, reference[0]):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_two_ranks_on_one_sequence_train_as_one_process(two_ranks, reference, tmp_path):
    assert_equal_training(two_ranks.run(train, LongNetTrainer, str(tmp_path), 2, 2), reference)


def test_two_by_two_ranks_under_fsdp2_train_as_one_process(reference, tmp_path):
    ranks = Ranks(4)
    answers = ranks.run(train, LongNetTrainer, str(tmp_path), 1, 2, True)
    ranks.close()
    assert_equal_training(answers, reference)
    assert {kind for *_, kind in answers} == {"DTensor"}


@pytest.mark.filterwarnings(
    "ignore:`gradient_checkpointing` is deprecated:FutureWarning"
)  # transformers 5.17 knows no other
def test_label_smoothing_and_checkpointing_train_as_one_process(two_ranks, tmp_path):
    options = {"label_smoothing_factor": 0.2, "gradient_checkpointing": True}
    alone = train(LongNetTrainer, str(tmp_path / "one"), 2, 1, **options)
    answers = two_ranks.run(train_with_options, str(tmp_path / "two"), options)
    assert_equal_training(answers, alone)


def test_a_last_batch_that_is_not_full_weighs_its_rows_in_evaluation(two_ranks, tmp_path):
    options = {"evaluated": 5}
    alone = train(LongNetTrainer, str(tmp_path / "one"), 2, 1, **options)
    assert_equal_training(two_ranks.run(train_with_options, str(tmp_path / "two"), options), alone)


def test_ranks_of_one_sequence_read_the_same_rows_of_a_stream(two_ranks, tmp_path):
    options = {"stream": True}
    alone = train(LongNetTrainer, str(tmp_path / "one"), 2, 1, **options)
    assert_equal_training(two_ranks.run(train_with_options, str(tmp_path / "two"), options), alone)


def train_with_options(folder: str, options: dict):
    return train(LongNetTrainer, folder, 2, 2, **options)


def history(
    folder: str, cp_size: int, fsdp: bool = False, resume: bool = False, stop_after: int = 0, **options
) -> dict:
    """Train, perhaps only some steps or the rest of them; return all numbers logged, and the parameters at the end."""
    from transformers import TrainerCallback

    class Stop(TrainerCallback):  # as a run that is killed: max_steps would change the schedule
        def on_step_end(self, args, state, control, **_):
            control.should_training_stop |= state.global_step == stop_after

    if cp_size > 1:
        options["parallelism_config"] = parallelism(cp_size, dist.get_world_size() // cp_size)
    model = tiny_model("retrofit", **options.pop("fields", {})).float()
    chosen = on_fsdp(LongNetTrainer) if fsdp else LongNetTrainer
    trainer = chosen(
        model, arguments(folder, 2, **options), train_dataset=rows(), eval_dataset=rows()[:5], callbacks=[Stop()]
    )
    trainer.train(resume_from_checkpoint=resume)
    names = ("loss", "grad_norm", "eval_loss", "num_input_tokens_seen", "total_flos")
    logged = {
        (entry["step"], name): float(entry[name])
        for entry in trainer.state.log_history
        for name in names & entry.keys()
    }
    checkpoints = sorted(path.name for path in Path(folder).glob("checkpoint-*"))
    parameters = [p.full_tensor() if hasattr(p, "full_tensor") else p for p in trainer.model.parameters()]
    return {"logged": logged, "parameters": [p.detach() for p in parameters], "checkpoints": checkpoints}


def history_on_two_ranks(folder: str, options: dict) -> dict:
    return history(folder, 2, **options)


def test_what_is_logged_between_steps_is_that_of_one_process(two_ranks, tmp_path):
    options = {
        "max_grad_norm": 0.3, "eval_strategy": "steps", "eval_steps": 1, "label_smoothing_factor": 0.1,
        "include_num_input_tokens_seen": "all",
    }  # fmt: skip
    alone = history(str(tmp_path / "one"), 1, **options)["logged"]
    assert all(alone[step, "grad_norm"] > 0.3 for step in (1, 2))  # clipped
    assert alone[2, "num_input_tokens_seen"] == 8 * 77
    for found in two_ranks.run(history_on_two_ranks, str(tmp_path / "two"), options):
        assert found["logged"] == pytest.approx(alone, rel=1e-4)


def test_a_resumed_run_under_fsdp2_takes_the_steps_of_one_that_went_on(two_ranks, tmp_path):
    options = {
        "fsdp": True, "optim": "adamw_torch", "learning_rate": 0.01, "max_steps": 4, "save_strategy": "steps",
        "save_steps": 1, "save_total_limit": 1, "fields": {"attention_dropout": 0.2},
    }  # fmt: skip
    through = two_ranks.run(history_on_two_ranks, str(tmp_path / "through"), options)
    two_ranks.run(history_on_two_ranks, str(tmp_path / "resumed"), options | {"stop_after": 3})
    resumed = two_ranks.run(history_on_two_ranks, str(tmp_path / "resumed"), options | {"resume": True})
    for found, expected in zip(resumed, through):
        assert math.isfinite(expected["logged"][4, "loss"])
        assert found["logged"] == expected["logged"]
        assert found["checkpoints"] == expected["checkpoints"] == ["checkpoint-4"]
        assert all(map(torch.equal, found["parameters"], expected["parameters"]))


def error_of_stock_trainer(folder: str) -> str:
    from transformers import Trainer

    with pytest.raises(ValueError) as error:
        train(Trainer, folder, 2, 2)
    return str(error.value)


def test_the_stock_trainer_refuses_and_names_this_one(two_ranks, tmp_path):
    for message in two_ranks.run(error_of_stock_trainer, str(tmp_path)):
        assert "reorders the sequence" in message and "train with LongNetTrainer, or with cp_size=1" in message


def errors_of_what_no_rank_has(folder: str) -> list[str]:
    options = {"parallelism_config": parallelism(2, 1)}
    messages = []
    with pytest.raises(ValueError) as error:
        LongNetTrainer(tiny_model(), arguments(folder, 2, **options), compute_loss_func=lambda *_, **__: None)
    messages.append(str(error.value))
    options = {"parallelism_config": parallelism(2, 1), "accelerator_config": {"dispatch_batches": True}}
    with pytest.raises(ValueError) as error:
        LongNetTrainer(tiny_model(), arguments(folder, 2, **options))
    messages.append(str(error.value))
    options = {"parallelism_config": parallelism(2, 1)}
    trainer = LongNetTrainer(
        tiny_model().float(), arguments(folder, 2, **options), eval_dataset=rows()[:2], compute_metrics=lambda _: {}
    )
    with pytest.raises(ValueError) as error:
        trainer.evaluate()
    return [*messages, str(error.value)]


def test_whole_logits_and_own_losses_are_refused(two_ranks, tmp_path):
    for own_loss, dispatch, metrics in two_ranks.run(errors_of_what_no_rank_has, str(tmp_path)):
        assert "one of cp_size=2 slices" in own_loss
        assert "dispatch_batches=True gives each of the cp_size=2 ranks of a sequence other rows; leave" in dispatch
        assert "with cp_size=2 each rank has the logits of a slice; set prediction_loss_only=True" in metrics
