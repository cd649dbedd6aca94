"""Proof that a conversion kept the model: source and target must give the same logits on a real text.

Both models are built without weights; for the time of its forward, and only then, each module's weights are read from
the safetensors files into one float32 buffer that all modules share. Memory is then that of the largest single module,
so a checkpoint far larger than the machine's memory can be verified.
"""

import contextlib
import ctypes
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoTokenizer, PreTrainedConfig, PreTrainedModel

from modeling_longnet import DilationPattern

from .weights import StoredTensor, match_weights, read_tensor


MAX_TOKENS = 512
TOLERANCE = 1e-4

# Herman Melville, Moby-Dick, chapter 1 (public domain).
TEXT = """\
Call me Ishmael. Some years ago—never mind how long precisely—having little or no money in my purse, and nothing \
particular to interest me on shore, I thought I would sail about a little and see the watery part of the world. It is \
a way I have of driving off the spleen and regulating the circulation. Whenever I find myself growing grim about the \
mouth; whenever it is a damp, drizzly November in my soul; whenever I find myself involuntarily pausing before coffin \
warehouses, and bringing up the rear of every funeral I meet; and especially whenever my hypos get such an upper hand \
of me, that it requires a strong moral principle to prevent me from deliberately stepping into the street, and \
methodically knocking people's hats off—then, I account it high time to get to sea as soon as I can. This is my \
substitute for pistol and ball. With a philosophical flourish Cato throws himself upon his sword; I quietly take to \
the ship. There is nothing surprising in this. If they but knew it, almost all men in their degree, some time or \
other, cherish very nearly the same feelings towards the ocean with me.

There now is your insular city of the Manhattoes, belted round by wharves as Indian isles by coral reefs—commerce \
surrounds it with her surf. Right and left, the streets take you waterward. Its extreme downtown is the battery, \
where that noble mole is washed by waves, and cooled by breezes, which a few hours previous were out of sight of land. \
Look at the crowds of water-gazers there.

Circumambulate the city of a dreamy Sabbath afternoon. Go from Corlears Hook to Coenties Slip, and from thence, by \
Whitehall, northward. What do you see?—Posted like silent sentinels all around the town, stand thousands upon \
thousands of mortal men fixed in ocean reveries. Some leaning against the spiles; some seated upon the pier-heads; \
some looking over the bulwarks of ships from China; some high aloft in the rigging, as if striving to get a still \
better seaward peep. But these are all landsmen; of week days pent up in lath and plaster—tied to counters, nailed to \
benches, clinched to desks. How then is this? Are the green fields gone? What do they here?
"""


@dataclass(frozen=True)
class Verification:
    """How far the target's logits are from the source's.

    Args:
        num_tokens: length of the text compared.
        text: what the tokens were.
        max_error: largest absolute difference of two logits.
        max_logit: largest absolute logit of the source.
        source_loss, target_loss: mean negative log-likelihood of the text, nats per token.
        num_not_finite: how many of the source's logits are infinite or NaN, as they are when weights are.
        pattern_used: False if the target was run with one dense branch, because its own pattern is not the source's
            attention on short inputs.
    """

    num_tokens: int
    text: str
    max_error: float
    max_logit: float
    source_loss: float
    target_loss: float
    num_not_finite: int
    pattern_used: bool
    tolerance: float = TOLERANCE

    @property
    def relative_error(self) -> float:
        return self.max_error / self.max_logit if self.max_logit else self.max_error

    @property
    def passed(self) -> bool:
        return self.relative_error <= self.tolerance


def dense_length(pattern: DilationPattern) -> int:
    """Return the longest input on which the pattern is ordinary attention for every query, 0 if it never is.

    The first branch must reach every key undilated, and no other branch may count one again.
    """
    (first, *others) = pattern.branches
    if first.dilation_rate > 1 or (others and pattern.count_overlaps):
        return 0
    return first.segment_length


def verification_tokens(source: Path, vocab_size: int, max_tokens: int) -> tuple[Tensor, str]:
    """Encode the built-in text with the source's tokenizer, without running any code of the source.

    A source without a usable tokenizer gets token ids spread over the vocabulary instead.

    Returns:
        ``[1, L]`` int64 with ``1 <= L <= max_tokens``, and a few words on what the tokens are.
    """
    try:
        ids = AutoTokenizer.from_pretrained(source, trust_remote_code=False)(TEXT)["input_ids"][:max_tokens]
    except Exception:  # tokenizer files are anybody's: whatever is wrong with them, the weights can still be compared
        ids = []
    if ids and max(ids) < vocab_size:
        return torch.tensor([ids]), "the opening of Moby-Dick"
    return (
        torch.arange(max_tokens)[None] * 7919
    ) % vocab_size, "spread token ids (the source has no usable tokenizer)"


def compare_logits(
    source: tuple[type[PreTrainedModel], PreTrainedConfig, dict[str, StoredTensor]],
    target: tuple[type[PreTrainedModel], PreTrainedConfig, dict[str, StoredTensor]],
    token_ids: Tensor,
    advance: Callable[[int], object] = lambda num_bytes: None,
) -> dict[str, float]:
    """Run two stored models on the same tokens in float32 and compare their logits.

    Args:
        source, target: model class, config and stored weights.
        token_ids: ``[1, L]`` int64.
        advance: called with every number of bytes of weights read.

    Returns:
        The numbers of ``Verification`` by name. Logits that are not finite must be so in both models, else
        ``max_error`` is infinite; they do not count otherwise.
    """
    source_logits = _run(*source, token_ids, advance)  # [L, vocabulary]
    target_logits = _run(*target, token_ids, advance)
    num_tokens = token_ids.shape[1]
    labels = token_ids[0].roll(-1)
    labels[-1] = -100  # nothing follows the last token
    max_error = max_logit = source_loss = target_loss = 0.0
    num_not_finite = 0
    for rows in range(0, num_tokens, 64):  # a few rows at a time, for the sake of memory
        ours, theirs, next_ids = (x[rows : rows + 64] for x in (target_logits, source_logits, labels))
        finite = theirs.isfinite()
        num_not_finite += int(finite.logical_not().sum())
        error = (ours - theirs).where(finite, 0.0).abs().max() if torch.equal(finite, ours.isfinite()) else torch.inf
        max_error = max(max_error, float(error))
        max_logit = max(max_logit, float(theirs.where(finite, 0.0).abs().max()))
        source_loss += float(F.cross_entropy(theirs, next_ids, reduction="sum")) / max(num_tokens - 1, 1)
        target_loss += float(F.cross_entropy(ours, next_ids, reduction="sum")) / max(num_tokens - 1, 1)
    return {
        "max_error": max_error,
        "max_logit": max_logit,
        "source_loss": source_loss,
        "target_loss": target_loss,
        "num_not_finite": num_not_finite,
    }


def _run(
    model_class: type[PreTrainedModel],
    config: PreTrainedConfig,
    weights: dict[str, StoredTensor],
    token_ids: Tensor,
    advance: Callable[[int], object],
) -> Tensor:
    model = skeleton(model_class, config)
    model.model.rotary_emb = type(model.model.rotary_emb)(config)  # its frequencies are computed, not stored
    with torch.no_grad(), _borrowed_weights(model.eval(), weights, advance):
        return model(token_ids, use_cache=False).logits[0]  # [L, vocabulary]


def skeleton(model_class: type[PreTrainedModel], config: PreTrainedConfig) -> PreTrainedModel:
    """Build a model whose tensors have shapes but no memory."""
    with torch.device("meta"):
        return model_class(config)


@contextlib.contextmanager
def _borrowed_weights(
    model: nn.Module, weights: dict[str, StoredTensor], advance: Callable[[int], object]
) -> Iterator[None]:
    """Let each module's parameters be its stored weights, in float32, for the time of its forward only."""
    stored = match_weights(model, weights)
    owned = {
        module: {name: stored[f"{path}.{name}"] for name, _ in module.named_parameters(recurse=False)}
        for path, module in model.named_modules()
    }
    longest = max(sum(math.prod(tensor.shape) for tensor in own.values()) for own in owned.values())
    largest = max(tensor.num_bytes for tensor in stored.values())
    lender = _Lender(torch.empty(longest, dtype=torch.float32), torch.empty(largest, dtype=torch.uint8), advance)
    hooks = []
    for module, own in owned.items():
        if own:
            hooks.append(module.register_forward_pre_hook(partial(lender.lend, own)))
            hooks.append(module.register_forward_hook(lender.take_back))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@dataclass(frozen=True)
class _Lender:
    """Two buffers that hold the weights of one module at a time."""

    weights: Tensor  # float32
    stored: Tensor  # bytes as in the file
    advance: Callable[[int], object]

    def lend(self, own: dict[str, StoredTensor], module: nn.Module, arguments: tuple) -> None:
        lent = 0
        for name, tensor in own.items():
            size = math.prod(tensor.shape)
            weight = self.weights[lent : lent + size].view(tensor.shape)
            weight.copy_(read_tensor(tensor, self.stored))
            module.register_parameter(name, nn.Parameter(weight, requires_grad=False))
            lent += size
            self.advance(tensor.num_bytes)

    def take_back(self, module: nn.Module, arguments: tuple, output) -> None:
        for name, parameter in list(module.named_parameters(recurse=False)):
            module.register_parameter(name, nn.Parameter(parameter.to("meta"), requires_grad=False))
        # glibc before 2.38 hardly reuses the aligned blocks that torch frees: without this, memory grows by the layer.
        if trim := getattr(ctypes.CDLL(None), "malloc_trim", None):
            trim(0)
