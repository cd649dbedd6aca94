"""RoPE whose frequencies change with the length: generation is exact across the change, all else refuses to cross it."""

import pytest
import torch
from checkpoints import make_checkpoint
from tiny_models import left_padding, random_tokens, tiny_model
from transformers import AutoModelForCausalLM

from conversion import convert_checkpoint
from modeling_longnet import LongNetCache, TokenStream, stream


BORDER = 16
LONGROPE = {
    "rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0, 1.1, 1.2, 1.3],
    "long_factor": [2.0, 3.0, 4.0, 5.0], "factor": 4.0, "original_max_position_embeddings": BORDER,
}  # fmt: skip
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}
CLOSE = {"rtol": 1e-5, "atol": 1e-5}
HOW = {
    "greedy": {},
    "beams": {"num_beams": 3},
    "sampling": {"do_sample": True, "top_k": 5},
}


def longrope_model(**fields):
    return tiny_model("retrofit", rope_parameters=dict(LONGROPE), **fields)


def generate(model, tokens, **options):
    torch.manual_seed(0)
    return model.generate(tokens, **{"max_new_tokens": 20, "do_sample": False, "eos_token_id": None, **options})


@pytest.mark.parametrize("how", HOW)
def test_longrope_generates_across_the_border_as_its_source(how, tmp_path):
    make_checkpoint(
        tmp_path / "source", family="phi3", rope="longrope, no factor", original_max_position_embeddings=BORDER
    )
    convert_checkpoint(tmp_path / "source", tmp_path / "longnet", local=64, progress=False)
    source, ours = (AutoModelForCausalLM.from_pretrained(tmp_path / name).eval() for name in ("source", "longnet"))
    tokens = torch.randint(3, 280, (2, 12), generator=torch.Generator().manual_seed(0))
    for padding in ((0, 0), (0, 5), (2, 5)):
        given = {"attention_mask": left_padding(*padding, length=12), **HOW[how]}
        expected = generate(source, tokens, use_cache=False, **given)
        assert torch.equal(generate(ours, tokens, **given), expected)


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("length", [BORDER - 4, BORDER, BORDER + 1])
@pytest.mark.parametrize("max_length", [None, 64])
def test_longrope_generates_alike_with_and_without_a_cache(how, length, max_length):
    model, tokens = longrope_model(), random_tokens(2, length)
    given = {"attention_mask": left_padding(0, 3, length=length), **HOW[how]}
    cache = LongNetCache(model.config, max_length=max_length)
    found = generate(model, tokens, past_key_values=cache, disable_compile=True, **given)
    assert torch.equal(found, generate(model, tokens, use_cache=False, **given))


def test_a_cache_that_is_kept_goes_on_across_the_border_where_all_tokens_are_given():
    model, tokens = longrope_model(), random_tokens(1, BORDER - 6)
    first = generate(model, tokens, max_new_tokens=4, return_dict_in_generate=True)
    longer = torch.cat((first.sequences, random_tokens(1, 5, seed=1)), dim=1)
    found = generate(model, longer, past_key_values=first.past_key_values)
    assert torch.equal(found, generate(model, longer, use_cache=False))


def test_only_the_forward_pass_at_the_border_reads_everything_anew(monkeypatch):
    model, tokens, lengths = longrope_model(), random_tokens(1, BORDER - 2), []
    model.model.register_forward_pre_hook(
        lambda module, args, kwargs: lengths.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    generate(model, tokens, max_new_tokens=6)
    assert lengths == [BORDER - 2, 1, 1, BORDER + 1, 1, 1]


def test_chunks_on_one_side_of_the_border_equal_the_full_forward():
    model, tokens = longrope_model(), random_tokens(1, 40)
    for start, end in ((BORDER - 7, BORDER), (BORDER + 1, 40)):
        cache = LongNetCache(model.config)
        with torch.no_grad():
            expected = model(tokens[:, :end]).logits
            model(tokens[:, :start], past_key_values=cache)
            found = [model(token, past_key_values=cache).logits for token in tokens[:, start:end].split(3, dim=1)]
        torch.testing.assert_close(torch.cat(found, dim=1), expected[:, start:], **CLOSE)


def test_what_would_cross_the_border_is_refused_with_the_numbers():
    model, tokens = longrope_model(), random_tokens(1, 30)
    cache = LongNetCache(model.config)
    message = r"RoPE 'longrope' rotates otherwise beyond 16 tokens: the cache was filled up to {}, .* reaches {}; give all {}"
    with torch.no_grad():
        model(tokens[:, :12], past_key_values=cache)
        with pytest.raises(ValueError, match=message.format(12, 30, 30)):
            model(tokens[:, 12:], past_key_values=cache)
        torch.testing.assert_close(
            model(tokens[:, 12:16], past_key_values=cache).logits, model(tokens[:, :16]).logits[:, 12:], **CLOSE
        )
    with pytest.raises(ValueError, match=message.format(16, 19, 19)):  # new tokens alone
        generate(model, tokens[:, 16:19], attention_mask=torch.ones(1, 19), past_key_values=cache)
    with pytest.raises(ValueError, match=message.format(16, 24, 24)):
        generate(model, tokens, prefill_chunk_size=8)


def test_assisted_decoding_keeps_to_one_side_of_the_border():
    model, tokens = longrope_model(), random_tokens(1, 30)
    for given in ({"prompt_lookup_num_tokens": 4}, {"assistant_model": longrope_model(num_hidden_layers=1)}):
        with pytest.raises(ValueError, match="beyond 16 tokens, .* between 10 and 30; leave the assistant out"):
            generate(model, tokens[:, :12], attention_mask=left_padding(2, length=12), **given)
        for length, new in ((8, 8), (17, 20)):
            options = {"max_new_tokens": new}
            expected = generate(model, tokens[:, :length], **options)
            assert torch.equal(generate(model, tokens[:, :length], **options, **given), expected)


def test_a_crop_across_the_border_leaves_keys_of_its_other_side():
    model, tokens = longrope_model(), random_tokens(1, 30)
    cache = LongNetCache(model.config)
    cache.activate_past_recording()
    with torch.no_grad():
        model(tokens[:, : BORDER + 2], past_key_values=cache)
        cache.crop(-4)
        with pytest.raises(ValueError, match="the cache was filled up to 18, and this call reaches 15"):
            model(tokens[:, 14:15], past_key_values=cache)
        other = LongNetCache(model.config)
        model(tokens[:, :12], past_key_values=other)
        cache.load_state_dict(other.state_dict())
        torch.testing.assert_close(
            model(tokens[:, 12:15], past_key_values=cache).logits, model(tokens[:, :15]).logits[:, 12:], **CLOSE
        )


@pytest.mark.parametrize("rope", [LONGROPE, DYNAMIC], ids=lambda rope: rope["rope_type"])
def test_a_stream_keeps_to_one_side_of_the_border(rope):
    border = {"max_position_embeddings": BORDER, "rope_parameters": dict(rope)}
    model, tokens = tiny_model("retrofit", **border), random_tokens(2, 30)
    within = torch.cat(list(stream(model, tokens[:, :BORDER].split(5, dim=1))), dim=1)
    with torch.no_grad():
        logits = model(tokens[:, :BORDER], use_cache=False).logits.float()
    expected = torch.nn.functional.cross_entropy(logits[:, :-1].mT, tokens[:, 1:BORDER], reduction="none")
    torch.testing.assert_close(within[:, 1:], expected, **CLOSE)

    scored = TokenStream(model)
    scored.score(tokens[:, :10])
    with pytest.raises(
        ValueError, match=f"'{rope['rope_type']}' rotates otherwise beyond 16 .* up to 10, .* reaches 17"
    ):
        scored.score(tokens[:, 10:17])
    assert scored.position == 10
    scored.score(tokens[:, 10:16])


def packings() -> dict[str, tuple[dict, list[tuple[int, slice, int]]]]:
    """Return batches of packed documents, and the row, columns and first position of each."""
    lengths = {"both sides": (10, 25, BORDER, BORDER + 1, 3), "short": (5, 7, 9), "long": (20, 30)}
    found = {}
    for name, counts in lengths.items():
        edges = torch.tensor([0, *counts]).cumsum(0)
        columns = [slice(int(start), int(stop)) for start, stop in zip(edges, edges[1:])]
        tokens, documents = random_tokens(1, int(edges[-1])), [(0, part, 0) for part in columns]
        found[f"position_ids, {name}"] = (
            {"input_ids": tokens, "position_ids": torch.cat([torch.arange(n) for n in counts])[None]}, documents
        )  # fmt: skip
        found[f"cu_seq_lens_q, {name}"] = {"input_ids": tokens, "cu_seq_lens_q": edges.int()}, documents
    # A row of padding and a short document that begins late, and one of a short and a long document.
    position_ids = torch.zeros(2, 30, dtype=torch.long)
    position_ids[0, 20:] = torch.arange(10) + 4
    position_ids[1, :12], position_ids[1, 12:] = torch.arange(12), torch.arange(18)
    padded = {"input_ids": random_tokens(2, 30), "attention_mask": left_padding(20, 0, length=30)}
    documents = [(0, slice(20, 30), 4), (1, slice(0, 12), 0), (1, slice(12, 30), 0)]
    found["padded"] = padded | {"position_ids": position_ids}, documents
    return found


@pytest.mark.parametrize("how", packings())
def test_a_packed_document_is_rotated_as_it_is_alone(how):
    batch, documents = packings()[how]
    model = longrope_model()
    with torch.no_grad():
        found = model(**batch, use_cache=False).logits
        for row, columns, first in documents:
            tokens = batch["input_ids"][row : row + 1, columns]
            position_ids = torch.arange(first, first + tokens.shape[1])[None]
            expected = model(tokens, position_ids=position_ids, use_cache=False).logits
            torch.testing.assert_close(found[row : row + 1, columns], expected, **CLOSE)


def test_the_longest_row_of_a_batch_decides_for_all_as_with_phi_3(tmp_path):
    make_checkpoint(
        tmp_path / "source", family="phi3", rope="longrope, no factor", original_max_position_embeddings=BORDER
    )
    convert_checkpoint(tmp_path / "source", tmp_path / "longnet", local=64, progress=False)
    source, ours = (
        AutoModelForCausalLM.from_pretrained(tmp_path / name, dtype=torch.float64).eval()
        for name in ("source", "longnet")
    )
    for paddings in ((0, 18), (15, 18), (14, 18)):  # the first row is far beyond the border, below it, at it
        mask = left_padding(*paddings, length=30)
        tokens = torch.randint(3, 280, (2, 30), generator=torch.Generator().manual_seed(0))
        position_ids = (mask.cumsum(-1) - 1).clamp(min=0)
        given = {"attention_mask": mask, "use_cache": False}
        with torch.no_grad():
            expected = source(tokens, position_ids=position_ids, **given).logits
            found = ours(tokens, **given).logits
        torch.testing.assert_close(found[mask == 1], expected[mask == 1], **CLOSE)


@pytest.mark.parametrize("rope", [LONGROPE, DYNAMIC], ids=lambda rope: rope["rope_type"])
def test_no_rows_and_no_tokens_have_no_logits(rope):
    model = tiny_model("retrofit", rope_parameters=dict(rope), max_position_embeddings=BORDER)
    for batch, length in ((2, 0), (0, 20), (0, 0)):
        nothing = random_tokens(2, 20)[:batch, :length]
        packed = torch.arange(length)[None] % 8
        for inputs in ({}, {"use_cache": False}, {"position_ids": packed, "use_cache": False}):
            assert model(nothing, **inputs).logits.shape == (batch, length, model.config.vocab_size)


@pytest.mark.parametrize(
    "fields", [{"rope_parameters": dict(LONGROPE)}, {"backbone": "magneto"}], ids=["rope", "xpos"]
)
@pytest.mark.parametrize("max_length", [None, 64])
def test_no_tokens_after_some_change_nothing(fields, max_length):
    model, tokens = tiny_model("retrofit", **fields), random_tokens(2, 20)
    caches = [LongNetCache(model.config, max_length=max_length) for _ in range(2)]
    for cache in caches:
        model(tokens[:, :17], past_key_values=cache)
    assert model(tokens[:, :0], past_key_values=caches[0]).logits.shape == (2, 0, model.config.vocab_size)
    assert caches[0].rotated_up_to == caches[1].rotated_up_to
    found, expected = (model(tokens[:, 17:], past_key_values=cache).logits for cache in caches)
    assert torch.equal(found, expected)
