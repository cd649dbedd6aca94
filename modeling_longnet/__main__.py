"""transformers' command line with LongNet known to it: ``python -m modeling_longnet serve CHECKPOINT``.

``transformers serve`` looks a checkpoint's class up in the ``transformers`` module itself, where no class is that comes
with a checkpoint or from another package. Everything else is as in ``transformers``.
"""

import transformers
from transformers.cli.transformers import main

from .modeling_longnet import LongNetForCausalLM


if __name__ == "__main__":
    transformers.LongNetForCausalLM = LongNetForCausalLM
    main()
