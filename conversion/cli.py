"""The command ``longnet-convert``: ``convert_checkpoint`` with options, a plan, and one line per failure."""

import argparse
import inspect
import json
import sys
import warnings
from collections.abc import Callable
from typing import NoReturn

from transformers.utils import logging

from .adapters import convert_adapter
from .convert import convert_checkpoint
from .pipeline import rehearse
from .plan import Plan
from .plan_family import plan_conversion
from .steps import say
from .to_dense import convert_to_dense, plan_to_dense
from .torchscale import convert_torchscale, plan_torchscale
from .verify import MOST_TOKENS


DESCRIPTION = """\
Convert a dense checkpoint (Llama, Mistral, Ministral, Qwen2, Qwen3, SmolLM3,
Phi-3) to LongNet's dilated attention, or one of the official LongNet code to
this package. The weights keep their bits; with the default preset the converted
model has the source's logits on every input up to its first segment length,
which is verified before TARGET appears. TARGET loads with
trust_remote_code=True where this package is not installed.
"""

EPILOG = """\
examples:
  longnet-convert TinyLlama/TinyLlama-1.1B-Chat-v1.0 tinyllama-longnet
  longnet-convert ./llama ./llama-32k --context 32768 --rope yarn \\
      --dense-layers late
  longnet-convert ./llama ./llama-16k --segment-lengths 2048,8192,16384 \\
      --dilation-rates 1,4,8 --dense-layers 0,16
  longnet-convert ./llama-32k-tuned ./llama-dense --to-dense
  longnet-convert ./lora-of-llama ./lora-of-longnet --adapter ./llama-32k
  longnet-convert ./checkpoint_best.pt ./longnet --from torchscale
"""


# What the help calls options that are named after an argument of convert_checkpoint.
SHORTER = {"max_position_embeddings": "context", "rope_parameters": "rope"}


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """End with one line and status 1, like every other failure."""
        self.exit(1, f"{self.prog}: error: {message} (--help explains the options)\n")


def build_parser() -> argparse.ArgumentParser:
    """Build the command's parser; its help fits 80 columns."""
    parser = _Parser(
        prog="longnet-convert",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=lambda prog: argparse.RawDescriptionHelpFormatter(prog, max_help_position=26, width=80),
    )
    parser.add_argument(
        "source",
        metavar="SOURCE",
        help="checkpoint folder (with --from a file, too), or model id on the Hugging Face Hub",
    )
    parser.add_argument("target", metavar="TARGET", help="folder to create")

    pattern = parser.add_argument_group("pattern and context")
    pattern.add_argument(
        "--preset",
        default="retrofit",
        help="retrofit: equals the source on short inputs (default); paper, torchscale: LongNet's own rules, to be "
        "trained before use",
    )
    pattern.add_argument(
        "--context",
        "--max-position-embeddings",
        dest="max_position_embeddings",
        type=int,
        metavar="N",
        help="tokens that the target is meant for (default: the source's, or 4 times its first segment if that is "
        "more)",
    )
    pattern.add_argument(
        "--local",
        type=int,
        metavar="N",
        help="first segment (default: the source's trained context or sliding window, at most 4096)",
    )
    pattern.add_argument(
        "--segment-lengths",
        type=_integers,
        metavar="W,W,...",
        help="tokens per branch (default: the first segment, doubled until one covers the context)",
    )
    pattern.add_argument(
        "--dilation-rates",
        type=_integers,
        metavar="R,R,...",
        help="one per segment length (default: each over the first)",
    )
    pattern.add_argument(
        "--rope",
        "--rope-parameters",
        dest="rope_parameters",
        type=_rope,
        metavar="WORD|JSON",
        help="yarn, linear, llama3 or ntk, stretched by context over trained context; none (default): as the source; "
        "or transformers' rope_parameters",
    )
    pattern.add_argument(
        "--dense-layers",
        type=_layers,
        default=(),
        metavar="late|I,I,...",
        help="layers, counted from 0, that keep ordinary attention and all keys (default: none); late: the one at three "
        "quarters of the depth, which retrieval of far tokens wants",
    )

    other = parser.add_argument_group("other conversions")
    other.add_argument(
        "--to-dense",
        action="store_true",
        help="SOURCE is a converted LongNet checkpoint, tuned or not: write the ordinary one again",
    )
    other.add_argument(
        "--adapter",
        metavar="BASE",
        help="SOURCE is a LoRA adapter (peft): write it for BASE, the LongNet conversion of its base model, or the "
        "other way round",
    )
    other.add_argument(
        "--from",
        choices=["torchscale"],
        metavar="CODE",
        help="torchscale: SOURCE is a LongNetDecoder of the official code: a file of weights, or a folder with one",
    )
    other.add_argument(
        "--arguments",
        metavar="FILE",
        help="with --from torchscale: JSON file of the arguments that the decoder was built with (default: those in "
        "the checkpoint, or in args.json, arguments.json or config.json beside it)",
    )

    output = parser.add_argument_group("output")
    output.add_argument(
        "--max-shard-size",
        type=_size,
        default="5GB",
        metavar="SIZE",
        help="largest weight file, such as 5GB or a number of bytes (default: %(default)s)",
    )
    output.add_argument(
        "--dtype",
        metavar="DTYPE",
        help="round weights to float64, float32, float16 or bfloat16 (default: keep their bits)",
    )
    output.add_argument("--revision", help="branch, tag or commit of a SOURCE on the Hub")
    output.add_argument(
        "--push-to-hub", metavar="REPO", help="upload the finished TARGET to REPO (created, private, if new)"
    )
    output.add_argument("--overwrite", action="store_true", help="replace an earlier conversion at TARGET")
    output.add_argument(
        "--no-verify", dest="verify", action="store_false", help="skip the comparison of logits with the source"
    )
    output.add_argument(
        "--verify-tokens",
        type=int,
        default=MOST_TOKENS,
        metavar="N",
        help="compare logits on at most N tokens of text (default: %(default)s, or the first segment if shorter)",
    )
    output.add_argument(
        "--dry-run", action="store_true", help="check source and target and print the plan, write nothing"
    )
    output.add_argument("--quiet", action="store_true", help="print nothing but failures")
    output.add_argument("--debug", action="store_true", help="show the traceback of a failure")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run the command; return its exit status, 0 or 1."""
    parser = build_parser()
    options = vars(parser.parse_args(argv))
    dry_run, quiet, debug = (options.pop(name) for name in ("dry_run", "quiet", "debug"))
    to_dense, from_torchscale = options.pop("to_dense"), options.pop("from") == "torchscale"
    convert: Callable[..., dict] = convert_checkpoint
    plan: Callable[..., Plan] | None = plan_conversion
    if from_torchscale:
        if to_dense:
            return _fail("--to-dense does not go with this kind of conversion", debug=False)
        convert, plan = convert_torchscale, plan_torchscale
    elif to_dense:
        convert, plan = convert_to_dense, plan_to_dense
    elif options["adapter"] is not None:
        convert, plan = convert_adapter, None
    logging.set_verbosity_error()
    warnings.simplefilter("default" if debug else "ignore")
    try:
        chosen = {name: value for name, value in options.items() if value != parser.get_default(name)}
        if strange := chosen.keys() - inspect.signature(convert).parameters.keys():
            option = SHORTER.get(min(strange), min(strange)).replace("_", "-")
            raise ValueError(f"--{option} does not go with this kind of conversion")
        if dry_run:
            if plan is None:
                raise ValueError("--dry-run does not go with --adapter, which checks everything before it writes")
            names = inspect.signature(plan).parameters.keys() - {"source"}
            described = rehearse(
                plan,
                options["source"],
                options["target"],
                {name: value for name, value in chosen.items() if name in names},
                push_to_hub=options["push_to_hub"],
                overwrite=options["overwrite"],
            )
            return 0 if quiet or say(described) else 1
        convert(**chosen, progress=not quiet)
    except KeyboardInterrupt as interrupt:
        return _fail(str(interrupt) or "interrupted; nothing was written", debug)
    except Exception as error:
        return _fail(str(error) or type(error).__name__, debug)
    return 0


def _fail(message: str, debug: bool) -> int:
    if debug:
        raise
    print(f"longnet-convert: error: {' '.join(message.split())}", file=sys.stderr)
    return 1


def _integers(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of integers such as 2048,4096,8192") from None


def _layers(text: str) -> list[int] | str:
    if text.isalpha():
        return text
    try:
        return _integers(text)
    except argparse.ArgumentTypeError:
        raise argparse.ArgumentTypeError(
            f"{text!r} is neither late nor a list of layer numbers, from 0 on, such as 3,7"
        ) from None


def _size(text: str) -> int | str:
    return int(text) if text.isdecimal() else text


def _rope(text: str) -> dict | str:
    if text.isalnum():
        return text
    try:
        value = json.loads(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f"{text!r} is not a JSON object")
    return value
