"""Proof that a conversion kept the model: source and target must give the same logits on a real text."""

import math
from dataclasses import dataclass, field
from pathlib import Path
from pydoc_data.topics import topics

import torch
from torch import Tensor
from transformers import AutoTokenizer

from modeling_longnet import DilationPattern

from .stored_model import Advance, StoredModel


MOST_TOKENS = 4096  # as many as the converter's default first segment has at most
TOLERANCE = 1e-4
CHARACTERS_PER_TOKEN = 8  # more than any tokenizer has on average
SLICE = 2048  # tokens of the vocabulary whose logits are compared at a time

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
        if own is None:
            return True
        return math.isfinite(own.max_error) and own.target_rounding <= 2 * own.source_rounding + slack


def dense_length(pattern: DilationPattern) -> int:
    """Return the longest input on which the pattern is ordinary attention for every query, 0 if it never is.

    The first branch must reach every key undilated, and no other branch may count one again.
    """
    (first, *others) = pattern.branches
    if first.dilation_rate > 1 or (others and pattern.count_overlaps):
        return 0
    return first.segment_length


def check_verify_tokens(number: int) -> None:
    """Refuse a number of tokens to compare that is none.

    Raises:
        ValueError: if it is not a positive integer.
    """
    if isinstance(number, bool) or not isinstance(number, int) or number < 1:
        raise ValueError(
            f"verify_tokens must be a positive integer, got {number!r}; to compare none, pass verify=False (--no-verify)"
        )


def verification_tokens(source: Path, vocab_size: int, max_tokens: int) -> tuple[Tensor, str]:
    """Encode a real text with the source's tokenizer, without running any code of the source.

    The text is the opening of Moby-Dick, and after it the language reference that comes with Python. A source without a usable tokenizer gets token ids spread over the vocabulary instead.

    Returns:
        ``[1, L]`` int64 with ``1 <= L <= max_tokens``, and a few words on what the tokens are.
    """
    reference = "\n\n".join(topics[name] for name in sorted(topics))
    text = (TEXT + reference)[: CHARACTERS_PER_TOKEN * max_tokens]
    try:
        folder = source if source.is_dir() else source.parent
        ids = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)(text)["input_ids"][:max_tokens]
    except Exception:  # tokenizer files are anybody's: whatever is wrong with them, the weights can still be compared
        ids = []
    if ids and max(ids) < vocab_size:
        return torch.tensor([ids]), "Moby-Dick's opening and Python's language reference"
    return (
        torch.arange(max_tokens)[None] * 7919
    ) % vocab_size, "spread token ids (the source has no usable tokenizer)"


@dataclass(frozen=True)
class Comparison:
    """Two stored models that must give the same logits on a text.

    Args:
        source, target: the models.
        token_ids: ``[1, L]`` int64.
        text: what the tokens are.
        pattern_used: False if the LongNet model was given one dense branch for this.
    """

    source: StoredModel
    target: StoredModel
    token_ids: Tensor
    text: str
    pattern_used: bool = True


def compare_logits(comparison: Comparison, advance: Advance = lambda num_bytes: None) -> Verification:
    """Run two stored models on the same tokens, in float32 and in the source's own dtype, and compare their logits.

    Logits that are not finite must be so in both models, else ``max_error`` is infinite; they do not count otherwise.
    Never more than a slice of the vocabulary is held.

    ``advance`` is called with every number of bytes of weights read.
    """
    source, target, token_ids = comparison.source, comparison.target, comparison.token_ids
    exact, *own = source.compute_dtypes
    runs = [(source.run(token_ids, dtype, advance), target.run(token_ids, dtype, advance)) for dtype in (exact, *own)]
    vocabulary, next_ids = runs[0][0].head.shape[0], token_ids[0, 1:]
    error, own_error, source_rounding, target_rounding = _Distance(), _Distance(), _Distance(), _Distance()
    source_loss, target_loss = _Loss(next_ids), _Loss(next_ids)
    max_logit, num_not_finite = 0.0, 0
    for first in range(0, vocabulary, SLICE):
        last = min(first + SLICE, vocabulary)
        theirs, ours = (logits.slice(first, last) for logits in runs[0])  # [L, slice]
        finite = theirs.isfinite()
        num_not_finite += int(finite.logical_not().sum())
        max_logit = max(max_logit, float(theirs.where(finite, 0.0).abs().max()))
        source_loss.add(theirs, first)
        target_loss.add(ours, first)
        error.add(theirs, ours)
        for rounded in runs[1:]:
            their_rounded, our_rounded = (logits.slice(first, last) for logits in rounded)
            own_error.add(their_rounded, our_rounded)
            source_rounding.add(theirs, their_rounded)
            target_rounding.add(theirs, our_rounded)
    own_dtype = None
    if own:
        own_dtype = OwnDtype(
            dtype=str(own[0]).removeprefix("torch."),
            max_error=own_error.largest,
            source_rounding=source_rounding.root_mean_square,
            target_rounding=target_rounding.root_mean_square,
        )
    return Verification(
        token_ids.shape[1],
        comparison.text,
        error.largest,
        max_logit,
        source_loss.mean,
        target_loss.mean,
        num_not_finite,
        own_dtype,
        comparison.pattern_used,
    )


@dataclass
class _Distance:
    """The largest and the root mean square difference of finite logits, infinite where only one of two is finite."""

    largest: float = 0.0
    total: float = 0.0
    count: int = 0

    def add(self, expected: Tensor, logits: Tensor) -> None:
        finite = expected.isfinite()
        if not torch.equal(finite, logits.isfinite()):
            self.largest = self.total = math.inf
        difference = (logits.float() - expected.float()).where(finite, 0.0)
        self.largest = max(self.largest, float(difference.abs().max()))
        self.total += float(difference.square().sum())
        self.count += difference.numel()

    @property
    def root_mean_square(self) -> float:
        return math.sqrt(self.total / self.count)


@dataclass
class _Loss:
    """The mean negative log-likelihood of a text, nats per token."""

    next_ids: Tensor  # [L - 1]
    normaliser: Tensor = field(init=False)  # [L - 1] log-sum-exp so far
    of_next: Tensor = field(init=False)  # [L - 1] logits of the tokens that do follow

    def __post_init__(self) -> None:
        self.normaliser = torch.full(self.next_ids.shape, -torch.inf)
        self.of_next = torch.zeros(self.next_ids.shape)

    def add(self, logits: Tensor, first: int) -> None:
        logits = logits[:-1]  # nothing follows the last token
        self.normaliser = torch.logaddexp(self.normaliser, logits.logsumexp(-1))
        here = (self.next_ids >= first) & (self.next_ids < first + logits.shape[1])
        self.of_next[here] = logits[here, self.next_ids[here] - first]

    @property
    def mean(self) -> float:
        return float((self.normaliser - self.of_next).sum()) / max(len(self.next_ids), 1)
