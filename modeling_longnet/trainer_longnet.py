"""The Trainer for LongNet models."""

import functools
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments

from .liger_layers import register_with_liger
from .sequence_group import sequence_parallel
from .sequence_shards import shard_sequence


class LongNetTrainer(Trainer):
    """``transformers.Trainer`` whose context parallelism keeps the sequence in order, and whose losses need no logits.

    The stock Trainer also trains LongNet models. With ``ParallelismConfig(cp_size=k)``, though, it hands every rank a
    permuted slice of the sequence, which full attention does not notice and dilated attention cannot follow. Here the
    ranks of the "cp" dimension hold contiguous slices under ``sequence_parallel``: any length, padding and packed
    documents, and beside it data parallelism and FSDP2 as Accelerate sets them up. Losses and gradients equal those of
    one process. ``use_liger_kernel`` puts Liger's kernels into the layers; the stock Trainer does not find them.

    Raises:
        ValueError: if the model has no dilation pattern; with ``cp_size > 1``, if a loss function of the user's own or
            whole logits are asked for, which no rank has, or ``dispatch_batches=True``.
    """

    def __init__(self, model: Any = None, args: TrainingArguments | None = None, **kwargs: Any):
        if getattr(args, "use_liger_kernel", False):
            register_with_liger()
        super().__init__(model=model, args=args, **kwargs)
        if not hasattr(self.model.config, "pattern"):
            raise ValueError(
                f"LongNetTrainer needs a LongNet model, got {type(self.model).__name__}; convert the checkpoint first"
            )
        if self.get_cp_size() > 1 and self.compute_loss_func is not None:
            raise ValueError(
                f"compute_loss_func would see one of cp_size={self.get_cp_size()} slices of the sequence; leave it out, "
                "the model computes its part of the loss"
            )
        # The stock Trainer smooths labels over all logits at once; a causal LM does it chunk by chunk.
        self._model_smooths = hasattr(self.model, "lm_head")  # through PEFT, too
        if self._model_smooths or self.get_cp_size() > 1:  # the other heads refuse slices, but not without labels
            self.label_smoother = None

    def create_accelerator_and_postprocess(self) -> None:
        """Create the accelerator; the ranks of a sequence read the same rows."""
        super().create_accelerator_and_postprocess()
        if self.get_cp_size() > 1:
            self._read_alike()

    def compute_loss(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """Compute the loss as the stock Trainer does, with label smoothing left to a causal LM itself."""
        if self.args.label_smoothing_factor and self._model_smooths:
            inputs = {**inputs, "label_smoothing": self.args.label_smoothing_factor}
        return super().compute_loss(model, inputs, *args, **kwargs)

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        """Evaluate as the stock Trainer does, each sequence counted once."""
        if self.get_cp_size() > 1:  # each time: the stock loop ends by putting its own function back
            self.gather_function = self._gather_once
        return super().evaluation_loop(*args, **kwargs)

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> Any:
        """Evaluate one batch; where only its loss is wanted, without logits."""
        if prediction_loss_only:
            inputs = {**inputs, "skip_logits": True}
        elif self.get_cp_size() > 1:
            raise ValueError(
                f"with cp_size={self.get_cp_size()} each rank has the logits of a slice; set prediction_loss_only=True, "
                "or evaluate metrics with cp_size=1"
            )
        loss, logits, labels = super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)
        if loss is not None and self.get_cp_size() > 1:
            # Each rank has its part, times all processes.
            dist.all_reduce(loss, op=dist.ReduceOp.SUM, group=self._sequence_group())
            loss = loss / self.get_cp_size()
        return loss, logits, labels

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """Count what this rank computes of a batch that others share."""
        return super().floating_point_ops(inputs) // self._num_copies()

    def _track_num_input_tokens(self, inputs: dict[str, Any]) -> None:
        """Count a batch's tokens once; the stock Trainer adds them up over all ranks, as if each had rows of its own."""
        before = self.state.num_input_tokens_seen
        super()._track_num_input_tokens(inputs)
        self.state.num_input_tokens_seen = before + (self.state.num_input_tokens_seen - before) // self._num_copies()

    def _prepare_context_parallel_inputs(self, model: nn.Module, inputs: dict[str, Any]) -> Any:
        if self.get_cp_size() == 1:
            return super()._prepare_context_parallel_inputs(model, inputs)
        group = self._sequence_group()
        return functools.partial(sequence_parallel, group), shard_sequence(inputs, group)

    def _read_alike(self) -> None:
        """Let the ranks that share a sequence read the same rows of an iterable dataset, each for itself.

        By default Accelerate has the first process read those, and deals them out to all ranks as if each had rows of
        its own.
        """
        if self.args.accelerator_config.dispatch_batches:
            raise ValueError(
                f"dispatch_batches=True gives each of the cp_size={self.get_cp_size()} ranks of a sequence other rows; "
                "leave it out of accelerator_config, every rank reads the dataset itself"
            )
        self.accelerator.dataloader_config.dispatch_batches = False

    def _gather_once(self, losses: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Gather what each rank has of the rows that it evaluates, once per sequence, without those that fill up a batch.

        Accelerate's ``gather_for_metrics`` leaves out of the last batch what it takes for duplicates, and with all ranks
        of a sequence would find too many.
        """
        gathered = self.accelerator.gather(losses).unflatten(0, (self.accelerator.num_processes, -1))
        gathered = gathered[:: self._num_copies()].flatten(0, 1)
        state = self.accelerator.gradient_state
        return gathered[: state.remainder] if state.end_of_dataloader and state.remainder > 0 else gathered

    def _num_copies(self) -> int:
        """Return how many neighbouring ranks have the same batch."""
        return self.get_cp_size() * self.get_tp_size()

    def _sequence_group(self) -> dist.ProcessGroup:
        """Return the ranks that share a sequence; Accelerate gives all of them the same batch."""
        return self.accelerator.torch_device_mesh["cp"].get_group()
