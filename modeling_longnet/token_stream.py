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
        model: a ``LongNetForCausalLM`` in evaluation mode, or a PEFT model of one.
        cache: a ``LongNetCache`` to go on from, or None: one whose windows are whole from the start, so that memory is
            constant from the first chunk on. Tokens that a given cache holds already are context and no part of the
            stream: ``position`` counts from 0 after them, and what predicts its first token is not in a cache, so that
            this token's loss is nan.

    Raises:
        ValueError: if the model is no ``LongNetForCausalLM`` or in training mode, puts virtual tokens before the
            sequence (prompt tuning), the cache is no ``LongNetCache``, or if the model has ``dense_layers``, whose cache
            would grow with the stream, and no cache is given.
    """

    def __init__(self, model: nn.Module, cache: LongNetCache | None = None):
        if hasattr(model, "get_base_model"):
            if (adapter := model.active_peft_config).is_prompt_learning:
                raise ValueError(
                    f"a stream takes no {adapter.peft_type.value}, whose virtual tokens it would leave out"
                )
            model = model.get_base_model()
        # By what they have: code loaded with a checkpoint may hold the classes twice.
        if not (hasattr(model, "lm_head") and hasattr(getattr(model, "config", None), "layer_pattern")):
            raise ValueError(f"a stream needs a LongNetForCausalLM, got {type(model).__name__}")
        if cache is not None and not hasattr(cache, "next_positions"):
            raise ValueError(f"a stream needs a LongNetCache, got {type(cache).__name__}")
        _refuse_training(model)
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
            ValueError: if there is no token, or another number of rows than before, the model is in training mode, or its
                RoPE depends on the length (longrope, dynamic) and would rotate what follows otherwise than what came.
        """
        if not isinstance(tokens, Tensor):
            raise ValueError(f"tokens must be a tensor [batch, at least one token], got {type(tokens).__name__}")
        if tokens.ndim != 2 or 0 in tokens.shape:
            raise ValueError(f"tokens must be [batch, at least one token], got {list(tokens.shape)}")
        _refuse_training(self.model)
        rotary = self.model.model.rotary_emb
        if rotary.length_border is not None and not self.cache.is_empty:
            length = int(self.cache.layers[0].seen.max()) + tokens.shape[1]
            rotary.refuse_turn(self.cache.rotated_up_to, length)
        hidden = self.model.model(
            input_ids=tokens, past_key_values=self.cache, use_cache=True, return_dict=True
        ).last_hidden_state
        losses = torch.full(tokens.shape, torch.nan, dtype=torch.float32, device=hidden.device)
        head = self.model.lm_head
        if self.last_hidden_state is not None:
            losses[:, :1] = token_losses(self.last_hidden_state.to(hidden), head, tokens[:, :1])
        losses[:, 1:] = token_losses(hidden[:, :-1], head, tokens[:, 1:])
        self.last_hidden_state = hidden[:, -1:].clone()  # not a view, which would keep the chunk alive
        self.position += tokens.shape[1]
        return losses

    def state_dict(self) -> dict[str, Tensor]:
        """Return all that the next losses depend on besides the model, as tensors that ``load_state_dict`` takes.

        They are copies: what is scored afterwards does not change them.
        """
        state = {f"cache.{name}": x.clone() for name, x in self.cache.state_dict().items()}
        state["position"] = torch.tensor(self.position)
        if self.last_hidden_state is not None:
            state["last_hidden_state"] = self.last_hidden_state.clone()
        return state

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Go on from a state, as if its tokens had been scored here.

        As with a module's, tensors move to the model's device, and those of a model of another dtype are rounded to this
        one's; a state of the same dtype goes on bit for bit.

        Raises:
            ValueError: if the state lacks a tensor, or one has another shape than in a state of this model and cache.
                The stream stays as it is then.
        """
        self._check(state)
        prefix = "cache."
        held = {name.removeprefix(prefix): x for name, x in state.items() if name.startswith(prefix)}
        self.cache.load_state_dict(self._moved(held, state.get("last_hidden_state")))
        self.position = int(state["position"])
        self.last_hidden_state = state.get("last_hidden_state")

    def _moved(self, held: dict[str, Tensor], last_hidden_state: Tensor | None) -> dict[str, Tensor]:
        """Bring a cache's keys and values to where, and to the dtype in which, the model computes; the rest follows."""
        # What tells the dtype of the state's model is its hidden state: under autocast values may be of another one.
        witness = held.get("0.keys") if last_hidden_state is None else last_hidden_state
        dtype = None if witness is None or witness.dtype == self.model.dtype else self.model.dtype
        moved = dict(held)
        for i, layer in enumerate(self.model.model.layers):
            device = next(layer.parameters()).device
            for name in (f"{i}.keys", f"{i}.values"):
                if name in held:
                    # A layer whose weights wait elsewhere until it runs is on no device yet.
                    moved[name] = held[name].to(device=None if device.type == "meta" else device, dtype=dtype)
        return moved

    def _check(self, state: dict[str, Tensor]) -> None:
        """Refuse what lacks or misfits beside the cache's tensors, which the cache checks itself."""
        needed = {"position"}
        if "last_hidden_state" in state or state.get("position", torch.zeros(1)).any():
            needed |= {"last_hidden_state", "cache.0.seen"}
        if missing := sorted(needed - state.keys()):
            raise ValueError(f"the state lacks {', '.join(missing)}")
        shapes: dict[str, tuple[int, ...]] = {"position": ()}
        if "last_hidden_state" in state:
            shapes["last_hidden_state"] = (*state["cache.0.seen"].shape[:1], 1, self.model.config.hidden_size)
        for name, shape in shapes.items():
            if state[name].shape != shape:
                raise ValueError(f"{name} in the state must be {list(shape)}, got {list(state[name].shape)}")


def _refuse_training(model: nn.Module) -> None:
    if model.training:
        raise ValueError("the model is in training mode, where dropout changes losses; call model.eval()")


def stream(model: nn.Module, chunks: Iterable[Tensor], cache: LongNetCache | None = None) -> Iterator[Tensor]:
    """Score a sequence of any length, fed in chunks; nothing that grows with it is kept.

    Args:
        model: as in ``TokenStream``.
        chunks: tensors of token ids ``[B, T]``, T at will; one after the other they are the sequence. Long chunks (64k
            tokens) are the fastest.
        cache: as in ``TokenStream``.

    Yields:
        ``[B, T]`` float32 per chunk: minus the log probability of each token, given all before it; nan for the very
        first one.
    """
    tokens = TokenStream(model, cache)
    for chunk in chunks:
        yield tokens.score(chunk)
