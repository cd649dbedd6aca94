"""The Trainer for LongNet models."""

from transformers import Trainer


class LongNetTrainer(Trainer):
    """``transformers.Trainer`` that refuses, before the first step, what would train a LongNet model wrongly.

    The stock Trainer also trains LongNet models. With context parallelism, though, it hands every rank a permuted slice
    of the sequence, which full attention does not notice and dilated attention cannot follow.

    Raises:
        ValueError: if the model has no dilation pattern, or ``parallelism_config`` asks for context parallelism.
    """

    def __init__(self, model=None, args=None, **kwargs):
        parallelism = getattr(args, "parallelism_config", None)
        if parallelism is not None and parallelism.cp_size > 1:
            raise ValueError(f"cp_size={parallelism.cp_size} is not supported: set cp_size=1")
        super().__init__(model=model, args=args, **kwargs)
        if not hasattr(self.model.config, "pattern"):
            raise ValueError(
                f"LongNetTrainer needs a LongNet model, got {type(self.model).__name__}; convert the checkpoint first"
            )
        # The stock Trainer smooths labels over all logits at once; the model does it chunk by chunk.
        self.label_smoother = None

    def compute_loss(self, model, inputs, *args, **kwargs):
        """Compute the loss as the stock Trainer does, with label smoothing left to the model."""
        if self.args.label_smoothing_factor:
            inputs = {**inputs, "label_smoothing": self.args.label_smoothing_factor}
        return super().compute_loss(model, inputs, *args, **kwargs)

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        """Evaluate one batch; where only its loss is wanted, without logits."""
        if prediction_loss_only:
            inputs = {**inputs, "skip_logits": True}
        return super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)
