"""Converters from pretrained dense checkpoints to LongNet, and back."""

from .adapters import convert_adapter
from .convert import convert_checkpoint
from .retrofit import retrofit
from .to_dense import convert_to_dense


__all__ = ["convert_adapter", "convert_checkpoint", "convert_to_dense", "retrofit"]
