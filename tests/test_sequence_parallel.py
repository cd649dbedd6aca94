"""Sequence parallelism over gloo processes equals one process: the operator, models, generation, traffic, faults."""

import os
import re
import time
import weakref
from dataclasses import asdict
from itertools import product

import oracle
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from hypothesis import given, settings
from imagined_ranks import Member, attend_on_imagined_ranks
from ranks import Ranks
from strategies import Call, calls
from tiny_models import left_padding, random_tokens, tiny_config, tiny_model
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from modeling_longnet import (
    DilationPattern,
    LongNetCache,
    LongNetForSequenceClassification,
    LongNetModel,
    dilated_attention,
    gather_sequence,
    prefill_sequence,
    sequence_parallel,
    shard_sequence,
)
from modeling_longnet.sequence_exchange import plan_exchange
from modeling_longnet.sequence_group import current_group, talk
from modeling_longnet.sequence_parallel import sequence_parallel_attention
from modeling_longnet.sequence_shares import whole_rows
from modeling_longnet.token_layout import locate_tokens, pack, unpack


@pytest.fixture(scope="module")
def two_ranks():
    ranks = Ranks(2)
    yield ranks
    ranks.close()


@pytest.fixture(scope="module")
def four_ranks():
    ranks = Ranks(4)
    yield ranks
    ranks.close()


def slice_of(x: torch.Tensor, dim: int) -> torch.Tensor:
    """Cut out this rank's slice, the last ones filled with zeros."""
    world_size = dist.get_world_size()
    size = -(-x.shape[dim] // world_size)
    x = torch.cat([x, x.new_zeros(*x.shape[:dim], size * world_size - x.shape[dim], *x.shape[dim + 1 :])], dim)
    return x.narrow(dim, dist.get_rank() * size, size)


def attend_to_slice(call: Call) -> list[torch.Tensor]:
    """Attend from this rank's slice of a call; return its output, lse and gradients ``[B, heads, n, ...]``."""
    mask = position_ids = None
    if call.padding is not None or call.length % dist.get_world_size():
        mask = torch.tensor(call.padding) if call.padding else torch.ones(call.batch, call.length)
        mask = slice_of(mask.long(), 1)
    if call.boundaries is not None:
        counts = [stop - start for start, stop in zip(call.boundaries, call.boundaries[1:])]
        position_ids = torch.cat([torch.arange(count) for count in counts]).long()[None]
        position_ids = slice_of(position_ids, 1)
    full = [x.detach() for x in call.tensors()]
    # Whatever stands in padding must not matter.
    leaves = [slice_of(x, 2).clone().requires_grad_() for x in full]
    cotangents = [slice_of(x, 2) for x in call.cotangents()]
    shape = leaves[0].shape[0], leaves[0].shape[2]
    with sequence_parallel(dist.group.WORLD):
        layout = locate_tokens(shape, leaves[0].device, mask, position_ids, None, None, tiny_config())
    out, lse = sequence_parallel_attention(
        *(pack(x, layout) for x in leaves), call.pattern, layout.sequence, is_causal=call.is_causal, scale=call.scale
    )
    out = unpack(out.transpose(1, 2), layout, *shape).transpose(1, 2)
    lse = unpack(lse.transpose(1, 2), layout, *shape).transpose(1, 2)
    loss = weighted_sum(call, out, lse, *cotangents)
    return [x.detach() for x in (out, lse, *torch.autograd.grad(loss, leaves))]


def weighted_sum(call: Call, out: torch.Tensor, lse: torch.Tensor, do: torch.Tensor, dlse: torch.Tensor):
    """Sum up what to differentiate; every other call leaves lse out, as models do."""
    finite = lse.masked_fill(lse.isinf(), 0)
    total = (out * do).sum()
    return total + (finite * dlse).sum() if call.seed % 2 else total


def assert_slices_equal_the_oracle(ranks: Ranks, call: Call) -> None:
    slices = ranks.run(attend_to_slice, call)
    got = [torch.cat(parts, dim=2)[:, :, : call.length] for parts in zip(*slices)]
    leaves = call.tensors()
    out, lse = oracle.dilated_attention(*leaves, **call.rules(), **call.options())
    expected = [out, lse, *torch.autograd.grad(weighted_sum(call, out, lse, *call.cotangents()), leaves)]
    real = torch.ones(call.batch, call.length, dtype=torch.bool)
    if call.padding is not None:
        real = torch.tensor(call.padding, dtype=torch.bool).view(call.batch, call.length)
    for name, a, b in zip(("out", "lse", "dq", "dk", "dv"), got, expected):
        a, b = (x.movedim(1, 2)[real] for x in (a, b))
        torch.testing.assert_close(a, b.detach(), rtol=1e-10, atol=1e-10, msg=lambda text, n=name: f"{n}: {text}")


@settings(max_examples=60)
@given(calls())
def test_any_call_on_two_ranks_equals_the_oracle(two_ranks, call):
    assert_slices_equal_the_oracle(two_ranks, call)


@settings(max_examples=60)
@given(calls())
def test_any_call_on_four_ranks_equals_the_oracle(four_ranks, call):
    assert_slices_equal_the_oracle(four_ranks, call)


@pytest.mark.parametrize("boundaries", [(0, 32, 64), (0, 16, 32, 48, 64), (0, 15, 16, 31, 33, 47, 64)])
@pytest.mark.parametrize("is_causal", [True, False], ids=["causal", "bidirectional"])
def test_documents_may_end_where_slices_do(two_ranks, four_ranks, boundaries, is_causal):
    pattern = DilationPattern.preset("retrofit", (8, 32, 64), (1, 2, 4))
    call = Call(pattern, 1, 4, 2, 64, 8, is_causal, boundaries=boundaries)
    for ranks in (two_ranks, four_ranks):
        assert_slices_equal_the_oracle(ranks, call)


MODEL_BATCHES = ("plain", "padded left", "padded both sides", "holes", "packed", "cu_seq_lens", "packed and padded")


def model_batch(kind: str, length: int = 101) -> dict:
    """Make a batch with labels, which no world size divides but for "divisible"; documents and padding cross edges."""
    rows = 1 if kind == "cu_seq_lens" else 2
    length -= length % 4 if kind == "divisible" else 0
    tokens = random_tokens(rows, length)
    batch = {"input_ids": tokens, "labels": tokens.clone()}
    if kind in ("padded left", "padded both sides", "holes", "whole slices of padding", "packed and padded"):
        mask = left_padding(*((3, 77) if kind == "padded both sides" else (0, 60)), length=length)
        if kind == "padded both sides":
            mask[:, 90:] = 0
        if kind == "holes":
            mask[0, 30:37] = mask[1, 80] = 0
        if kind == "whole slices of padding":  # of four: one in the first row, the two in the middle in the second
            mask[0, 26:52] = 0
            mask[1, :20] = 1
            mask[1, 20:80] = 0
        batch["attention_mask"] = mask
        batch["labels"][mask == 0] = -100
    if kind in ("packed", "packed and padded"):
        position_ids = torch.arange(length).repeat(rows, 1)
        position_ids[0, 40:] -= 40
        position_ids[0, 88:] = torch.arange(length - 88)
        position_ids[1, 3:] -= 3
        batch["position_ids"] = position_ids
    if kind == "cu_seq_lens":
        batch["cu_seq_lens_q"] = torch.tensor([0, 5, 70, 71, length], dtype=torch.int32)
    return batch


def run_model(model, batch: dict, **options) -> tuple[torch.Tensor, torch.Tensor, list[torch.Tensor]]:
    """Return logits, loss and the parameters' gradients in one process."""
    out = model(**batch, use_cache=False, **options)
    out.loss.backward()
    return out.logits.detach(), out.loss.detach(), [p.grad for p in model.parameters()]


def run_sharded_models(cases: list[tuple[str, str, dict]]) -> list:
    """Run models on this rank's slices; return the gathered logits, and loss and gradients added over the ranks."""
    group, results = dist.group.WORLD, []
    for preset, kind, fields in cases:
        batch = model_batch(kind)
        model = tiny_model(preset, **fields).float()
        with sequence_parallel(group):
            out = model(**shard_sequence(batch, group), use_cache=False)
            out.loss.backward()
        sums = [out.loss.detach().clone(), *(p.grad for p in model.parameters())]
        for x in sums:
            dist.all_reduce(x)
        logits = gather_sequence(out.logits, group, batch["input_ids"].shape[1]).detach()
        results.append((logits, sums[0], sums[1:]) if dist.get_rank() == 0 else None)
    return results


def assert_models_equal_one_process(ranks: Ranks, cases: list[tuple[str, str, dict]]) -> None:
    for (preset, kind, fields), found in zip(cases, ranks.run(run_sharded_models, cases)[0]):
        batch = model_batch(kind)
        expected = run_model(tiny_model(preset, **fields).float(), batch)
        real = batch.get("attention_mask", torch.ones_like(batch["input_ids"])) != 0
        pairs = [(found[0][real], expected[0][real]), (found[1], expected[1]), *zip(found[2], expected[2])]
        for index, (a, b) in enumerate(pairs):
            error = ((a - b).norm() / b.norm()).item()
            assert error <= 1e-5, (preset, kind, fields, index, error)


CASES = [(preset, kind, {}) for preset in ("paper", "torchscale", "retrofit") for kind in MODEL_BATCHES]
MAGNETO = {"backbone": "magneto", "xpos_scale_base": 16}  # what xPos decays by shows
CASES += [
    *((preset, "whole slices of padding", {}) for preset in ("paper", "retrofit")),
    *(("retrofit", kind, MAGNETO) for kind in ("plain", "divisible", "packed and padded")),
    ("paper", "plain", {"dilation_rates": (1, 3, 7)}),  # rates that do not divide their segments
    ("retrofit", "padded left", {"dense_layers": (1,)}),
    ("retrofit", "packed", {"num_attention_heads": 4, "num_key_value_heads": 4, "qk_norm": True}),
]  # fmt: skip
BORDER = 60  # beyond a slice, and within the sequence: frequencies follow from the whole
LONGROPE = {
    "rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0, 1.1, 1.2, 1.3],
    "long_factor": [2.0, 3.0, 4.0, 5.0], "factor": 4.0, "original_max_position_embeddings": BORDER,
}  # fmt: skip
OF_ITS_LENGTH = {
    "longrope": {"rope_parameters": LONGROPE},
    "dynamic": {
        "rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0},
        "max_position_embeddings": BORDER,
    },
}


def test_logits_loss_and_all_gradients_on_two_ranks_equal_one_process(two_ranks):
    assert_models_equal_one_process(two_ranks, CASES)


def test_logits_loss_and_all_gradients_on_four_ranks_equal_one_process(four_ranks):
    assert_models_equal_one_process(four_ranks, CASES)


@pytest.mark.parametrize("rope", OF_ITS_LENGTH)
def test_frequencies_follow_from_the_length_of_the_whole_sequence(two_ranks, four_ranks, rope):
    fields = OF_ITS_LENGTH[rope]
    cases = [("retrofit", kind, fields) for kind in (*MODEL_BATCHES, "divisible", "whole slices of padding")]
    assert_models_equal_one_process(two_ranks, cases)
    assert_models_equal_one_process(four_ranks, cases)


def generate_together(preset: str, mask_kind: str, fields: dict) -> tuple[torch.Tensor, torch.Tensor]:
    model, prompt = tiny_model(preset, **fields), long_prompt(mask_kind)
    cache = prefill_sequence(model, prompt, dist.group.WORLD)
    held = int((cache.layers[0].key_positions >= 0).sum(-1).max())
    tokens = model.generate(**prompt, past_key_values=cache, max_new_tokens=12, do_sample=False)
    return tokens, held


def long_prompt(mask_kind: str) -> dict:
    prompt = {"input_ids": random_tokens(2, 103)}
    prompt["attention_mask"] = left_padding(0, 70 if mask_kind == "padded" else 0, length=103)
    return prompt


@pytest.mark.parametrize("mask_kind", ["whole", "padded"])
@pytest.mark.parametrize("preset", ["paper", "torchscale", "retrofit"])
@pytest.mark.parametrize("border", [None, 40, 60, 102, 103, 110])  # passed by each slice, the whole, what follows
def test_a_prompt_read_together_is_continued_as_if_one_process_had_read_it(two_ranks, preset, mask_kind, border):
    rope = LONGROPE | {"original_max_position_embeddings": border}
    fields = {} if border is None else {"rope_parameters": rope}
    expected = tiny_model(preset, **fields).generate(**long_prompt(mask_kind), max_new_tokens=12, do_sample=False)
    entries = tiny_config(preset).pattern.cache_entries(102)
    for tokens, held in two_ranks.run(generate_together, preset, mask_kind, fields):
        assert torch.equal(tokens, expected)
        assert 0 < held <= entries


def loss_of_shifted_labels(items: dict) -> tuple[float, float]:
    """Return the sum of the ranks' parts of a loss, and the whole of one process, of labels that are shifted already."""
    shift_labels = F.pad(random_tokens(2, 41)[:, 1:], (0, 1), value=-100)
    shift_labels[:, :20] = -100  # the first rank has none, the others unlike numbers
    model, group = tiny_model(), dist.group.WORLD
    batch = {"input_ids": random_tokens(2, 41), "shift_labels": shift_labels} | items
    with torch.no_grad(), sequence_parallel(group):
        loss = model(**shard_sequence(batch, group), use_cache=False).loss
    dist.all_reduce(loss)
    with torch.no_grad():
        return loss.item(), model(**batch, use_cache=False).loss.item()


@pytest.mark.parametrize("items", [{}, {"num_items_in_batch": None}, {"num_items_in_batch": 50}])
def test_labels_shifted_already_give_parts_of_the_whole_loss(four_ranks, items):
    for parts, whole in four_ranks.run(loss_of_shifted_labels, items):
        assert parts == pytest.approx(whole, rel=1e-6)


def loss_of_labels_ignored_by(ignore_index: int) -> tuple[float, float]:
    """Return the sum of the ranks' parts of a loss, and the whole of one process, where another label than -100 is none."""
    labels = random_tokens(2, 41)
    labels[:, :20] = ignore_index
    batch = {"input_ids": random_tokens(2, 41), "labels": labels, "ignore_index": ignore_index}
    model, group = tiny_model(), dist.group.WORLD
    with torch.no_grad(), sequence_parallel(group):
        loss = model(**shard_sequence(batch, group), use_cache=False).loss
    dist.all_reduce(loss)
    with torch.no_grad():
        return loss.item(), model(**batch, use_cache=False).loss.item()


@pytest.mark.parametrize("ignore_index", [0, -1])
def test_labels_of_another_ignore_index_are_filled_up_and_counted_by_it(four_ranks, ignore_index):
    for parts, whole in four_ranks.run(loss_of_labels_ignored_by, ignore_index):
        assert parts == pytest.approx(whole, rel=1e-6)


def logits_of_documents_with_positions(start: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return logits on all ranks and in one process, of two documents given by both cu_seq_lens_q and position_ids."""
    positions = torch.cat([torch.arange(start, start + 11), torch.arange(30)])[None]
    batch = {"input_ids": random_tokens(1, 41), "cu_seq_lens_q": torch.tensor([0, 11, 41]), "position_ids": positions}
    model, group = tiny_model(), dist.group.WORLD
    with torch.no_grad(), sequence_parallel(group):
        logits = model(**shard_sequence(batch, group), use_cache=False).logits
    with torch.no_grad():
        return gather_sequence(logits, group, 41), model(**batch, use_cache=False).logits


@pytest.mark.parametrize("start", [0, 3])
def test_positions_beside_cu_seq_lens_rotate_as_in_one_process(four_ranks, start):
    for found, expected in four_ranks.run(logits_of_documents_with_positions, start):
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


def score_together(preset: str) -> torch.Tensor:
    """Return the log-likelihood of a text's tokens, added over the ranks."""
    tokens = random_tokens(1, 101)
    with torch.no_grad(), sequence_parallel(dist.group.WORLD):
        loss = tiny_model(preset)(**shard_sequence({"input_ids": tokens, "labels": tokens}, dist.group.WORLD)).loss
    dist.all_reduce(loss)
    return loss


def test_a_text_scored_together_has_the_score_of_one_process(four_ranks):
    tokens = random_tokens(1, 101)
    expected = tiny_model("retrofit")(input_ids=tokens, labels=tokens).loss
    for loss in four_ranks.run(score_together, "retrofit"):
        torch.testing.assert_close(loss, expected.detach())


def hidden_states_together() -> torch.Tensor:
    model, tokens = tiny_model("paper", LongNetModel), random_tokens(2, 100)
    with sequence_parallel(init_device_mesh("cpu", (2,), mesh_dim_names=("cp",))["cp"]):
        hidden = model(**shard_sequence({"input_ids": tokens}, dist.group.WORLD)).last_hidden_state
    whole = gather_sequence(hidden, dist.group.WORLD)
    whole[:, 7].square().sum().backward()  # a token of rank 0, read by both: each gives its gradient
    return whole.detach(), model.embed_tokens.weight.grad


def test_gathered_states_are_the_whole_and_carry_gradients_to_their_slice(two_ranks):
    model, tokens = tiny_model("paper", LongNetModel), random_tokens(2, 100)
    expected = model(tokens).last_hidden_state
    expected[:, 7].square().sum().backward()
    (whole, grad0), (other, grad1) = two_ranks.run(hidden_states_together)
    for found in (whole, other):
        torch.testing.assert_close(found, expected.detach())
    torch.testing.assert_close(grad0 + grad1, 2 * model.embed_tokens.weight.grad)


@pytest.mark.parametrize("slice_length", [384, 379])  # three whole first segments; begins off every segment and rate
@pytest.mark.parametrize("is_causal", [True, False], ids=["causal", "bidirectional"])
@pytest.mark.parametrize("preset", ["paper", "torchscale", "retrofit"])
@pytest.mark.parametrize(
    ("device", "dtype", "backend"),
    [
        pytest.param("cpu", torch.float32, "torch", id="cpu"),
        *(
            pytest.param("cuda", dtype, backend, marks=pytest.mark.gpu, id=f"cuda-{backend}-{str(dtype)[6:]}")
            for dtype, backend in product((torch.float32, torch.bfloat16), ("torch", "triton"))
        ),
    ],
)
def test_imagined_ranks_in_one_process_equal_one_call(device, dtype, backend, preset, is_causal, slice_length):
    pattern = DilationPattern.geometric(128, 1024, preset=preset)
    generator = torch.Generator().manual_seed(0)
    query, key, value, do = (
        torch.randn(2, heads, 4 * slice_length, 64, generator=generator).to(device, dtype) for heads in (4, 2, 2, 4)
    )
    dlse = torch.randn(4, 1, generator=generator).to(device).expand(2, 4, 4 * slice_length)  # as autograd hands it
    found, plans = attend_on_imagined_ranks(
        (query, key, value), (do, dlse), pattern, 4, backend, is_causal, fused=backend == "triton"
    )
    assert all(plan.received_entries > 0 for plan in plans[1:])
    leaves = [x.float().requires_grad_() for x in (query, key, value)]
    out, lse = dilated_attention(*leaves, pattern, is_causal=is_causal, backend="torch", return_lse=True)
    expected = [out, lse, *torch.autograd.grad((out, lse), leaves, (do.float(), dlse))]
    for a, b in zip(found, expected):
        error = ((a.float() - b).norm() / b.norm()).item()
        assert error < (1e-5 if dtype == torch.float32 else 1.5e-2)


def remote_keys(pattern: DilationPattern, num_kv_heads: int, slice_length: int, rank: int, length: int) -> int:
    """Count, pair by pair, the (branch, KV head, key) that a rank's queries reach outside its slice."""

    def rules(branches: slice) -> dict:
        fields = asdict(pattern)
        return fields | {name: fields[name][branches] for name in ("segment_lengths", "dilation_rates")}

    mine = range(rank * slice_length, (rank + 1) * slice_length)
    found = set()
    for i, head in product(range(len(pattern.branches)), range(num_kv_heads)):
        for query, key in product(mine, (key for key in range(length) if key not in mine)):
            arguments = (query, key, head, num_kv_heads)
            with_branch = oracle.times_reached(*arguments, **rules(slice(0, i + 1)), is_causal=True)
            without = oracle.times_reached(*arguments, **rules(slice(0, i)), is_causal=True) if i else 0
            if with_branch > without:
                found.add((i, head, key))
    return len(found)


def bytes_sent_and_received(pattern: DilationPattern, slice_length: int) -> list[tuple[int, int]]:
    """Count the bytes of every all-to-all of one forward and backward pass on this rank."""
    traffic, original = [], dist.all_to_all_single

    def counted(output, input, *args, **kwargs):
        traffic.append((input.numel() * input.element_size(), output.numel() * output.element_size()))
        return original(output, input, *args, **kwargs)

    leaves = [torch.randn(1, heads, slice_length, 8, requires_grad=True) for heads in (4, 2, 2)]
    sequence = whole_rows(dist.group.WORLD, 1, slice_length)
    dist.all_to_all_single = counted
    try:
        sequence_parallel_attention(*leaves, pattern, sequence)[0].sum().backward()
    finally:
        dist.all_to_all_single = original
    return traffic


@pytest.mark.parametrize("preset", ["paper", "torchscale", "retrofit"])
def test_the_bytes_equal_the_formula_and_stay_when_the_sequence_doubles(four_ranks, preset):
    pattern = DilationPattern.preset(preset, (8, 16, 32), (1, 2, 4))
    num_kv_heads, per_key = 2, 2 * 8 * 4  # a key and its value, 8 numbers of 4 bytes each
    bound = num_kv_heads * sum(w // r for w, r in pattern.branches) * per_key
    traffic = {length: four_ranks.run(bytes_sent_and_received, pattern, length // 4) for length in (48, 128, 256)}
    for length, ranks in traffic.items():
        for rank, passes in enumerate(ranks):
            if length > 48 and preset != "retrofit":
                assert passes == []  # every segment ends where its slice does: nobody talks
                continue
            (sent, received), (sent_back, received_back) = passes
            if length == 48:
                assert received == remote_keys(pattern, num_kv_heads, 12, rank, 48) * per_key
            assert received <= bound and (sent_back, received_back) == (received, sent)
    if preset == "retrofit":
        assert traffic[256][2] == traffic[128][2]  # w_max is 32: slices of 32 and of 64 tokens exchange the same


def test_the_plan_of_a_rank_does_not_grow_with_the_sequence_or_the_group():
    pattern = DilationPattern.geometric(2048, 2**20, preset="retrofit")

    def received(rank: int, world_size: int, size: int) -> int:
        sequence = whole_rows(Member(rank, world_size), 1, size)
        places = (sequence.shares, sequence.documents, torch.device("cpu"))
        return plan_exchange(pattern, 2, True, rank, world_size, *places).received_entries

    bound = 2 * sum(w // r for w, r in pattern.branches)
    assert bound - 2 * len(pattern.branches) <= received(3, 4, 2**20) == received(7, 8, 2**22) <= bound
    # In slices shorter than the windows no query sees the far end of every band.
    assert received(31, 32, 2**18) == received(63, 64, 2**18) < bound


def attend_until_rank_one(fault: str) -> float:
    sequence = whole_rows(dist.group.WORLD, 1, 16)
    pattern = DilationPattern.preset("retrofit", (8, 16), (1, 2))
    leaves = [torch.randn(1, 2, 16, 8, requires_grad=True) for _ in range(3)]
    out, _ = sequence_parallel_attention(*leaves, pattern, sequence)
    if dist.get_rank() == 1:
        if fault == "dies":
            os._exit(3)
        time.sleep(8)
    out.sum().backward()


@pytest.mark.parametrize("fault", ["dies", "hangs"])
def test_a_rank_that_dies_or_hangs_ends_the_others_with_a_clear_error_in_time(fault):
    ranks = Ranks(2, timeout=3)
    ranks.start(attend_until_rank_one, fault)
    start = time.monotonic()
    _, error = ranks.result(0, timeout=30)
    assert time.monotonic() - start < 20
    ranks.close()
    assert "RuntimeError: sequence parallelism broke down on rank 0 of 2 during the exchange of gradients" in error
    assert "another rank has died or has not come to the same point in time" in error


def test_a_rank_that_runs_out_of_memory_says_so_itself():
    def exchange():
        raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(torch.OutOfMemoryError, match="^CUDA out of memory$"):
        talk(None, "the exchange of keys and values", exchange)


def disagree(about: str) -> str:
    odd = dist.get_rank() == dist.get_world_size() - 1
    fields = {
        "pattern": {"dilation_rates": (1, 2, 8)}, "head_dim": {"head_dim": 16},
        "rope": {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}},
    }.get(about, {}) if odd else {}  # fmt: skip
    model = tiny_model(**fields)
    model = model.float() if about == "autocast" or about == "dtype" and odd else model
    group, autocast = dist.group.WORLD, torch.autocast("cpu", torch.bfloat16, enabled=about == "autocast" and odd)
    with pytest.raises(ValueError) as error, sequence_parallel(group), autocast:
        if about == "calls" and odd:
            shard_sequence({"input_ids": random_tokens(1, 32)}, group)
        if about == "whole length":
            shard_sequence({"input_ids": random_tokens(1, 31 if odd else 32)}, group)
        elif about == "short prompt":
            prefill_sequence(model, {"input_ids": random_tokens(1, 5 if odd else 4)}, group)
        elif about == "end of the prompt":
            tokens = random_tokens(1, 11)
            tokens[0, -1] = 5 if odd else 6
            prefill_sequence(model, {"input_ids": tokens}, group)
        elif about in ("input_ids", "labels"):
            batch = {"input_ids": random_tokens(1, 32), "labels": random_tokens(1, 32)}
            tokens = batch[about]
            if odd:  # two neighbours change places
                tokens[0, 7:9] = tokens[0, 7:9].flip(0)
            shard_sequence(batch, group)
        else:
            model(random_tokens(1, 9 if about == "length" and odd else 8))
    return str(error.value)


@pytest.mark.parametrize(
    ("about", "message"),
    [
        ("length", r"agree on rows and tokens of a slice: rank 0 has \[1, 8\], rank 3 has \[1, 9\]"),
        ("whole length", r"agree on the shape of the whole batch: rank 0 has \[1, 32\], rank 3 has \[1, 31\]"),
        (
            "input_ids",
            r"the numbers in input_ids: rank 0 has shape \[1, 32\], checksum \w{16}, rank 3 has shape \[1, 32\]",
        ),
        ("labels", r"the numbers in labels: rank 0 has shape \[1, 32\], checksum \w{16}, rank 3 has shape"),
        ("short prompt", r"the prompt's input_ids: rank 0 has shape \[1, 4\], .*, rank 3 has shape \[1, 5\]"),
        ("end of the prompt", r"the prompt's input_ids: rank 0 has shape \[1, 11\], .*, rank 3 has shape \[1, 11\]"),
        ("pattern", r"the dilation pattern: rank 0 has .*rates=\(1, 2, 4\).*, rank 3 has .*rates=\(1, 2, 8\)"),
        ("head_dim", r"KV heads, head_dim: rank 0 has \[2, \[\], 4, 2, 8\], rank 3 has \[2, \[\], 4, 2, 16\]"),
        ("rope", r"the rotary embedding: rank 0 has .*'default'.*, rank 3 has .*'dynamic'"),
        ("dtype", r"the dtype, and that of autocast: rank 0 has \[torch.float64, None\], rank 3 has \[torch.float32"),
        ("autocast", r"of autocast: rank 0 has \[torch.float32, None\], rank 3 has \[torch.float32, torch.bfloat16\]"),
        (
            "calls",
            r"the same calls in the same order: rank 0 compares rows .*; rank 3 compares the shape of the whole",
        ),
    ],
)
def test_ranks_that_disagree_are_named_on_every_rank_at_the_first_step(four_ranks, about, message):
    for error in four_ranks.run(disagree, about):
        assert re.search(message, error), error


def misuses() -> dict[str, str]:
    group, tokens, found = dist.group.WORLD, random_tokens(1, 16), {}

    def expect(name, function):
        with pytest.raises(ValueError) as error, sequence_parallel(group):
            function()
        found[name] = str(error.value)

    model = tiny_model()
    expect("labels", lambda: model(tokens, labels=tokens))
    expect("shifted labels", lambda: model(tokens, shift_labels=tokens))
    expect("cu_seq_lens", lambda: model(tokens, cu_seq_lens_q=torch.tensor([0, 4, 16])))
    cache = LongNetCache(model.config)
    model(tokens, past_key_values=cache)
    expect("decode", lambda: model(tokens[:, :1], past_key_values=cache))
    packed = torch.arange(16)[None] % 8
    expect("packed cache", lambda: model(tokens, position_ids=packed, past_key_values=LongNetCache(model.config)))
    packed = {"input_ids": tokens, "cu_seq_lens_q": torch.tensor([0, 5, 16]), "position_ids": torch.arange(16)[None]}
    expect("documents that go on", lambda: shard_sequence(packed, group))
    packed["position_ids"] = torch.cat([torch.arange(5), torch.arange(4), torch.arange(7)])[None]
    expect("too many documents", lambda: shard_sequence(packed, group))
    rows = {"input_ids": random_tokens(2, 16), "cu_seq_lens_q": torch.tensor([0, 5, 16])}
    expect("packed rows", lambda: shard_sequence(rows, group))
    expect("slice of a tensor", lambda: shard_sequence(tokens, group))
    for name, wrong in {
        "attention_mask": torch.ones(1, 8), "position_ids": torch.arange(8)[None],  # of one rank's slice
        "labels": random_tokens(2, 16), "shift_labels": random_tokens(1, 17),
    }.items():  # fmt: skip
        batch = {"input_ids": tokens, name: wrong}
        expect(f"other {name}", lambda batch=batch: shard_sequence(batch, group))
    expect("gathered row", lambda: gather_sequence(torch.zeros(8), group))
    expect("gathered list", lambda: gather_sequence([0.0], group))
    expect("gathered length", lambda: gather_sequence(torch.zeros(1, 8), group, 17))
    prompt = {"input_ids": tokens}
    for name, wrong in {
        "tensor": tokens, "list": {"input_ids": tokens.tolist()}, "row": {"input_ids": tokens[0]},
        "mask": prompt | {"attention_mask": torch.ones(16)}, "none": {"input_ids": None},
    }.items():  # fmt: skip
        expect(f"prompt as {name}", lambda wrong=wrong: prefill_sequence(model, wrong, group))
    model.gradient_checkpointing_enable()
    expect("prompt in training", lambda: prefill_sequence(model.train(), prompt, group))
    model.eval()
    expect("classifier", lambda: tiny_model(model_class=LongNetForSequenceClassification)(tokens))
    model.set_attn_implementation("eager")
    expect("eager", lambda: model(tokens))
    return found


def test_misuse_is_refused_with_what_to_do(two_ranks):
    for found in two_ranks.run(misuses):
        assert "give shift_labels and num_items_in_batch, as shard_sequence does" in found["labels"]
        assert found["shifted labels"] == found["labels"]
        assert "shard_sequence turns it into position_ids" in found["cu_seq_lens"]
        assert "the cache holds 16 tokens already" in found["decode"] and "outside of it" in found["decode"]
        assert "packed documents cannot share one KV cache" in found["packed cache"]
        go_on, restart = found["documents that go on"], found["too many documents"]
        assert go_on.startswith("position_ids go on at token 5, where by cu_seq_lens_q a document begins: a slice")
        assert restart.startswith(
            "position_ids restart at token 9, where by cu_seq_lens_q a document does not begin: a"
        )
        assert found["packed rows"] == "cu_seq_lens_q packs documents in one row, the batch has 2; give position_ids"
        assert found["slice of a tensor"] == "shard_sequence takes a batch, a dict with input_ids, got Tensor"
        for name, got in {
            "attention_mask": [1, 8], "position_ids": [1, 8], "labels": [2, 16], "shift_labels": [1, 17]
        }.items():  # fmt: skip
            message = f"{name} must give each of the [1, 16] tokens of the batch one, got shape {got}"
            assert found[f"other {name}"] == message
        assert found["gathered row"].endswith("rank's slice, a tensor [batch, tokens, ...], got shape [8]")
        assert found["gathered list"].endswith("rank's slice, a tensor [batch, tokens, ...], got list")
        assert found["gathered length"].startswith("2 slices of 8 tokens hold 16, got length=17; give the tokens")
        assert found["prompt as tensor"].endswith("a dict of input_ids and an optional attention_mask, got Tensor")
        assert found["prompt as list"] == "input_ids must be a tensor [batch, tokens], got list"
        assert found["prompt as row"] == "input_ids must be a tensor [batch, tokens], got shape [16]"
        assert found["prompt as mask"] == "attention_mask must be a tensor [batch, tokens], got shape [16]"
        assert found["prompt as none"] == "input_ids must be a tensor [batch, tokens], got NoneType"
        assert found["prompt in training"] == "the model is in training mode; call model.eval()"
        assert "LongNetForSequenceClassification reads whole sequences" in found["classifier"]
        assert 'use attn_implementation="sdpa"' in found["eager"]


def errors_of_a_rank_outside() -> list[str]:
    """Return what the last rank hears of a mesh and a group that it is not in."""
    others = list(range(dist.get_world_size() - 1))
    messages = []
    for group in (DeviceMesh("cpu", others), dist.new_group(others)):  # all ranks make them together
        if dist.get_rank() in others:
            continue
        with pytest.raises(ValueError) as error, sequence_parallel(group):
            pass
        messages.append(str(error.value))
    return messages


def test_a_rank_outside_of_the_group_is_told_so(two_ranks):
    _, messages = two_ranks.run(errors_of_a_rank_outside)
    assert len(messages) == 2
    for message in messages:
        assert message.startswith("rank 1 is not in the group that shares the sequence; give it the group")


def shapes_of_slices() -> list[dict]:
    """Return the shapes of this rank's slice of batches that are empty, and of one that names what it leaves out."""
    group, tokens = dist.group.WORLD, random_tokens(1, 5)
    batches = [
        {"input_ids": tokens[:, :0], "labels": tokens[:, :0]},
        {"input_ids": tokens[:0], "labels": tokens[:0]},
        {"input_ids": None, "inputs_embeds": torch.zeros(1, 5, 32), "attention_mask": None},
    ]
    slices = [shard_sequence(batch, group) for batch in batches]
    return [{name: list(x.shape) for name, x in batch.items()} for batch in slices]


def test_empty_batches_have_empty_slices_and_none_is_nothing(two_ranks):
    for no_tokens, no_rows, embeds in two_ranks.run(shapes_of_slices):
        assert no_tokens["input_ids"] == no_tokens["labels"] == no_tokens["shift_labels"] == [1, 0]
        assert no_rows["input_ids"] == no_rows["shift_labels"] == [0, 3]
        assert embeds == {"inputs_embeds": [1, 3, 32], "attention_mask": [1, 3]}


def plan_of_slices(pattern: DilationPattern, length: int):
    sequence = whole_rows(Member(0, 2), 1, length)
    return plan_exchange(pattern, 2, True, 0, 2, sequence.shares, sequence.documents, torch.device("cpu"))


def test_plans_serve_all_patterns_of_a_model_and_are_let_go_with_their_batches():
    patterns = [DilationPattern((8, 16), (1, 2)), DilationPattern((8,), (1,)), DilationPattern((2**62,), (1,))]
    plans = [plan_of_slices(pattern, 100) for pattern in patterns]
    assert all(plan_of_slices(pattern, 100) is plan for pattern, plan in zip(patterns, plans))
    indices = [weakref.ref(plan.sent_columns) for plan in plans]
    del plans
    for length in range(101, 106):
        for pattern in patterns:
            plan_of_slices(pattern, length)
    assert [index() for index in indices] == [None] * 3


def test_a_group_is_needed_and_the_context_ends():
    assert current_group() is None
    with pytest.raises(ValueError, match="group must be a process group"), sequence_parallel(None):
        pass
    assert current_group() is None


def derivatives_with_dropout() -> tuple[float, float, float]:
    """Return the share of dropped weights' sum, and a directional derivative by gradients and by differences."""
    pattern = DilationPattern.preset("retrofit", (8, 16), (1, 2))
    sequence = whole_rows(dist.group.WORLD, 1, 19)  # the second slice is like no document
    generator = torch.Generator().manual_seed(dist.get_rank())
    draw = lambda: [torch.randn(1, h, 19, 8, generator=generator, dtype=torch.float64) for h in (4, 2, 2)]  # noqa: E731
    tensors, direction = draw(), draw()

    def total(step: float, tensors=tensors) -> tuple[torch.Tensor, torch.Tensor]:
        torch.manual_seed(5)
        moved = [x + step * d for x, d in zip(tensors, direction)]
        out, _ = sequence_parallel_attention(*moved, pattern, sequence, dropout=0.5)
        mine = out.square().sum()
        whole = mine.detach().clone()
        dist.all_reduce(whole)
        return mine, whole

    leaves = [x.requires_grad_() for x in tensors]
    gradients = torch.autograd.grad(total(0.0)[0], leaves)
    slope = sum((g * d).sum() for g, d in zip(gradients, direction))
    dist.all_reduce(slope)
    with torch.no_grad():
        differences = (total(1e-6)[1] - total(-1e-6)[1]) / 2e-6
        values_of_one = [torch.zeros_like(x) for x in tensors[:2]] + [torch.ones_like(tensors[2])]
        dropped, _ = sequence_parallel_attention(*values_of_one, pattern, sequence, dropout=0.5)
    return dropped.mean().item(), slope.item(), differences.item()


def test_dropout_is_drawn_again_alike_in_the_backward_pass(two_ranks):
    for mean, slope, differences in two_ranks.run(derivatives_with_dropout):
        assert mean == pytest.approx(1, abs=0.25) and mean != 1
        assert slope == pytest.approx(differences, rel=1e-6)


def attend_to_ones_with_dropout() -> torch.Tensor:
    """Return what dropout makes of a sum of ones on this rank, where all ranks are seeded alike, as Trainer does it."""
    torch.manual_seed(5)
    query, key = (torch.zeros(1, heads, 16, 8) for heads in (4, 2))
    sequence = whole_rows(dist.group.WORLD, 1, 16)
    pattern = DilationPattern.preset("paper", (8, 16), (1, 2))  # segments end where slices do: nothing is exchanged
    return sequence_parallel_attention(query, key, torch.ones_like(key), pattern, sequence, dropout=0.5)[0]


def test_ranks_that_are_seeded_alike_draw_unlike_dropout(two_ranks):
    first, second = two_ranks.run(attend_to_ones_with_dropout)
    assert not torch.equal(first, second)
