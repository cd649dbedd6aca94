"""Proof that a conversion kept the model: source and target must give the same logits on a real text.

Both models are built without weights; for the time of its forward, and only then, each module's weights are read from
the safetensors files into one buffer that all modules share. Memory is then that of the largest single module,
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

from .weights import DTYPES, StoredTensor, match_weights, read_tensor


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
class StoredModel:
    """A model whose weights lie in files.

    Args:
        model_class: what to build.
        config: of the model; its dtype is the model's own.
        tensors: its weights, by name.
        rounded_to: dtype, as safetensors spells it, that weights are rounded to when read; None: as they are stored.
    """

    model_class: type[PreTrainedModel]
    config: PreTrainedConfig
    tensors: dict[str, StoredTensor]
    rounded_to: str | None = None

    @property
    def compute_dtypes(self) -> list[torch.dtype]:
        """float32, and the model's own dtype if that is another."""
        own = self.config.dtype or torch.float32
        own = getattr(torch, own) if isinstance(own, str) else own
        return list(dict.fromkeys((torch.float32, own)))


@dataclass(frozen=True)
class OwnDtype:
    """How source and target compare when both compute in the checkpoint's own dtype.

    Args:
        dtype: such as ``"bfloat16"``.
        max_error: largest absolute difference of two logits.
        source_rounding, target_rounding: root mean square of each model's distance from the source in float32.
    """

    dtype: str
    max_error: float
    source_rounding: float
    target_rounding: float


@dataclass(frozen=True)
class Verification:
    """How far the target's logits are from the source's, in float32 unless said otherwise.

    Args:
        num_tokens: length of the text compared.
        text: what the tokens were.
        max_error: largest absolute difference of two logits.
        max_logit: largest absolute logit of the source.
        source_loss, target_loss: mean negative log-likelihood of the text, nats per token.
        num_not_finite: how many of the source's logits are infinite or NaN, as they are when weights are.
        own_dtype: the comparison in the checkpoint's own dtype, None if that is float32.
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
    own_dtype: OwnDtype | None = None
    pattern_used: bool = True
    tolerance: float = TOLERANCE

    @property
    def relative_error(self) -> float:
        return self.max_error / self.max_logit if self.max_logit else self.max_error

    @property
    def passed(self) -> bool:
        """Whether the logits agree in float32, and in the own dtype as far as rounding lets the source itself."""
        if self.relative_error > self.tolerance:
            return False
        own, slack = self.own_dtype, self.tolerance * self.max_logit
        return own is None or own.target_rounding <= 2 * own.source_rounding + slack


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
    source: StoredModel,
    target: StoredModel,
    token_ids: Tensor,
    text: str,
    pattern_used: bool = True,
    advance: Callable[[int], object] = lambda num_bytes: None,
) -> Verification:
    """Run two stored models on the same tokens, in float32 and in the source's own dtype, and compare their logits.

    Logits that are not finite must be so in both models, else ``max_error`` is infinite; they do not count otherwise.

    Args:
        source, target: the models.
        token_ids: ``[1, L]`` int64.
        text: what the tokens are.
        pattern_used: False if the LongNet model was given one dense branch for this.
        advance: called with every number of bytes of weights read.
    """
    num_tokens = token_ids.shape[1]
    labels = token_ids[0].roll(-1)
    labels[-1] = -100  # nothing follows the last token
    exact = _run(source, token_ids, torch.float32, advance)  # [L, vocabulary]
    ours = _run(target, token_ids, torch.float32, advance)
    max_logit = source_loss = target_loss = 0.0
    num_not_finite = 0
    for theirs, mine, next_ids in _rows(exact, ours, labels):
        finite = theirs.isfinite()
        num_not_finite += int(finite.logical_not().sum())
        max_logit = max(max_logit, float(theirs.where(finite, 0.0).abs().max()))
        source_loss += float(F.cross_entropy(theirs, next_ids, reduction="sum")) / max(num_tokens - 1, 1)
        target_loss += float(F.cross_entropy(mine, next_ids, reduction="sum")) / max(num_tokens - 1, 1)
    max_error, _ = _distance(exact, ours)
    del ours  # gigabytes where the vocabulary is large

    own_dtype = None
    for dtype in source.compute_dtypes[1:]:
        theirs, mine = (_run(model, token_ids, dtype, advance) for model in (source, target))
        own_dtype = OwnDtype(
            dtype=str(dtype).removeprefix("torch."),
            max_error=_distance(theirs, mine)[0],
            source_rounding=_distance(exact, theirs)[1],
            target_rounding=_distance(exact, mine)[1],
        )
    return Verification(
        num_tokens,
        text,
        max_error,
        max_logit,
        source_loss,
        target_loss,
        num_not_finite,
        own_dtype,
        pattern_used,
    )


def _distance(expected: Tensor, logits: Tensor) -> tuple[float, float]:
    """Return the largest and the root mean square difference of finite logits ``[L, vocabulary]``."""
    largest = total = 0.0
    for theirs, mine in _rows(expected, logits):
        finite = theirs.isfinite()
        if not torch.equal(finite, mine.isfinite()):
            return math.inf, math.inf
        difference = (mine.float() - theirs.float()).where(finite, 0.0)
        largest = max(largest, float(difference.abs().max()))
        total += float(difference.square().sum())
    return largest, math.sqrt(total / expected.numel())


def _rows(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Give a few rows of each tensor at a time, for the sake of memory."""
    return zip(*(tensor.split(64) for tensor in tensors))


def _run(stored: StoredModel, token_ids: Tensor, dtype: torch.dtype, advance: Callable[[int], object]) -> Tensor:
    model = skeleton(stored.model_class, stored.config)
    model.model.rotary_emb = type(model.model.rotary_emb)(stored.config)  # its frequencies are computed, not stored
    with torch.no_grad(), _borrowed_weights(model.eval(), stored, dtype, advance):
        return model(token_ids, use_cache=False).logits[0]  # [L, vocabulary]


def skeleton(model_class: type[PreTrainedModel], config: PreTrainedConfig) -> PreTrainedModel:
    """Build a model whose tensors have shapes but no memory."""
    with torch.device("meta"):
        return model_class(config)


@contextlib.contextmanager
def _borrowed_weights(
    model: nn.Module, source: StoredModel, dtype: torch.dtype, advance: Callable[[int], object]
) -> Iterator[None]:
    """Let each module's parameters be its stored weights, in ``dtype``, for the time of its forward only."""
    stored = match_weights(model, source.tensors)
    owned = {
        module: {name: stored[f"{path}.{name}"] for name, _ in module.named_parameters(recurse=False)}
        for path, module in model.named_modules()
    }
    longest = max(sum(math.prod(tensor.shape) for tensor in own.values()) for own in owned.values())
    largest = max(tensor.num_bytes for tensor in stored.values())
    buffers = torch.empty(longest, dtype=dtype), torch.empty(largest, dtype=torch.uint8)
    lender = _Lender(*buffers, DTYPES.get(source.rounded_to), advance)
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

    weights: Tensor
    stored: Tensor  # bytes as in the file
    rounded_to: torch.dtype | None
    advance: Callable[[int], object]

    def lend(self, own: dict[str, StoredTensor], module: nn.Module, arguments: tuple) -> None:
        lent = 0
        for name, tensor in own.items():
            size = math.prod(tensor.shape)
            weight = self.weights[lent : lent + size].view(tensor.shape)
            stored = read_tensor(tensor, self.stored)
            weight.copy_(stored if self.rounded_to is None else stored.to(self.rounded_to))
            module.register_parameter(name, nn.Parameter(weight, requires_grad=False))
            lent += size
            self.advance(tensor.num_bytes)

    def take_back(self, module: nn.Module, arguments: tuple, output) -> None:
        for name, parameter in list(module.named_parameters(recurse=False)):
            module.register_parameter(name, nn.Parameter(parameter.to("meta"), requires_grad=False))
        # glibc before 2.38 hardly reuses the aligned blocks that torch frees: without this, memory grows by the layer.
        if trim := getattr(ctypes.CDLL(None), "malloc_trim", None):
            trim(0)
