"""Rows of one length, packed from tokenized documents without padding between them and without leaks.

``position_ids`` restart at each document, which LongNet models understand as a border that attention does not cross.
The stream can be stopped after any row and continued later with exactly the rows that would have followed. An object that
was left in the middle continues there by itself: ``Trainer``, which skips what a checkpoint has seen, wants a new one.
"""

import hashlib
from collections.abc import Iterable, Iterator
from copy import deepcopy
from itertools import islice

import torch
from torch import Tensor
from torch.utils.data import IterableDataset, get_worker_info


class PackedRows(IterableDataset):
    """Pack tokenized documents into rows of ``length`` tokens.

    A document is never split if it fits into a row; a longer one is cut into rows of its own, and its rest is packed.
    Of the ``buffer`` documents read ahead, each row takes the longest that still fits, again and again. What no
    document fills (at the end of the stream, or for want of a short one) is filled with ``filler``, unlabelled and a
    document by itself.

    Args:
        documents: yields ``{"input_ids": [...]}`` in the same order at each iteration; a streaming
            ``datasets.IterableDataset`` is asked for its own state, anything else is read from its start on resumption.
            So is one with a shuffle buffer, ``shuffle(seed, buffer_size)``: its state leaves the buffer out. If
            ``set_epoch`` gives each epoch another order, the one that is gone on with needs it again.
        length: tokens per row.
        buffer: documents read ahead.
        rank, world_size: of data-parallel processes: row ``i`` belongs to rank ``i % world_size``; rows left over at
            the end are dropped, and the state is the same on all ranks. Leave both out with ``Trainer``, which shares
            the rows out itself and would never see those of the other ranks.
        filler: token id, not negative.

    Yields:
        ``{"input_ids", "position_ids", "labels"}``, each ``[length]`` int64. The first token of a document, which
        nothing predicts, has the label -100.

    Raises:
        ValueError: if a number does not fit, token ids are no integers, a state was taken with other settings or in
            another epoch, a generator would have to be read twice, or worker processes would each read the whole stream.
    """

    def __init__(
        self, documents: Iterable[dict], length: int, *, buffer: int = 64, rank: int = 0, world_size: int = 1,
        filler: int = 0,
    ):  # fmt: skip
        integers = all(type(number) is int for number in (length, buffer, rank, world_size, filler))
        if not integers or length < 2 or buffer < 1 or not 0 <= rank < world_size or filler < 0:
            raise ValueError(
                "PackedRows needs integers with length >= 2, buffer >= 1, 0 <= rank < world_size and filler >= 0, got "
                f"{length=}, {buffer=}, {rank=}, {world_size=}, {filler=}"
            )
        self.documents = documents
        self.length = length
        self.buffer = buffer
        self.rank, self.world_size = rank, world_size
        self.filler = filler
        self._resumed = self._begun = False
        self._shuffles = _shuffles(documents)
        self._has_state = hasattr(documents, "load_state_dict") and not self._shuffles
        self._go_to({"rows": 0, "read": 0, "waiting": [], "source": None, "epoch": None})

    def state_dict(self) -> dict:
        """Return all that the next row depends on: numbers, and the tokens read ahead; ``torch.save`` can keep it."""
        source = self._source
        if self._reading and self._has_state:
            source = deepcopy(self.documents.state_dict())
        waiting = [document.to(torch.int32) for document in self._waiting]
        return {
            "rows": self._rows, "read": self._read, "waiting": waiting, "source": source, "epoch": self._epoch,
            "shuffles": self._shuffles, **self._settings,
        }  # fmt: skip

    @property
    def _settings(self) -> dict[str, int]:
        """What decides which rows there are, beside the documents."""
        return {
            "length": self.length, "buffer": self.buffer, "world_size": self.world_size, "filler": self.filler
        }  # fmt: skip

    def load_state_dict(self, state: dict) -> None:
        """Let the next iteration continue where ``state_dict`` was taken.

        Raises:
            ValueError: if it was taken from rows with other settings, or of documents in another shuffled order.
        """
        for name, own in self._settings.items():
            if state[name] != own:
                raise ValueError(
                    f"the state was saved with {name}={state[name]}, these rows have {name}={own}; use {state[name]}"
                )
        if state.get("shuffles", self._shuffles) != self._shuffles:
            raise ValueError(
                "the state was saved with documents shuffled in another order; give shuffle() the same seed in each run"
            )
        self._go_to(state)

    def _go_to(self, state: dict) -> None:
        self._rows, self._read = state["rows"], state["read"]
        self._waiting = [document.long() for document in state["waiting"]]
        self._source, self._epoch = state["source"], state.get("epoch")
        self._reading = False

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        if (worker := get_worker_info()) is not None:  # a copy, of which state_dict would know nothing
            raise ValueError(f"PackedRows is one stream: use num_workers=0, got {worker.num_workers}")
        if self._reading and self._source is not None:  # left in the middle, after a resumption further back
            self._go_to(self.state_dict())
        unread = self._unread()
        exhausted = False
        while True:
            while not exhausted and len(self._waiting) < self.buffer:
                document = next(unread, None)
                if document is None:
                    exhausted = True
                elif len(document):
                    self._waiting.append(document)
            if not self._waiting:
                break
            row = self._row()
            index = self._rows % self.world_size
            self._rows += 1
            if index == self.rank:
                own = row
            if index == self.world_size - 1:  # at the end of a round, so that all ranks have one state
                yield own
        self._go_to({"rows": 0, "read": 0, "waiting": [], "source": None, "epoch": None})  # the next epoch

    def _unread(self) -> Iterator[Tensor]:
        """Yield the documents that were not read yet."""
        read = self._read
        epoch = self.documents.epoch if self._shuffles else None
        # Not when the state is loaded: the epoch may be set after that.
        if self._epoch is not None and epoch != self._epoch:
            raise ValueError(
                f"{read} documents were read in the shuffled order of epoch {self._epoch}, which is that of epoch {epoch} "
                f"now; call set_epoch({self._epoch}) on the documents before going on"
            )
        self._epoch = epoch
        if self._has_state and (self._source is not None or self._resumed):
            # None as well: a stream of datasets that was once told to resume does so in each epoch, until told not to.
            self.documents.load_state_dict(deepcopy(self._source))
            self._resumed, read = self._source is not None, 0
        documents = iter(self.documents)
        if self._begun and documents is self.documents and not self._has_state:
            raise ValueError(
                f"documents is a {type(documents).__name__}, which can be read once, and was; give what can be read "
                "again: a list, datasets.IterableDataset.from_generator(...)"
            )
        self._reading = self._begun = True
        for document in islice(documents, read, None):
            self._read += 1
            ids = torch.as_tensor(document["input_ids"])
            if len(ids) and (ids.is_floating_point() or ids.dtype == torch.bool):  # [] has no integer type either
                raise ValueError(f"input_ids of document {self._read - 1} are {ids.dtype}; give integers")
            yield ids.long()

    def _row(self) -> dict[str, Tensor]:
        chosen, room = [], self.length
        while room:
            sizes = [min(len(document), self.length) for document in self._waiting]
            longest = max((size for size in sizes if size <= room), default=0)
            if not longest:
                break
            i = sizes.index(longest)
            chosen.append(self._waiting[i][:longest])
            self._waiting[i : i + 1] = [rest] if len(rest := self._waiting[i][longest:]) else []
            room -= longest
        positions = [torch.arange(len(piece)) for piece in chosen]
        labels = [torch.where(p > 0, piece, -100) for p, piece in zip(positions, chosen)]
        if room:
            chosen.append(torch.full((room,), self.filler))
            positions.append(torch.arange(room))
            labels.append(torch.full((room,), -100))
        return {
            "input_ids": torch.cat(chosen), "position_ids": torch.cat(positions), "labels": torch.cat(labels)
        }  # fmt: skip


def _shuffles(documents: Iterable[dict]) -> list[str]:
    """Return a digest of the order of each shuffle buffer in a stream of ``datasets``, or in what it is made of."""
    parts = [getattr(documents, "_ex_iterable", None)]
    for part in parts:  # grows on the way
        parts += [getattr(part, "ex_iterable", None), *getattr(part, "ex_iterables", [])] if part is not None else []
    buffers = [part for part in parts if type(part).__name__ == "BufferShuffledExamplesIterable"]
    orders = [f"{part.buffer_size} {part.generator.bit_generator.state}" for part in buffers]
    return [hashlib.sha256(order.encode()).hexdigest()[:16] for order in orders]
