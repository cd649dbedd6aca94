"""The loss without logits: equal to the plain loss and its gradients, and never more logits than a chunk of them."""

import copy
import re

import pytest
import torch
import torch.nn.functional as F
from peak_bytes import TensorWatch
from peft import LoraConfig, get_peft_model
from tiny_models import random_tokens, tiny_model
from torch import nn

from modeling_longnet import head_loss as module
from modeling_longnet.head_loss import IGNORED, head_loss, logits_loss, next_tokens, token_losses


HIDDEN, VOCABULARY, CHUNK = 8, 37, 5
IMPLEMENTATIONS = ["chunked", pytest.param("torch", marks=pytest.mark.skipif(
    not hasattr(F, "linear_cross_entropy"), reason="needs torch 2.13 or newer"
))]  # fmt: skip


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    monkeypatch.setattr(module, "CHUNK_LOGITS", CHUNK * VOCABULARY + 3)


def problem(dtype=torch.float64, length=23, seed=0) -> tuple[torch.Tensor, nn.Linear, torch.Tensor]:
    """Draw hidden states ``[2, length, HIDDEN]``, a head, and targets with whole chunks and single tokens left out."""
    torch.manual_seed(seed)
    head = nn.Linear(HIDDEN, VOCABULARY, bias=False)
    nn.init.normal_(head.weight)
    hidden = torch.randn(2, length, HIDDEN, dtype=dtype, requires_grad=True)
    targets = torch.randint(VOCABULARY, (2, length))
    targets[0, : 2 * CHUNK + 2] = targets[1, 7:8] = targets[1, -1] = IGNORED
    return hidden, head.to(dtype), targets


def plain(hidden, head, targets, smoothing=0.0):
    """The mean loss from all logits at once, in float64: what PyTorch computes, sharing nothing with the package."""
    logits = head(hidden).double().flatten(0, 1)
    return F.cross_entropy(logits, targets.flatten(), ignore_index=-100, label_smoothing=smoothing)


def with_gradients(loss, *tensors):
    return [loss.detach().double(), *(g.double() for g in torch.autograd.grad(loss, tensors))]


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("length", [1, CHUNK, 23])
def test_loss_and_gradients_equal_the_plain_ones_in_float64(implementation, length):
    hidden, head, targets = problem(length=length)
    targets[1, 0] = 3  # at least one
    found = head_loss(hidden, head, targets, implementation=implementation)
    expected = plain(hidden, head, targets)
    torch.testing.assert_close(
        with_gradients(found, hidden, head.weight),
        with_gradients(expected, hidden, head.weight),
        rtol=1e-12,
        atol=1e-14,
    )


def test_in_bfloat16_it_is_as_exact_as_the_plain_loss():
    hidden, head, targets = problem(torch.bfloat16, length=400)
    exact_head = copy.deepcopy(head).double()
    exact_hidden = hidden.detach().double().requires_grad_()
    exact = with_gradients(plain(exact_hidden, exact_head, targets), exact_hidden, exact_head.weight)
    ours = with_gradients(head_loss(hidden, head, targets), hidden, head.weight)
    logits = with_gradients(logits_loss(head(hidden), targets), hidden, head.weight)
    for name, found, theirs, truth in zip(("loss", "hidden", "weight"), ours, logits, exact):
        error, their_error = ((x - truth).norm() / truth.norm() for x in (found, theirs))
        assert error <= 1.5 * their_error + 1e-5, f"{name}: {error:.1e}, with all logits {their_error:.1e}"
        assert error < 6e-3, f"{name}: {error:.1e}"


def test_a_confident_bfloat16_model_keeps_small_gradients():
    # p = 0.999 at the target: p - 1 is lost if p is rounded to bfloat16 first.
    head = nn.Linear(1, 2, bias=False).to(torch.bfloat16)
    head.weight.data = torch.tensor([[7.0], [0.0]], dtype=torch.bfloat16)
    hidden = torch.ones(1, 1, 1, dtype=torch.bfloat16, requires_grad=True)
    head_loss(hidden, head, torch.zeros(1, 1, dtype=torch.long)).backward()
    p = torch.tensor(7.0).sigmoid()
    assert hidden.grad.item() == pytest.approx(7 * (p.item() - 1), rel=1e-2)


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 1.0])
def test_label_smoothing_equals_pytorchs(smoothing):
    hidden, head, targets = problem()
    found = head_loss(hidden, head, targets, label_smoothing=smoothing)
    expected = plain(hidden, head, targets, smoothing)
    torch.testing.assert_close(
        with_gradients(found, hidden, head.weight),
        with_gradients(expected, hidden, head.weight),
        rtol=1e-12,
        atol=1e-14,
    )


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("num_items", [11, torch.tensor(11)])
def test_the_sum_is_divided_by_the_given_number_of_items(implementation, num_items):
    hidden, head, targets = problem()
    found = head_loss(hidden, head, targets, num_items=num_items, implementation=implementation)
    count = (targets != IGNORED).sum()
    expected = plain(hidden, head, targets) * count / 11
    torch.testing.assert_close(with_gradients(found, hidden), with_gradients(expected, hidden), rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(logits_loss(head(hidden), targets, num_items=num_items), expected)


@pytest.mark.parametrize("num_items", [None, 0, torch.tensor(0)], ids=str)
@pytest.mark.parametrize("implementation", ["logits", "chunked", "torch"])
def test_without_a_target_the_gradient_of_the_mean_is_0(implementation, num_items):
    if implementation == "torch" and not hasattr(F, "linear_cross_entropy"):
        pytest.skip("needs torch 2.13 or newer")
    hidden, head = torch.randn(1, 6, 8, requires_grad=True), nn.Linear(8, 11, bias=False)
    targets = torch.full((1, 6), -100)
    if implementation == "logits":
        loss = logits_loss(head(hidden), targets, num_items=num_items)
    else:
        loss = head_loss(hidden, head, targets, num_items=num_items, implementation=implementation)
    assert loss.isnan()
    loss.backward()
    for gradient in (hidden.grad, head.weight.grad):
        assert gradient is None or not gradient.any()


def test_without_a_target_the_mean_is_nan_and_the_sum_is_0_with_gradient_0():
    hidden, head, targets = problem()
    targets.fill_(IGNORED)
    assert head_loss(hidden, head, targets).isnan()
    loss = head_loss(hidden, head, targets, num_items=5)
    assert loss == 0
    loss.backward()
    assert hidden.grad.abs().max() == 0


def test_the_backward_pass_can_be_repeated():
    hidden, head, targets = problem()
    loss = head_loss(hidden, head, targets)
    first = torch.autograd.grad(loss, hidden, retain_graph=True)[0]
    torch.testing.assert_close(torch.autograd.grad(2 * loss, hidden)[0], 2 * first)


def test_no_more_logits_than_a_chunk_are_ever_made():
    hidden, head, targets = problem(length=400)
    with TensorWatch() as watch:
        head_loss(hidden, head, targets).backward()
    assert CHUNK * VOCABULARY == 185 < hidden.numel()
    assert watch.largest == hidden.numel() == 6400
    with TensorWatch() as watch:
        logits_loss(head(hidden), targets).backward()
    assert watch.largest == 800 * VOCABULARY  # the watch sees what there is to see


def test_a_vocabulary_larger_than_a_chunk_is_taken_a_token_at_a_time(monkeypatch):
    hidden, head, targets = problem()
    expected = with_gradients(plain(hidden, head, targets), hidden, head.weight)
    monkeypatch.setattr(module, "CHUNK_LOGITS", VOCABULARY // 2)
    found = with_gradients(head_loss(hidden, head, targets), hidden, head.weight)
    torch.testing.assert_close(found, expected)


def test_in_float16_a_mean_over_many_tokens_is_no_division_by_infinity():
    hidden, head, targets = problem(torch.float16)
    hidden = (hidden.detach() * 1000).requires_grad_()
    exact_head, exact_hidden = copy.deepcopy(head).double(), hidden.detach().double().requires_grad_()
    items = 10**8  # 1 / items is 0 in float16
    (found,) = torch.autograd.grad(head_loss(hidden, head, targets, num_items=items), head.weight)
    exact = plain(exact_hidden, exact_head, targets) * (targets != IGNORED).sum() / items
    (truth,) = torch.autograd.grad(exact, exact_head.weight)
    assert (found - truth).norm() / truth.norm() < 1e-2


def test_tokens_without_target_are_not_multiplied_with_the_head():
    hidden, head, targets = problem(length=400)
    targets.fill_(IGNORED)
    targets[1, 100:103] = 7
    rows = []
    handle = head.register_forward_hook(lambda _, inputs, output: rows.append(len(output)))
    head_loss(hidden, head, targets).backward()
    handle.remove()
    assert sum(rows) == 3


def test_a_frozen_head_gets_no_gradient_and_needs_no_memory_for_one():
    hidden, head, targets = problem()
    head.weight.requires_grad_(False)
    with TensorWatch() as watch:
        loss = head_loss(hidden, head, targets)
        loss.backward()
    torch.testing.assert_close(hidden.grad, with_gradients(plain(hidden, head, targets), hidden)[1])
    assert head.weight.grad is None
    assert watch.largest <= hidden.numel()


def test_only_the_head_may_want_gradients():
    hidden, head, targets = problem()
    hidden = hidden.detach()
    found = with_gradients(head_loss(hidden, head, targets), head.weight)
    torch.testing.assert_close(found, with_gradients(plain(hidden, head, targets), head.weight))


@pytest.mark.parametrize("adapted", ["target_modules", "modules_to_save"])
def test_an_adapted_head_gets_its_gradients(adapted):
    hidden, head, targets = problem()
    body = nn.Sequential()
    body.head, body.other = head, nn.Linear(HIDDEN, HIDDEN)
    options = {"target_modules": ["other"], adapted: ["head"]}
    adapted_head = get_peft_model(body, LoraConfig(init_lora_weights=False, **options)).base_model.model.head.double()
    parameters = [p for p in adapted_head.parameters() if p.requires_grad]
    assert len(parameters) == (2 if adapted == "target_modules" else 1)
    found = with_gradients(head_loss(hidden, adapted_head, targets), hidden, *parameters)
    torch.testing.assert_close(found, with_gradients(plain(hidden, adapted_head, targets), hidden, *parameters))


def test_under_autocast_it_computes_as_the_plain_loss_does():
    hidden, head, targets = problem(torch.float32)
    gradients = []
    for loss in (head_loss, lambda x, head, targets: logits_loss(head(x), targets)):
        with torch.autocast("cpu", torch.bfloat16):
            value = loss(hidden, head, targets)
        gradients.append(with_gradients(value, hidden, head.weight))
        assert value.dtype == torch.float32
    torch.testing.assert_close(*gradients, rtol=2e-2, atol=1e-3)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_compiled_it_is_the_same(smoothing):
    torch.compiler.reset()
    hidden, head, targets = problem()

    @torch.compile(backend="aot_eager", fullgraph=True)
    def compiled(hidden, targets):
        return head_loss(hidden, head, targets, label_smoothing=smoothing)

    torch.testing.assert_close(
        with_gradients(compiled(hidden, targets), hidden, head.weight),
        with_gradients(plain(hidden, head, targets, smoothing), hidden, head.weight),
    )


def test_a_head_may_be_any_module():
    hidden, linear, targets = problem()
    head = nn.Sequential(nn.Linear(HIDDEN, HIDDEN).double(), nn.Tanh(), linear)
    parameters = list(head.parameters())
    found = with_gradients(head_loss(hidden, head, targets), hidden, *parameters)
    torch.testing.assert_close(found, with_gradients(plain(hidden, head, targets), hidden, *parameters))
    targets[1, 3] = VOCABULARY
    with pytest.raises(ValueError, match="tokens of the vocabulary, 0 to 36; they reach from 0 to 37"):
        head_loss(hidden, head, targets)


def test_each_tokens_own_loss():
    hidden, head, targets = problem()
    losses = token_losses(hidden, head, targets)
    logits = head(hidden).transpose(1, 2)
    torch.testing.assert_close(losses, F.cross_entropy(logits, targets, reduction="none").detach())
    assert not losses.requires_grad
    assert (losses[targets == IGNORED] == 0).all()


def test_losses_of_a_head_whose_weight_is_elsewhere_between_calls():
    hidden, head, targets = problem()
    expected = token_losses(hidden, head, targets)
    weight, away = head.weight.data, torch.empty(0, dtype=head.weight.dtype)  # as ZeRO-3 leaves it
    head.weight.data = away
    head.register_forward_pre_hook(lambda head, inputs: setattr(head.weight, "data", weight))
    head.register_forward_hook(lambda head, inputs, output: setattr(head.weight, "data", away))
    torch.testing.assert_close(token_losses(hidden, head, targets), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_tokens_without_a_target_have_losses_of_0_in_the_dtype_of_the_others(dtype):
    hidden, head, targets = problem(dtype)
    expected = token_losses(hidden, head, targets).dtype
    losses = token_losses(hidden, head, torch.full_like(targets, IGNORED))
    assert losses.shape == targets.shape and not losses.any() and losses.dtype == expected
    assert expected == (torch.float64 if dtype == torch.float64 else torch.float32)


def test_labels_are_shifted_by_one_and_the_last_token_has_none():
    assert next_tokens(torch.tensor([[4, 5, 6], [7, IGNORED, 9]])).tolist() == [[5, 6, -100], [-100, 9, -100]]


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("train", [True, False])
def test_an_ignore_index_of_the_callers_own_means_in_training_what_it_means_in_evaluation(train, smoothing):
    model, tokens = tiny_model().train(train), random_tokens(2, 40)
    expected, given = tokens.clone(), tokens.clone()
    expected[0, :9], given[0, :9] = IGNORED, 0
    options = {"label_smoothing": smoothing}
    ours = {"labels": given, "ignore_index": 0, **options}
    torch.testing.assert_close(model(tokens, **ours).loss, model(tokens, labels=expected, **options).loss)
    shifted = {"shift_labels": F.pad(given[:, 1:], (0, 1)), "ignore_index": 0, **options}
    torch.testing.assert_close(model(tokens, **shifted).loss, model(tokens, labels=expected, **options).loss)
    given[1, 3:5] = IGNORED
    with pytest.raises(ValueError, match="2 labels are -100, .* ignore_index=0 .*; give them the label 0"):
        model(tokens, **ours)


def test_an_implementation_asked_for_by_name_runs_or_raises():
    hidden, head, targets = problem()
    with pytest.raises(ValueError, match=r"must be one of 'auto', 'chunked', 'torch', 'liger', got 'fused'"):
        head_loss(hidden, head, targets, implementation="fused")
    with pytest.raises(ValueError, match=r'"liger" (cannot import|runs on CUDA, the model is on cpu)'):
        head_loss(hidden, head, targets, implementation="liger")
    biased = nn.Linear(HIDDEN, VOCABULARY).double()
    if hasattr(F, "linear_cross_entropy"):
        with pytest.raises(ValueError, match='"torch" has no label_smoothing, got 0.1; use "chunked"'):
            head_loss(hidden, head, targets, implementation="torch", label_smoothing=0.1)
        with pytest.raises(
            ValueError, match='"torch" needs an nn.Linear head without bias, got Linear; use "chunked"'
        ):
            head_loss(hidden, biased, targets, implementation="torch")
    torch.testing.assert_close(head_loss(hidden, biased, targets), plain(hidden, biased, targets))


@pytest.mark.gpu
@pytest.mark.parametrize("implementation", ["chunked", "torch", "liger"])
def test_on_a_gpu_every_implementation_that_is_there_is_right(implementation):
    hidden, head, targets = (x.cuda() for x in problem(torch.bfloat16, length=400))
    hidden = hidden.detach().requires_grad_()
    try:
        found = with_gradients(head_loss(hidden, head, targets, implementation=implementation), hidden, head.weight)
    except ValueError as refusal:
        pytest.skip(str(refusal))
    exact_head, exact_hidden = copy.deepcopy(head).double(), hidden.detach().double().requires_grad_()
    exact = with_gradients(plain(exact_hidden, exact_head, targets), exact_hidden, exact_head.weight)
    for name, x, truth in zip(("loss", "hidden", "weight"), found, exact):
        assert (x - truth).norm() / truth.norm() < 1e-2, name


def test_labels_that_are_not_one_per_token_are_refused():
    hidden, head, targets = problem()
    for wrong in (targets[:, 1:], targets[:1], targets.flatten()):
        reason = f"each of the {list(targets.shape)} tokens one, got shape {list(wrong.shape)}"
        with pytest.raises(ValueError, match=re.escape(reason)):
            head_loss(hidden, head, wrong)
    with pytest.raises(ValueError, match="labels must be int64, got torch.float32"):
        head_loss(hidden, head, targets.float())
    model, tokens = tiny_model().train(), random_tokens(2, 8)
    with pytest.raises(ValueError, match=r"\[2, 3\] tokens one, got shape \[2, 8\]"):
        model(tokens, labels=tokens, logits_to_keep=3)


@pytest.mark.parametrize("smoothing", [-0.1, 1.1, float("nan")])
def test_a_smoothing_that_is_no_weight_is_refused(smoothing):
    with pytest.raises(ValueError, match=f"label_smoothing must be between 0 and 1, got {smoothing}"):
        head_loss(*problem(), label_smoothing=smoothing)


@pytest.mark.parametrize(("wrong", "reach"), [(VOCABULARY, "0 to 37"), (-1, "-1 to 36")])
def test_labels_that_are_no_tokens_are_named(wrong, reach):
    hidden, head, targets = problem()
    targets[0, :-1], targets[1, 0], targets[1, 3] = 0, 36, wrong
    with pytest.raises(ValueError, match=f"labels must be -100 or .* 0 to 36; they reach from {reach}"):
        head_loss(hidden, head, targets)
    with pytest.raises(ValueError, match="labels must be"):
        token_losses(hidden, head, targets)
