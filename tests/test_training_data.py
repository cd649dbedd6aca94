"""Documents and rows: whole packages, nothing lost or doubled, no leak between documents, resumption to the byte."""

import io
from itertools import islice

import datasets
import pytest
import torch
from tiny_models import tiny_model

from training.documents import python_packages
from training.packing import PackedRows


def documents(count: int = 40, longest: int = 90):
    """Yield documents whose tokens say which they are and where: 1000 * document + position."""
    lengths = torch.randint(1, longest, (count,), generator=torch.Generator().manual_seed(0)).tolist()
    for i, length in enumerate(lengths):
        yield {"input_ids": [1000 * (i + 1) + p for p in range(length)]}


def streaming() -> datasets.IterableDataset:
    stream = datasets.IterableDataset.from_generator(documents)
    return stream.map(lambda document: {"input_ids": document["input_ids"]})


def some(start: int, end: int):
    yield from list(documents())[start:end]


def halves() -> list[datasets.IterableDataset]:
    """Make two streams; the first is shuffled."""
    first, second = (
        datasets.IterableDataset.from_generator(some, gen_kwargs={"start": start, "end": start + 20})
        for start in (0, 20)
    )
    return [first.shuffle(seed=1, buffer_size=6), second]


SHUFFLED = {
    "shuffled after a map": lambda: streaming().shuffle(seed=1, buffer_size=8),
    "mapped after a shuffle": lambda: (
        datasets.IterableDataset.from_generator(documents)
        .shuffle(seed=1, buffer_size=8)
        .map(lambda document: {"input_ids": document["input_ids"][::-1]})
    ),
    "a table in shards": lambda: (
        datasets.Dataset.from_list(list(documents())).to_iterable_dataset(4).shuffle(seed=1, buffer_size=8)
    ),
    "interleaved": lambda: datasets.interleave_datasets(halves()),
    "concatenated": lambda: datasets.concatenate_datasets(halves()),
}


def packed(source=None, **options) -> PackedRows:
    return PackedRows(list(documents()) if source is None else source, 50, **{"buffer": 4, **options})


def content(rows) -> list[dict]:
    return [{name: x.tolist() for name, x in row.items()} for row in rows]


def test_every_token_comes_once_and_short_documents_stay_whole():
    rows = list(packed())
    assert {len(row["input_ids"]) for row in rows} == {50}
    tokens = torch.cat([row["input_ids"] for row in rows])
    expected = [token for document in documents() for token in document["input_ids"]]
    assert sorted(tokens[tokens != 0].tolist()) == sorted(expected)
    for row in rows:
        starts = (row["position_ids"] == 0).nonzero().flatten().tolist()
        for start, end in zip(starts, [*starts[1:], 50]):
            piece = row["input_ids"][start:end]
            if piece[0] == 0:
                assert (piece == 0).all() and end == 50
                continue
            assert (piece.diff() == 1).all(), "a piece is one stretch of one document"
            assert piece[0] % 1000 % 50 == 0, "only documents longer than a row are cut, at rows"


def test_documents_are_labelled_but_for_their_first_token_and_the_filler():
    for row in packed():
        ids, labels = row["input_ids"], row["labels"]
        expected = ids.masked_fill((row["position_ids"] == 0) | (ids == 0), -100)
        assert torch.equal(labels, expected)


def test_little_is_filled():
    rows = list(packed(buffer=16))
    assert sum((row["input_ids"] == 0).sum().item() for row in rows) < 0.05 * 50 * len(rows)


@pytest.mark.parametrize(
    "source",
    [lambda: list(documents()), streaming, lambda: datasets.interleave_datasets([streaming(), streaming()])]
    + list(SHUFFLED.values()),
    ids=["list", "streaming", "interleaved in order", *SHUFFLED],
)
@pytest.mark.parametrize("stop", [0, 1, 17])
def test_resumption_gives_exactly_the_rows_that_would_have_followed(source, stop):
    whole = content(packed(source()))
    first = packed(source())
    iterator = iter(first)
    before = content(next(iterator) for _ in range(stop))
    file = io.BytesIO()
    torch.save(first.state_dict(), file)
    content(iterator)  # goes on; the state taken stays as it is
    second = packed(source())
    second.load_state_dict(torch.load(io.BytesIO(file.getvalue()), weights_only=True))
    assert before + content(second) == whole
    assert content(second) == whole, "the epoch after starts at the start"


@pytest.mark.parametrize("source", [lambda: list(documents()), streaming], ids=["list", "streaming"])
def test_resumed_rows_that_are_iterated_twice_go_on_where_they_were_left(source):
    whole = content(packed(source()))
    first = packed(source())
    before = content(islice(first, 9))
    second = packed(source())
    second.load_state_dict(first.state_dict())
    before += content(islice(second, 9))
    assert before + content(second) == whole


@pytest.mark.parametrize("options", [{"seed": 2, "buffer_size": 8}, {"buffer_size": 8}, None], ids=str)
def test_a_state_of_another_shuffled_order_is_refused(options):
    rows = packed(streaming().shuffle(seed=1, buffer_size=8))
    next(iter(rows))
    other = packed(streaming() if options is None else streaming().shuffle(**options))
    with pytest.raises(ValueError, match=r"shuffled in another order; give shuffle\(\) the same seed in each run"):
        other.load_state_dict(rows.state_dict())


def in_epoch(epoch: int) -> datasets.IterableDataset:
    stream = streaming().shuffle(seed=1, buffer_size=8)
    stream.set_epoch(epoch)
    return stream


def test_an_epoch_of_another_order_is_gone_on_with_in_its_own_alone():
    whole = content(packed(in_epoch(1)))
    assert whole != content(packed(in_epoch(0)))
    first = packed(in_epoch(1))
    before = content(islice(first, 9))
    stream = in_epoch(0)
    second = packed(stream)
    second.load_state_dict(first.state_dict())
    message = (
        r"^\d+ documents were read in the shuffled order of epoch 1, .* of epoch 0 now; call set_epoch\(1\) on the"
    )
    with pytest.raises(ValueError, match=message):
        next(iter(second))
    stream.set_epoch(1)
    assert before + content(second) == whole
    stream.set_epoch(2)
    assert content(second) == content(packed(in_epoch(2)))


def test_a_stream_without_a_shuffle_buffer_is_not_read_again():
    calls = []
    stream = datasets.IterableDataset.from_generator(documents).map(lambda document: calls.append(0) or document)
    rows = packed(stream)
    iterator = iter(rows)
    for _ in range(17):
        next(iterator)
    state, read = rows.state_dict(), len(calls)
    resumed = packed(stream)
    resumed.load_state_dict(state)
    next(iter(resumed))
    assert len(calls) - read < 4 < read


@pytest.mark.parametrize("stop", [3, None])
def test_a_generator_is_read_once_and_not_silently_empty_or_cut_then(stop):
    documents = ({"input_ids": [i] * 5} for i in range(40))
    rows = PackedRows(documents, 8, buffer=2)
    assert list(islice(rows, stop))
    with pytest.raises(
        ValueError, match="documents is a generator, which can be read once, and was; give what can be"
    ):
        next(iter(rows))


def test_ranks_share_the_rows_out_and_have_one_state():
    whole = content(packed())
    parts = [content(packed(rank=rank, world_size=3)) for rank in range(3)]
    assert {len(part) for part in parts} == {len(whole) // 3}
    assert [parts[i % 3][i // 3] for i in range(len(whole) // 3 * 3)] == whole[: len(whole) // 3 * 3]
    streams = [packed(rank=rank, world_size=3) for rank in range(3)]
    for stream in streams:
        iterator = iter(stream)
        next(iterator), next(iterator)
    states = [stream.state_dict() for stream in streams]
    for state in states[1:]:
        torch.testing.assert_close(state["waiting"], states[0]["waiting"])
        assert (state["rows"], state["read"]) == (states[0]["rows"], states[0]["read"]) == (6, state["read"])
    streams[2].load_state_dict(states[0])
    assert content(streams[2]) == parts[2][2:]


@pytest.mark.parametrize("other", [{"length": 25}, {"buffer": 5}, {"world_size": 2}, {"filler": 1}], ids=str)
def test_a_state_of_other_settings_is_refused_with_the_numbers(other):
    options = {"length": 50, "buffer": 4, "world_size": 1, "filler": 0}
    ((name, value),) = other.items()
    rows = PackedRows(list(documents()), **options)
    next(iter(rows))
    with pytest.raises(ValueError, match=f"saved with {name}={options[name]}, these rows have {name}={value}; use"):
        PackedRows(list(documents()), **options | other).load_state_dict(rows.state_dict())


def test_a_packed_row_is_computed_as_its_documents_alone():
    model = tiny_model("retrofit")
    row = next(iter(PackedRows([{"input_ids": list(range(3, 3 + n))} for n in (30, 12, 5)], 50)))
    inputs = {name: row[name][None] for name in ("input_ids", "position_ids")}
    together = model(**inputs, use_cache=False).logits[0]
    starts = (row["position_ids"] == 0).nonzero().flatten().tolist()
    assert len(starts) == 4  # three documents, and the filler
    for start, end in zip(starts, [*starts[1:], 50]):
        torch.testing.assert_close(together[start:end], model(inputs["input_ids"][:, start:end]).logits[0])


def test_bad_numbers_and_worker_processes_are_refused():
    with pytest.raises(ValueError, match="length=1, buffer=64, rank=0, world_size=1"):
        PackedRows([], 1)
    with pytest.raises(ValueError, match="buffer=4.0"):
        PackedRows([], 8, buffer=4.0)
    with pytest.raises(ValueError, match="filler >= 0, got .*filler=-1"):
        PackedRows([], 8, filler=-1)
    with pytest.raises(ValueError, match=r"input_ids of document 1 are torch.float32; give integers"):
        list(PackedRows([{"input_ids": []}, {"input_ids": [3.5, 4.0]}], 8))
    with pytest.raises(ValueError, match="rank=2, world_size=2"):
        PackedRows([], 8, rank=2, world_size=2)
    for workers in (1, 2):
        with pytest.raises(ValueError, match=f"use num_workers=0, got {workers}"):
            next(iter(torch.utils.data.DataLoader(packed(), batch_size=None, num_workers=workers)))


def test_packages_are_whole_real_and_divided_into_two_kinds():
    training = {document["name"]: document["text"] for document in python_packages()}
    held_out = {document["name"]: document["text"] for document in python_packages(held_out=True)}
    assert not training.keys() & held_out.keys()
    assert {"json", "asyncio", "argparse"} <= training.keys() | held_out.keys()
    both = training | held_out
    assert "# json/__init__.py\n" in both["json"] and "# json/decoder.py\n" in both["json"]
    assert both["json"].index("# json/decoder.py\n") < both["json"].index("# json/encoder.py\n")
    assert "site-packages" not in both
    assert sum(map(len, both.values())) > 3e6
    assert 0.02 < len(held_out) / len(both) < 0.3


def test_documents_come_in_the_same_order_from_any_folder(tmp_path):
    for name in ("b/two.py", "b/one.py", "a.py", "b/empty.py", "c/deep/er.py", "notes.txt", "site-packages/x.py"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("" if "empty" in name else f"text of {name}")
    found = list(python_packages([tmp_path], held_out_in=10**9))
    assert [document["name"] for document in found] == ["a", "b", "c"]
    assert found == list(python_packages(str(tmp_path), held_out_in=10**9)), "a single folder needs no list"
    assert found[1]["text"] == "# b/one.py\ntext of b/one.py\n\n# b/two.py\ntext of b/two.py\n"
