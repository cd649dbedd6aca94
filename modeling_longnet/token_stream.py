"""Scoring a sequence that never has to fit anywhere: chunk after chunk, in memory that does not grow."""

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn

from .cache_longnet import LongNetCache
from .head_loss import token_losses


class TokenStream:
    """Scores the next tokens of a sequence, given all before them, and can be stored and taken up again.

    Theorem: the losses are those of one forward pass over the whole sequence. Between chunks only the bounded cache
    and the last hidden state are kept. Positions are integers, so they stay exact at any length.

    Args:
        model: a ``LongNetForCausalLM`` in evaluation mode.
        cache: a ``LongNetCache`` to go on from, or None: one whose windows are whole from the start, so that memory is
            constant from the first chunk on.

    Raises:
        ValueError: if the model is in training mode, or has ``dense_layers``, whose cache would grow with the stream,
            and no cache is given.
    """

    def __init__(self, model: nn.Module, cache: LongNetCache | None = None):
        if model.training:
            raise ValueError("the model is in training mode, where dropout changes losses; call model.eval()")
        if cache is None:
            if model.config.dense_layers:
                raise ValueError(
                    f"dense_layers {list(model.config.dense_layers)} keep every token, so a stream would outgrow any "
                    "memory; pass cache=LongNetCache(model.config) if it is short enough"
                )
            cache = LongNetCache(model.config, max_length=max(model.config.segment_lengths))
        self.model = model
        self.cache = cache
        self.position = 0  # tokens scored so far
        self.last_hidden_state: Tensor | None = None  # [B, 1, hidden_size]: what predicts the next token

    @torch.no_grad()
    def score(self, tokens: Tensor) -> Tensor:
        """Take in the next tokens ``[B, T]`` of every row.

        Returns:
            ``[B, T]`` float32: minus the log probability of each token, given all before it; nan for the very first
            one, which nothing predicts.

        Raises:
            ValueError: if there is no token, or another number of rows than before.
        """
        if tokens.ndim != 2 or 0 in tokens.shape:
            raise ValueError(f"tokens must be [batch, at least one token], got {list(tokens.shape)}")
        hidden = self.model.model(input_ids=tokens, past_key_values=self.cache, use_cache=True).last_hidden_state
        losses = torch.full(tokens.shape, torch.nan, dtype=torch.float32, device=hidden.device)
        head = self.model.lm_head
        if self.last_hidden_state is not None:
            losses[:, :1] = token_losses(self.last_hidden_state, head, tokens[:, :1])
        losses[:, 1:] = token_losses(hidden[:, :-1], head, tokens[:, 1:])
        self.last_hidden_state = hidden[:, -1:].clone()  # not a view, which would keep the chunk alive
        self.position += tokens.shape[1]
        return losses

    def state_dict(self) -> dict[str, Tensor]:
        """Return all that the next losses depend on besides the model, as tensors that ``load_state_dict`` takes."""
        state = {f"cache.{name}": x for name, x in self.cache.state_dict().items()}
        state["position"] = torch.tensor(self.position)
        if self.last_hidden_state is not None:
            state["last_hidden_state"] = self.last_hidden_state
        return state

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Go on from a state, as if its tokens had been scored here."""
        prefix = "cache."
        self.cache.load_state_dict(
            {name.removeprefix(prefix): x for name, x in state.items() if name.startswith(prefix)}
        )
        self.position = int(state["position"])
        self.last_hidden_state = state.get("last_hidden_state")


def stream(model: nn.Module, chunks: Iterable[Tensor], cache: LongNetCache | None = None) -> Iterator[Tensor]:
    """Score a sequence of any length, fed in chunks; nothing that grows with it is kept.

    Args:
        model: a ``LongNetForCausalLM`` in evaluation mode.
        chunks: token ids ``[B, T]``, T at will; one after the other they are the sequence. Long chunks (64k tokens) are
            the fastest.
        cache: as in ``TokenStream``.

    Yields:
        ``[B, T]`` float32 per chunk: minus the log probability of each token, given all before it; nan for the very
        first one.
    """
    tokens = TokenStream(model, cache)
    for chunk in chunks:
        yield tokens.score(chunk)
