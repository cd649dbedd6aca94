"""Activation checkpoints of a training run in host memory: ``offload_checkpoints``.

Nothing here is shipped with saved checkpoints; the models need none of it to run.
"""

from .checkpoint_offload import offload_checkpoints


__all__ = ["offload_checkpoints"]
