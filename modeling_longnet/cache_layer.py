"""One layer of the bounded KV cache: it forgets what no future query can reach."""

import operator
from typing import NamedTuple

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin

from .cache_slots import CacheSlots, Places, plan_slots
from .dilation_pattern import DilationPattern
from .logical_positions import PADDING
from .once_per_pass import OncePerPass


SMALLEST_GROWTH = 64  # tokens
HELD = ("keys", "values", "key_positions", "key_branches", "seen")


class Holding(NamedTuple):
    """What the slots hold from now on, the same in all layers of one plan of slots.

    ``rows``: which of the entries at hand; ``positions, branches``: of these. All ``[B, G, capacity + 1]``.
    """

    rows: Tensor
    positions: Tensor
    branches: Tensor


# Keys, values, positions and branches of what tokens attend to; no branches where nobody may ask for them.
Attended = tuple[Tensor, Tensor, Tensor, Tensor | None]


def _joined(*parts: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return tuple(torch.cat(x, dim=2) for x in zip(*parts))


def _numbers(pattern: DilationPattern) -> Tensor:
    """Write a pattern as numbers: a cache's state holds tensors only."""
    rules = (
        pattern.head_offsets == "blocked", pattern.count_overlaps, pattern.dilate_queries, pattern.window == "sliding"
    )  # fmt: skip
    return torch.tensor([*pattern.segment_lengths, *pattern.dilation_rates, *rules], dtype=torch.int64)


class LongNetCacheLayer(CacheLayerMixin):
    """Keys and values of one layer, with the logical position of each entry, per KV head.

    Invariant: every key that a query at or after the next position can reach is held, in the slot that ``CacheSlots``
    gives its position. One more slot, the last, takes what nobody keeps. Slots that hold nothing have position -1, and
    what stands in a slot until another token takes it may be out of reach: whoever attends compares positions.

    Without ``max_length`` the slots grow with the sequence, so that there are never more than
    ``cache_entries(tokens) + w_0`` of them, until the longest window is whole. With it they are allocated once, at fixed
    addresses, and a step of one token is a few writes in place: it compiles into one graph that serves a whole
    generation.

    Args:
        pattern: the branches and their rules.
        max_length: the most tokens that will come, or None if nobody knows. Patterns whose longest window it covers go
            on beyond it, and need no more slots than for that window.
        once: shared by the layers of a model.
        enlarges: move to larger slots where more than ``max_length`` tokens come, instead of refusing them.
    """

    is_croppable = True
    is_sliding = False

    # All None until the first tokens come.
    keys: Tensor  # [B, G, capacity + 1, D]
    values: Tensor
    key_positions: Tensor  # [B, G, capacity + 1], -1 where nothing stands
    key_branches: Tensor  # the same shape: bit i is set where branch i keeps the entry
    seen: Tensor  # [B] real tokens so far: the next logical position

    def __init__(
        self,
        pattern: DilationPattern,
        max_length: int | None = None,
        once: OncePerPass | None = None,
        enlarges: bool = False,
    ):
        super().__init__()
        self.pattern = pattern
        self.max_length = None if max_length is None else min(max_length, max(pattern.segment_lengths))
        self.enlarges = enlarges
        self.record_past = False
        self.once = OncePerPass() if once is None else once
        self.forget()

    def forget(self) -> None:
        """Give up all that is held, and its memory."""
        self.keys = self.values = self.key_positions = self.key_branches = self.seen = None
        self.slots: CacheSlots | None = None
        # Tokens that a crop may take back, not in their slots yet: keys, values [B, G, P, D] and positions [B, P].
        self.pending: tuple[Tensor, Tensor, Tensor] | None = None
        # Positions and branches of the tensors that update returned last; no branches where nobody may need them.
        self.attended_positions = self._attended_branches = None
        self.columns: int | Tensor = 0  # tokens so far, padding included; a tensor where slots are fixed
        # Positions [B, T] of the tokens in the slots, update by update, until one takes the slot of another.
        self.history: list[Tensor] | None = None if self.is_compileable else []
        self.is_empty = True
        self.is_initialized = False

    @property
    def is_compileable(self) -> bool:
        """Whether a step of one token is the same graph at every length."""
        return self.max_length is not None

    @property
    def attended_branches(self) -> Tensor | None:
        """The branches ``[B, G, S]`` that keep what ``update`` returned last."""
        if self._attended_branches is None and self.attended_positions is not None:
            self._attended_branches = self.slots.branches_of(self.attended_positions, self.attended_positions.shape[1])
        return self._attended_branches

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Allocate an empty cache of the dtype, device and batch of ``key_states [B, G, T, D]``."""
        self._begin(key_states)
        self.seen = torch.zeros(key_states.shape[0], dtype=torch.int64, device=self.device)
        if self.max_length is not None:
            self._allocate(plan_slots(self.pattern, self.max_length), key_states, value_states)
            self.columns = torch.zeros((), dtype=torch.int64, device=self.device)
            self._fix_addresses()

    def _begin(self, key_states: Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        self.is_initialized = True

    def _fix_addresses(self) -> None:
        if self.is_compileable and not torch.compiler.is_compiling():
            for x in (self.keys, self.values, self.key_positions, self.key_branches, self.seen, self.columns):
                torch._dynamo.mark_static_address(x)

    def _leave_inference_mode(self) -> None:
        """Copy what was made in inference mode: outside of it, nobody may write to that in place."""
        if torch.compiler.is_compiling() or torch.is_inference_mode_enabled() or not self.is_initialized:
            return
        if not self.seen.is_inference():
            return
        for name in (*HELD, "columns"):
            if isinstance(x := getattr(self, name), Tensor):
                setattr(self, name, x.clone())
        self._fix_addresses()

    def _allocate(self, slots: CacheSlots, key_states: Tensor, value_states: Tensor) -> None:
        self.slots = slots
        shape = (*key_states.shape[:2], slots.capacity + 1)
        self.keys = key_states.new_zeros(*shape, key_states.shape[-1])
        self.values = value_states.new_zeros(*shape, value_states.shape[-1])
        self.key_positions = torch.full(shape, PADDING, dtype=torch.int64, device=key_states.device)
        self.key_branches = torch.zeros_like(self.key_positions)

    def update(self, key_states: Tensor, value_states: Tensor, *, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Take in new entries, over the slots of those that no later query can reach.

        Args:
            key_states, value_states: ``[B, G, T, D]``.
            positions: ``[B, T]`` logical positions of the new tokens, -1 for padding: those that follow ``seen``.

        Returns:
            ``(keys, values)`` that the new tokens attend to, ``[B, G, S, D]``: what was held before this call and the
            new entries. Their positions and branches ``[B, G, S]`` are left in ``attended_positions`` and
            ``attended_branches``, since ``Cache.update`` hands on two tensors only.

        Raises:
            ValueError: if there are more tokens than ``max_length``, and than fit.
        """
        self._leave_inference_mode()
        num_kv_heads, num_tokens = key_states.shape[1:3]
        in_chunk = num_tokens > 1 and not self.record_past
        if not self.is_initialized and not in_chunk:
            self.lazy_initialization(key_states, value_states)
        self._provide(num_tokens, positions)
        slots = self.slots
        assert slots is not None
        if self.keys is not None:
            key_states, value_states = key_states.to(self.keys.dtype), value_states.to(self.values.dtype)
        elif not in_chunk:
            self._allocate(slots, key_states, value_states)
        if self.record_past:
            attended = self._record(key_states, value_states, positions)
        elif in_chunk:
            self._commit_pending()
            attended = self._take_in(key_states, value_states, positions)
        else:
            self._commit_pending()
            self._count(positions)
            places = self.once(
                positions, (slots, num_kv_heads), lambda: slots.locate(positions[:, None], num_kv_heads)
            )
            rows = self.once(positions, (num_kv_heads, "rows"), self._rows)
            if num_tokens:
                self._write_one(key_states, value_states, positions, places, rows)
            attended = self._held()  # it took the slot of one that it cannot reach itself
        if not self.record_past:
            self._keep_history(positions)
        self.is_empty = self.is_empty and num_tokens == 0
        keys, values, self.attended_positions, self._attended_branches = attended
        return keys, values

    def _provide(self, num_tokens: int, positions: Tensor) -> None:
        """Plan slots, or make them more, so that so many tokens fit."""
        if not self.is_compileable:
            self._make_room(num_tokens, positions)
            return
        if self.get_max_length() > 0 and not torch.compiler.is_compiling():
            self.reserve(num_tokens, self.count_columns(positions), positions)
        if self.slots is None:
            self.slots = plan_slots(self.pattern, self.max_length)

    def count_columns(self, positions: Tensor | None = None) -> int:
        """Count the tokens so far, padding included; ``positions`` of the pass that asks, if any: it waits once."""
        if self.is_empty:
            return 0
        return int(self.columns) if positions is None else self.once(positions, "columns", lambda: int(self.columns))

    def _count(self, positions: Tensor) -> None:
        """Count the tokens at ``positions [B, T]``."""
        seen = self._seen_after(positions)
        num_tokens = positions.shape[1]
        if not self.is_compileable:
            self.seen = seen
            self.columns += num_tokens
        elif self.seen is None:
            self.seen = seen.clone()
            self.columns = torch.full((), num_tokens, device=seen.device)
        else:
            self.seen.copy_(seen)
            self.columns += num_tokens

    def _seen_after(self, positions: Tensor) -> Tensor:
        """Return ``seen`` as it is after the tokens at ``positions [B, T]``, to be read only."""
        before = self.seen

        def count() -> Tensor:
            real = (positions >= 0).sum(-1)
            return real if before is None else before + real

        return self.once(positions, "seen", count)

    def _record(self, key_states: Tensor, value_states: Tensor, positions: Tensor) -> Attended:
        """Let new entries wait for ``crop``; what is held stays."""
        assert self.slots is not None
        slots, num_kv_heads = self.slots, key_states.shape[1]
        new = (key_states, value_states, positions)
        waiting = [new] if self.pending is None else [self.pending, new]
        self.pending = tuple(torch.cat(x, dim=-1 if x[0].ndim == 2 else -2) for x in zip(*waiting))
        self._count(positions)
        keys, values, waiting_positions = self.pending
        waiting_positions = waiting_positions[:, None].expand(-1, num_kv_heads, -1)
        branches = self.once(
            positions, (slots, num_kv_heads, "waiting"), lambda: slots.branches_of(waiting_positions, num_kv_heads)
        )
        return _joined(self._held(), (keys, values, waiting_positions, branches))

    def _take_in(self, key_states: Tensor, value_states: Tensor, positions: Tensor) -> Attended:
        """Take in a chunk: every slot is written once, with what it holds from now on."""
        assert self.slots is not None
        slots, num_kv_heads = self.slots, key_states.shape[1]
        new_positions = positions[:, None].expand(-1, num_kv_heads, -1)
        attended: Attended = (key_states, value_states, new_positions, None)
        if not self.is_empty:
            keys, values, held_positions, held_branches = self._held()
            where = self.once(
                positions, (slots, num_kv_heads, "attended"),
                lambda: _joined(
                    (held_positions, held_branches), (new_positions, slots.branches_of(new_positions, num_kv_heads))
                ),
            )  # fmt: skip
            attended = (*_joined((keys, values), (key_states, value_states)), *where)
        plan = self.once(positions, (slots, num_kv_heads, "chunk"), lambda: self._plan_chunk(positions, num_kv_heads))
        self._count(positions)
        self._hold(attended[0], attended[1], plan)
        if not self.is_initialized:
            self._begin(key_states)
            self._fix_addresses()
        return attended

    def _plan_chunk(self, positions: Tensor, num_kv_heads: int) -> Holding:
        """Plan where the tokens at ``positions [B, T]`` go, before they are counted."""
        assert self.slots is not None
        newest, branches = self.slots.newest(self._seen_after(positions), num_kv_heads)
        # Which of the new tokens is a slot's newest: the nth, negative if none. And in which column that stands.
        nth = newest if self.seen is None else newest - self.seen[:, None, None]
        columns = torch.searchsorted((positions >= 0).cumsum(-1), nth.flatten(1), right=True).view_as(nth)
        if self.keys is None:
            return Holding(columns, newest, branches)
        is_new = nth >= 0
        rows = columns
        if not self.is_empty:
            held = self._held()[2].shape[2]
            stays = torch.arange(newest.shape[2], device=newest.device).clamp(max=held - 1)
            rows = torch.where(is_new, columns + held, stays)
        return Holding(
            rows, torch.where(is_new, newest, self.key_positions), torch.where(is_new, branches, self.key_branches)
        )

    def adopt(self, keys: Tensor, values: Tensor, key_positions: Tensor, seen: Tensor, columns: int) -> None:
        """Take in, while empty, all that later queries can reach of tokens that others have read.

        Args:
            keys, values: ``[B, G, S, D]``.
            key_positions: ``[B, G, S]`` logical positions, -1 for entries that hold nothing.
            seen: ``[B]`` real tokens read so far, per row.
            columns: tokens read so far, padding included.

        Raises:
            ValueError: if tokens are held already.
        """
        if not self.is_empty:
            raise ValueError(f"only an empty cache can adopt entries, this one holds {self.get_seq_length()} tokens")
        if not self.is_initialized:
            self.lazy_initialization(keys, values)
        self._leave_inference_mode()
        if self.is_compileable:
            self.reserve(columns, 0)
        else:
            self._make_room(columns)
        self.seen = self._add(self.seen, seen.to(self.seen.device))
        self.columns += columns
        self.history = None
        self._settle(keys, values, key_positions)
        self.is_empty = False

    def _held(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return keys, values, positions and branches of the slots in use."""
        assert self.slots is not None
        used = self.slots.capacity + 1
        if self.slots.is_linear and not self.is_compileable:  # one slot per column: nothing stands beyond
            used = min(self.columns, used)
        return tuple(x[:, :, :used] for x in (self.keys, self.values, self.key_positions, self.key_branches))

    def _commit_pending(self) -> None:
        if self.pending is not None:
            keys, values, positions = self.pending
            self.pending = None
            self._keep_history(positions)
            waiting = (keys, values, positions[:, None].expand(-1, keys.shape[1], -1))
            self._settle(*_joined(self._held()[:3], waiting))

    def _keep_history(self, positions: Tensor) -> None:
        if self.history is not None:
            assert self.slots is not None
            self.history.append(positions)
            windows = (self.pattern.segment_lengths[ring.branch] for ring in self.slots.rings)
            if self.columns > (self.slots.length if self.slots.is_linear else min(windows)):
                self.history = None

    def _make_room(self, num_tokens: int, positions: Tensor | None = None) -> None:
        """Grow the slots where the sequence outgrows them; ``positions`` of the pass that needs it, if any."""
        columns = self.columns + num_tokens
        if self.slots is None or not (self.slots.is_endless or columns <= self.slots.length):
            self._move_to(self._grown(columns), positions)

    def _move_to(self, slots: CacheSlots, positions: Tensor | None) -> None:
        """Plan with other slots, and put what the old ones hold into them."""
        self.slots = slots
        if self.keys is not None:
            keys, values, held = self.keys, self.values, self.key_positions
            if positions is None:
                plan = self._plan_settling(held)
            else:
                plan = self.once(positions, (slots, held.shape, "moved"), lambda: self._plan_settling(held))
            self.keys = self.values = self.key_positions = self.key_branches = None
            self._hold(keys, values, plan)

    def reserve(self, num_tokens: int, columns: int, positions: Tensor | None = None) -> None:
        """Make sure that so many more tokens fit into slots of fixed size, after ``columns`` that came.

        Args:
            positions: those of the forward pass that needs them, if any: its layers then share a move.

        Raises:
            ValueError: if they do not, and the slots do not enlarge.
        """
        assert self.max_length is not None
        needed = columns + num_tokens
        if needed <= self.max_length or self.max_length >= max(self.pattern.segment_lengths):
            return
        if not self.enlarges:
            raise ValueError(
                f"the cache was made for max_length={self.max_length} tokens, got {needed}: make it with that "
                "max_length or more, or with enlarges=True"
            )
        self.max_length = max(needed, min(2 * self.max_length, max(self.pattern.segment_lengths)))
        if self.is_initialized:
            self._move_to(plan_slots(self.pattern, self.max_length), positions)
            self._fix_addresses()

    def _grown(self, columns: int) -> CacheSlots:
        """Plan slots for so many tokens and some more, as many as the bound allows."""
        bound = self.pattern.cache_entries(columns) + self.pattern.segment_lengths[0]
        more = min(self.pattern.segment_lengths[0], max(SMALLEST_GROWTH, columns))
        longest = max(self.pattern.segment_lengths)
        while True:
            slots = plan_slots(self.pattern, min(columns + more, max(longest, columns)))
            if more == 0 or slots.capacity + 1 <= bound:
                return slots
            more //= 2

    def _settle(self, keys: Tensor, values: Tensor, positions: Tensor) -> None:
        """Let the slots hold what belongs there of the entries at ``positions [B, G, S]``, and nothing else."""
        assert self.slots is not None
        if keys.shape[2]:
            self._hold(keys, values, self._plan_settling(positions))
        else:
            self._allocate(self.slots, keys, values)

    def _plan_settling(self, positions: Tensor) -> Holding:
        """Plan where entries at ``positions [B, G, S]`` go, in any order."""
        assert self.slots is not None
        seen = self.seen if self.pending is None else self.seen - (self.pending[2] >= 0).sum(-1)
        newest, branches = self.slots.newest(seen, positions.shape[1])
        positions, order = positions.sort(-1)
        found = torch.searchsorted(positions, newest).clamp(max=positions.shape[2] - 1)
        stands = positions.gather(2, found) == newest
        return Holding(order.gather(2, found), torch.where(stands, newest, PADDING), torch.where(stands, branches, 0))

    def _write_one(
        self, keys: Tensor, values: Tensor, positions: Tensor, places: Places, rows: tuple[Tensor, Tensor]
    ) -> None:
        """Put one entry ``[B, G, 1, D]`` at ``positions [B, 1]`` into its slot.

        Args:
            rows: of ``_rows``.
        """
        assert self.slots is not None
        slots = places.slots[..., 0]  # [B, G]
        positions = torch.where(slots < self.slots.capacity, positions, PADDING)
        for name, new in (
            ("keys", keys[:, :, 0]), ("values", values[:, :, 0]), ("key_positions", positions),
            ("key_branches", places.branches[..., 0]),
        ):  # fmt: skip
            held = getattr(self, name)
            # Not scatter_: the compiler writes an index_put in place, but copies all that is held around a scatter.
            if self._is_differentiated(held, new):
                setattr(self, name, held.index_put((*rows, slots), new))
            else:
                held.index_put_((*rows, slots), new)

    def _rows(self) -> tuple[Tensor, Tensor]:
        """Return the rows of the batch and the KV heads as indices, ``[B, 1]`` and ``[1, G]``."""
        batch, num_kv_heads = self.keys.shape[:2]
        device = self.keys.device
        return torch.arange(batch, device=device)[:, None], torch.arange(num_kv_heads, device=device)[None]

    def _hold(self, keys: Tensor, values: Tensor, plan: Holding) -> None:
        """Hold these of the entries ``[B, G, S, D]``, in place where addresses are fixed."""
        for name, entries in (("keys", keys), ("values", values)):
            held = getattr(self, name)
            rows = plan.rows[..., None].expand(-1, -1, -1, entries.shape[-1])
            if held is None or not self.is_compileable or self._is_differentiated(held, entries):
                setattr(self, name, entries.gather(2, rows))
            elif torch.compiler.is_compiling():
                held.copy_(entries.gather(2, rows))
            else:  # one pass over the slots, not two
                torch.gather(entries, 2, rows, out=held)
        for name, new in (("key_positions", plan.positions), ("key_branches", plan.branches)):
            held = getattr(self, name)
            if held is None or not self.is_compileable:  # a copy: layers share the plan
                setattr(self, name, new.clone())
            else:
                held.copy_(new)

    @staticmethod
    def _is_differentiated(held: Tensor, new: Tensor) -> bool:
        """Whether somebody may ask for gradients through what is held: it must not change in place then."""
        return torch.is_grad_enabled() and (new.requires_grad or held.requires_grad)

    def _add(self, total: Tensor, more: Tensor) -> Tensor:
        return total.add_(more) if self.is_compileable else total + more

    def activate_past_recording(self) -> None:
        """Let new tokens wait for ``crop``, which says which of them stay; until ``record_past`` is False again."""
        self.record_past = True

    @property
    def croppable(self) -> int:
        """How many of the last tokens can be taken back: all until a slot changes hands, then those recorded."""
        if not self.is_initialized:
            return 0
        if self.history is not None:
            return int(self.columns)
        return 0 if self.pending is None else self.pending[2].shape[1]

    def crop(self, tokens_to_remove: int) -> None:
        """Take back the last ``-tokens_to_remove`` tokens.

        Raises:
            ValueError: if it is no negative integer or 0, or those tokens have taken the slots of others already.
        """
        try:
            removed = -operator.index(tokens_to_remove)
        except TypeError:
            removed = -1
        if removed < 0:
            raise ValueError(
                f"crop takes a number of tokens to remove as a negative integer, got {tokens_to_remove!r}"
            )
        if not self.is_initialized:
            return
        self._leave_inference_mode()
        if removed > self.croppable:
            raise ValueError(
                f"cannot take back {removed} tokens: only the last {self.croppable} are held whole; call "
                "activate_past_recording() before generating them"
            )
        self.columns -= removed
        if self.pending is not None:
            keys, values, positions = self.pending
            kept = max(positions.shape[1] - removed, 0)
            self.seen = self._add(self.seen, -(positions[:, kept:] >= 0).sum(-1))
            removed -= positions.shape[1] - kept
            self.pending = (keys[:, :, :kept], values[:, :, :kept], positions[:, :kept])
            self._commit_pending()
        while removed:
            assert self.history is not None  # else no more than what was pending can be removed
            positions = self.history.pop()
            kept = max(positions.shape[1] - removed, 0)
            self.seen = self._add(self.seen, -(positions[:, kept:] >= 0).sum(-1))
            removed -= positions.shape[1] - kept
            if kept:
                self.history.append(positions[:, :kept])
            taken_back = self.key_positions >= self.seen[:, None, None]
            self.key_positions.masked_fill_(taken_back, PADDING)
            self.key_branches.masked_fill_(taken_back, 0)
        if not self.is_compileable and self.columns == 0:
            self.forget()

    def reset(self) -> None:
        """Forget all tokens."""
        if not (self.is_initialized and self.is_compileable):
            self.forget()
            return
        self._leave_inference_mode()
        self.key_positions.fill_(PADDING)  # fixed addresses stay
        self.keys.zero_()  # a step may read slots that nothing stands in: they hold no nan
        self.values.zero_()
        self.key_branches.zero_()
        self.seen.zero_()
        assert isinstance(self.columns, Tensor)
        self.columns.zero_()
        self.pending = self.attended_positions = self._attended_branches = None
        self.is_empty = True

    def state_dict(self) -> dict[str, Tensor]:
        """Return what is held, as tensors that ``load_state_dict`` takes: views, which the next tokens overwrite.

        Raises:
            ValueError: if tokens wait for a ``crop``.
        """
        if self.pending is not None:
            raise ValueError(f"{self.pending[2].shape[1]} tokens wait for crop(), which says which of them stay")
        if not self.is_initialized:
            return {}
        assert self.slots is not None
        numbers = {"columns": torch.as_tensor(self.columns), "slots": torch.tensor(self.slots.length)}
        return {name: getattr(self, name) for name in HELD} | numbers | {"pattern": _numbers(self.pattern)}

    def check_state(self, state: dict[str, Tensor], rows: int, num_kv_heads: int, head_dim: int) -> None:
        """Refuse a state that ``load_state_dict`` cannot take.

        Args:
            rows, num_kv_heads, head_dim: of keys and values.

        Raises:
            ValueError: if it is incomplete, of another pattern, of other shapes, or of other slots than ``max_length``
                gives.
        """
        if missing := {*HELD, "columns", "slots", "pattern"} - state.keys():
            raise ValueError(f"the state lacks {', '.join(sorted(missing))}")
        if not torch.equal(state["pattern"].cpu(), _numbers(self.pattern)):
            raise ValueError(f"the state is one of other branches or rules than {self.pattern}")
        shapes: dict[str, tuple[int, ...]] = {"slots": (), "columns": (), "seen": (rows,)}
        if state["slots"].ndim == 0:
            entries = (rows, num_kv_heads, plan_slots(self.pattern, int(state["slots"])).capacity + 1)
            shapes |= dict.fromkeys(("keys", "values"), (*entries, head_dim))
            shapes |= dict.fromkeys(("key_positions", "key_branches"), entries)
        for name, shape in shapes.items():
            if state[name].shape != shape:
                raise ValueError(f"{name} in the state must be {list(shape)}, got {list(state[name].shape)}")
        slots = int(state["slots"])
        if self.is_compileable and slots != self.max_length and not self.enlarges:
            raise ValueError(
                f"the state has slots for {slots} tokens, the cache for {self.max_length}: make it with "
                f"max_length={slots}, or with enlarges=True"
            )

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Hold what another cache held, in the same slots; ``check_state`` must allow it.

        A layer that holds tokens already keeps its dtype and device, an empty one takes the state's.
        """
        if not state:
            self.reset()
            return
        self._leave_inference_mode()
        slots, columns, keys, values = int(state["slots"]), int(state["columns"]), state["keys"], state["values"]
        if self.keys is not None:
            keys, values = keys.to(self.keys), values.to(self.values)
        fits = self.is_initialized and self.keys is not None and self.keys.shape == keys.shape
        if not (self.is_compileable and fits and slots == self.max_length):
            self.max_length = slots if self.is_compileable else None
            self.forget()
            self.lazy_initialization(keys, values)
        if not self.is_compileable:
            self._allocate(plan_slots(self.pattern, slots), keys, values)
        for name in HELD:
            getattr(self, name).copy_(state[name])
        if isinstance(self.columns, Tensor):
            self.columns.fill_(columns)
        else:
            self.columns = columns
        self.pending = self.attended_positions = self._attended_branches = self.history = None
        self.is_empty = False

    def get_seq_length(self) -> int | Tensor:
        """Return the number of tokens so far, padding included, held or not."""
        return self.columns

    def get_max_length(self) -> int:
        """Return -1 if the sequence may go on for ever, else the most tokens that fit."""
        if self.max_length is None or self.max_length >= max(self.pattern.segment_lengths):
            return -1
        return self.max_length

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Return the columns that a padding mask for the next ``query_length`` tokens has, and its first column."""
        return self.columns + query_length, 0

    def _select_rows(self, index: Tensor) -> None:
        if not self.is_initialized:
            return
        self._leave_inference_mode()
        for name in HELD:
            x = getattr(self, name)
            if x is None:
                continue
            rows = x.index_select(0, index.to(x.device))
            if self.is_compileable and rows.shape == x.shape:  # fixed addresses stay
                x.copy_(rows)
            else:
                setattr(self, name, rows)
        self._fix_addresses()
        if self.pending is not None:
            self.pending = tuple(x.index_select(0, index.to(x.device)) for x in self.pending)
        if self.history is not None:
            self.history = [x.index_select(0, index.to(x.device)) for x in self.history]

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Reorder the rows of the batch, for beam search."""
        self._select_rows(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep some rows of the batch."""
        self._select_rows(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row of the batch."""
        if self.is_initialized:
            self._select_rows(torch.arange(len(self.seen), device=self.seen.device).repeat_interleave(repeats))
