"""torch.compile and torch.export take the operator and the model as one graph."""

import shutil

import pytest
import torch
from tiny_models import left_padding, random_tokens, tiny_model

from modeling_longnet import DecodingStep, DilationPattern, LongNetCache, dilated_attention, dilated_attention_torch
from modeling_longnet.attention_operator import Call, _laid_out
from modeling_longnet.dilated_attention_torch import _attention


RETROFIT = DilationPattern.preset("retrofit", (8, 16, 32), (1, 2, 4))


def tensors(length: int) -> list[torch.Tensor]:
    torch.manual_seed(length)
    return [torch.randn(2, heads, length, 8, requires_grad=True) for heads in (4, 2, 2)]


@pytest.mark.parametrize("return_lse", [False, True])
def test_the_operator_is_one_graph_that_serves_every_length(return_lse):
    torch.compiler.reset()
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    def attend(query, key, value):
        return dilated_attention(query, key, value, RETROFIT, return_lse=return_lse)

    compiled = torch.compile(attend, backend=backend, fullgraph=True, dynamic=True)
    for length in (50, 64, 77, 33):
        inputs = tensors(length)
        results = []
        for function in (compiled, attend):
            output = function(*inputs)
            loss = sum(x.square().sum() for x in output) if return_lse else output.square().sum()
            results.append((loss, *torch.autograd.grad(loss, inputs)))
        torch.testing.assert_close(*results)
    assert len(graphs) == 1


def test_ordinary_attention_is_traced_without_looking_where_tensors_lie(monkeypatch):
    def attend(x):
        return dilated_attention(2 * x, x + 1, x, RETROFIT)

    def look(*tensors):
        raise AssertionError("what is traced lies nowhere")

    x = torch.randn(1, 2, 7, 8, dtype=torch.float64)
    expected = attend(x)
    monkeypatch.setattr(dilated_attention_torch, "_rows_are_aligned", look)
    torch.compiler.reset()
    torch.testing.assert_close(torch.compile(attend, backend="aot_eager", fullgraph=True)(x), expected)


def test_the_registered_operator_passes_opcheck():
    mask = left_padding(0, 5, length=20).bool()
    for length, attention_mask in ((20, None), (20, mask), (7, None)):  # 7: ordinary attention, its own path
        call = Call(RETROFIT, is_causal=True, scale=0.5)
        torch.library.opcheck(_attention.registered, (*tensors(length), attention_mask, None, *call.flatten()))
        transposed = [x.detach().transpose(1, 2).contiguous().transpose(1, 2) for x in tensors(length)]
        torch.library.opcheck(_attention.registered, (*transposed, attention_mask, None, *call.flatten()))


def test_one_piece_beside_dropout_compiles_in_the_dtype_of_the_input():
    query, key, value = (x.detach().bfloat16() for x in tensors(7))
    call = Call(RETROFIT, is_causal=True, scale=0.5, dropout=0.1, seed=7)

    def attend(*inputs):
        return _attention.registered(*inputs, None, None, *call.flatten())[0].relu()

    torch.compiler.reset()
    expected = attend(query, key, value)
    assert expected.dtype == torch.bfloat16
    compiled = torch.compile(attend, backend="aot_eager", fullgraph=True)(query, key, value)
    torch.testing.assert_close(compiled, expected, rtol=0, atol=0)
    torch.library.opcheck(_attention.registered, (query, key, value, None, None, *call.flatten()))


def test_a_result_in_another_dtype_than_announced_is_cast():
    announced = torch.empty(2, 3, dtype=torch.bfloat16)
    given = torch.randn(2, 3)
    assert torch.equal(_laid_out(given, announced), given.bfloat16())


@pytest.mark.parametrize("fields", [{}, {"backbone": "magneto"}], ids=["llama", "magneto"])
def test_the_model_compiles_to_the_same_loss_and_gradients(fields):
    torch.compiler.reset()
    model, tokens = tiny_model("retrofit", **fields), random_tokens(2, 40)
    gradients = []
    for function in (model, torch.compile(model, backend="aot_eager", fullgraph=True)):
        model.zero_grad()
        function(tokens, labels=tokens, use_cache=False).loss.backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
    torch.testing.assert_close(gradients[1], gradients[0])


def prefill_positions(kind: str) -> tuple[dict, torch.Tensor]:
    """Return arguments of a prefill with position_ids of their own, and where its real tokens stand."""
    rows, mask = (1, None) if kind in ("shared", "cu_seq_lens_q") else (2, left_padding(0, 7, length=40))
    given = {"input_ids": random_tokens(2, 40)[: 1 if kind == "cu_seq_lens_q" else 2]}
    given["position_ids"] = torch.arange(40).repeat(rows, 1) + 3
    if kind == "generate":
        given["position_ids"] = (mask.cumsum(-1) - 1).clamp(min=0)
    if kind == "cu_seq_lens_q":
        given["position_ids"] = torch.cat((torch.arange(15), torch.arange(25)))[None]
        given["cu_seq_lens_q"] = torch.tensor([0, 15, 40], dtype=torch.int32)
    if mask is not None:
        given["attention_mask"] = mask
    real = torch.ones_like(given["input_ids"], dtype=torch.bool) if mask is None else mask.bool()
    return given, real


@pytest.mark.filterwarnings("ignore:Dynamo detected a call to a `functools.lru_cache`")
@pytest.mark.parametrize("kind", ["shared", "shifted", "generate", "cu_seq_lens_q"])
def test_a_prefill_with_position_ids_is_one_graph(kind):
    torch.compiler.reset()
    model = tiny_model("retrofit")
    given, real = prefill_positions(kind)
    logits = []
    with torch.no_grad():
        for function in (model, torch.compile(model, backend="aot_eager", fullgraph=True)):
            cache = None if kind == "cu_seq_lens_q" else LongNetCache(model.config)
            out = function(**given, past_key_values=cache, use_cache=cache is not None)
            logits.append(out.logits[real])
            if cache is not None:
                following = given["position_ids"][:, -1:] + 1
                step = model(given["input_ids"][:, :1], past_key_values=cache, position_ids=following)
                logits[-1] = torch.cat((logits[-1], step.logits[:, 0]))
    torch.testing.assert_close(logits[1], logits[0], rtol=1e-9, atol=1e-9)


@pytest.mark.filterwarnings("ignore:Dynamo detected a call to a `functools.lru_cache`")
def test_packed_documents_that_a_graph_cannot_see_are_refused_and_never_taken_for_one():
    model, tokens = tiny_model("retrofit"), random_tokens(2, 40)
    packed = torch.arange(40).repeat(2, 1)
    packed[1, 15:] -= 15
    with torch.no_grad():
        torch.compiler.reset()
        whole = torch.compile(model, backend="aot_eager", fullgraph=True)
        refusal = (
            "cannot depend on where the position_ids of 2 rows of 40 tokens restart; leave them out .* cu_seq_lens_q"
        )
        with pytest.raises(Exception, match=refusal):
            whole(tokens, position_ids=packed, use_cache=False)
        refusal = "packed documents among 2 rows of 40 tokens cannot share one KV cache; .* cu_seq_lens_q"
        for mask in (None, left_padding(0, 3, length=40)):
            with pytest.raises(RuntimeError, match=refusal):
                whole(tokens, attention_mask=mask, position_ids=packed, past_key_values=LongNetCache(model.config))
        # Where graphs may break, documents are found as without a compiler.
        torch.compiler.reset()
        found = torch.compile(model, backend="aot_eager")(tokens, position_ids=packed, use_cache=False).logits
        expected = model(tokens, position_ids=packed, use_cache=False).logits
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile's own backend needs a C++ compiler")
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")  # of inductor, about itself
def test_by_default_the_model_compiles_to_the_same_logits():
    torch.compiler.reset()
    model, tokens = tiny_model("retrofit").float(), random_tokens(2, 40)
    with torch.no_grad():
        compiled = torch.compile(model, fullgraph=True)(tokens, use_cache=False).logits
        expected = model(tokens, use_cache=False).logits
    torch.testing.assert_close(compiled, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))


@pytest.mark.gpu
@pytest.mark.filterwarnings("default")  # inductor advises, and raises its advice as an error of the compiled graph
@pytest.mark.parametrize("preset", ["paper", "retrofit"])
def test_with_reduced_overhead_prefill_and_decoding_give_the_same_logits(preset):
    torch.compiler.reset()
    model, tokens = tiny_model(preset, head_dim=16).float().cuda(), random_tokens(2, 75).cuda()
    cache = LongNetCache(model.config, max_length=75)
    compiled = torch.compile(model, mode="reduce-overhead", fullgraph=True)
    with torch.no_grad():
        full = model(tokens, use_cache=False).logits
        for _ in range(3):  # warm-up, capture, replay
            torch.compiler.cudagraph_mark_step_begin()
            prefilled = compiled(tokens, use_cache=False).logits.clone()
        logits = [model(tokens[:, :20], past_key_values=cache).logits]
        for t in range(20, 75):
            torch.compiler.cudagraph_mark_step_begin()
            logits.append(compiled(tokens[:, t : t + 1], past_key_values=cache).logits.clone())
    torch.testing.assert_close(prefilled, full, rtol=2e-3, atol=2e-3)
    torch.testing.assert_close(torch.cat(logits, dim=1), full, rtol=2e-3, atol=2e-3)


def test_prefill_exports_and_the_exported_program_gives_the_same_logits():
    model, tokens = tiny_model("paper").float(), random_tokens(1, 40)
    program = torch.export.export(model, (), {"input_ids": tokens, "use_cache": False})
    other = random_tokens(1, 40, seed=1)
    exported = program.module()(input_ids=other, use_cache=False).logits
    torch.testing.assert_close(exported, model(other).logits)


@pytest.mark.parametrize("preset", ["paper", "retrofit"])
def test_a_decoding_step_exports_and_the_exported_program_goes_on_as_the_model_does(preset, tmp_path):
    model, tokens = tiny_model(preset).float(), random_tokens(2, 75)
    cache = LongNetCache(model.config, max_length=75)
    with torch.no_grad():
        model(tokens[:, :20], past_key_values=cache)
        before = {name: x.clone() for name, x in cache.state_dict().items()}
        program = torch.export.export(DecodingStep(model, cache), (tokens[:, 20:21],))
        torch.export.save(program, tmp_path / "step.pt2")
        step = torch.export.load(tmp_path / "step.pt2").module()
        logits = torch.cat([step(tokens[:, t : t + 1]) for t in range(20, 75)], dim=1)
        full = model(tokens, use_cache=False).logits[:, 20:]
    torch.testing.assert_close(logits, full, rtol=1e-4, atol=1e-4)
    for name, x in cache.state_dict().items():
        assert torch.equal(x, before[name]), name


def test_a_decoding_step_needs_a_filled_cache_of_fixed_size():
    model = tiny_model()
    growing = LongNetCache(model.config)
    with torch.no_grad():
        model(random_tokens(1, 5), past_key_values=growing)
    with pytest.raises(ValueError, match=r"LongNetCache\(max_length=...\)"):
        DecodingStep(model, growing)
    with pytest.raises(ValueError, match="read the prompt with it first"):
        DecodingStep(model, LongNetCache(model.config, max_length=5))
