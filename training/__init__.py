"""What a training run needs beside the model: text in whole documents, rows packed from it, checkpoints that resume.

Nothing here is shipped with saved checkpoints; the models need none of it to run.
"""

from .checkpoint_offload import offload_checkpoints


__all__ = ["offload_checkpoints"]
