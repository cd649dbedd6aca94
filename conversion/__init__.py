"""Converters to LongNet, from pretrained dense checkpoints and from the official code, and back."""

from .adapters import convert_adapter
from .convert import convert_checkpoint
from .retrofit import retrofit
from .to_dense import convert_to_dense
from .torchscale import convert_torchscale


__all__ = ["convert_adapter", "convert_checkpoint", "convert_to_dense", "convert_torchscale", "retrofit"]
