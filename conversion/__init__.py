"""Converters from pretrained dense checkpoints to LongNet."""

from .convert import convert_checkpoint
from .retrofit import retrofit


__all__ = ["convert_checkpoint", "retrofit"]
