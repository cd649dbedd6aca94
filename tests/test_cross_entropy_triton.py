"""The fused cross-entropy: on the GPU, and through Triton's interpreter as the loss without logits calls it."""

from unittest.mock import patch

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from triton_interpreter import interpret, needs_interpreter

from modeling_longnet import cross_entropy_triton, head_loss
from modeling_longnet.cross_entropy_triton import fused_losses, is_fused


VOCABULARIES = [3, 16, 37, 64]  # blocks of 16: a part of one, one, several
SMOOTHINGS = [0.0, 0.1, 1.0]


def plain(logits: Tensor, targets: Tensor, smoothing: float) -> tuple[Tensor, Tensor]:
    """Compute losses and the gradient of their sum by PyTorch, in float64."""
    logits = logits.double().requires_grad_()
    losses = F.cross_entropy(logits, targets, label_smoothing=smoothing, reduction="none")
    return losses.detach(), torch.autograd.grad(losses.sum(), logits)[0]


def check_kernel(vocabulary: int, smoothing: float, dtype: torch.dtype, device: str) -> None:
    torch.manual_seed(0)
    logits = (4 * torch.randn(7, 2 * vocabulary, device=device)).to(dtype)[
        :, :vocabulary
    ]  # rows apart from each other
    targets = torch.randint(vocabulary, (7, 2), device=device)[:, 0]  # apart, too
    targets[0], targets[1] = 0, vocabulary - 1
    losses, gradient = plain(logits, targets, smoothing)
    # Half a unit of the last place on the GPU; the interpreter cuts instead of rounding.
    rtol = 2e-5 if dtype == torch.float32 else 2**-7
    with patch.object(cross_entropy_triton, "MAX_BLOCK", 16):
        torch.testing.assert_close(
            fused_losses(logits, targets, smoothing, None).double(), losses, rtol=1e-5, atol=2e-5
        )
        beside, before = torch.empty(7, vocabulary, dtype=dtype, device=device), logits.clone()
        fused_losses(logits, targets, smoothing, beside)
        assert torch.equal(logits, before)
        torch.testing.assert_close(beside.double(), gradient, rtol=rtol, atol=1e-6)
        fused_losses(logits, targets, smoothing, logits)
        assert torch.equal(logits, beside)


def check_far_logits(device: str) -> None:
    """Logits beyond what exp can take, and a token that a head rules out with -inf."""
    logits = torch.tensor([[1e4, 0.0, 9999.0], [-1e4, float("-inf"), -9999.0], [0.0, 0.0, 0.0]], device=device)
    targets = torch.tensor([2, 0, 1], device=device)
    losses, gradient = plain(logits, targets, 0.0)
    torch.testing.assert_close(fused_losses(logits, targets, 0.0, logits).double(), losses, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(logits.double(), gradient, rtol=1e-6, atol=1e-6)
    broken = torch.tensor([[0.0, float("nan"), 1.0]], device=device)
    assert fused_losses(broken, targets[:1], 0.0, None).isnan().all()


def problem(device: str, bias: bool) -> tuple[Tensor, nn.Linear, Tensor]:
    torch.manual_seed(0)
    head = nn.Linear(8, 37, bias=bias, device=device)
    hidden = torch.randn(2, 23, 8, device=device, requires_grad=True)
    targets = torch.randint(37, (2, 23), device=device)
    targets[0, 3:9] = targets[1, -1] = -100
    return hidden, head, targets


def check_head(device: str) -> None:
    """Compare the whole loss with PyTorch's, for heads whose logits are overwritten and such whose are kept."""

    class CappedHead(nn.Linear):  # its last operation keeps its result for the backward pass
        def forward(self, x):
            return super().forward(x).tanh()

    seen = []
    for name in ("linear", "bias", "capped", "watched"):
        hidden, head, targets = problem(device, bias=name == "bias")
        head.__class__ = CappedHead if name == "capped" else nn.Linear
        if name == "watched":
            head.register_forward_hook(lambda head, inputs, output: seen.append(output))
        with patch.object(head_loss, "FUSED_CHUNK_BYTES", 10 * 37 * 4):
            loss = head_loss.head_loss(hidden, head, targets, label_smoothing=0.1)
        logits = head(hidden)
        expected = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), label_smoothing=0.1)
        inputs = [hidden, *head.parameters()]
        found, true = (torch.autograd.grad(x, inputs) for x in (loss, expected))
        torch.testing.assert_close([loss, *found], [expected, *true], rtol=2e-5, atol=2e-6, msg=name)
    *chunks, whole = seen
    torch.testing.assert_close(torch.cat(chunks), whole[targets != -100], rtol=2e-5, atol=2e-6)
    assert len(chunks) == 5, "chunks of 10 tokens"


def check_all(device: str) -> None:
    for vocabulary in VOCABULARIES:
        for smoothing in SMOOTHINGS:
            for dtype in (torch.float32, torch.bfloat16):
                check_kernel(vocabulary, smoothing, dtype, device)
    check_far_logits(device)
    check_head(device)


@pytest.mark.gpu
def test_losses_and_gradients_on_the_gpu():
    assert is_fused(torch.device("cuda"), torch.bfloat16)
    check_all("cuda")


@pytest.mark.gpu
def test_a_chunk_of_logits_is_all_the_memory_that_the_loss_takes():
    head = nn.Linear(64, 128_000, bias=False, device="cuda", dtype=torch.bfloat16)
    hidden = torch.randn(1, 16384, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    targets = torch.randint(128_000, (1, 16384), device="cuda")
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    head_loss.head_loss(hidden, head, targets).backward()
    extra = torch.cuda.max_memory_allocated() - before
    assert extra < head_loss.FUSED_CHUNK_BYTES + 12 * head.weight.nbytes + 4 * hidden.nbytes


def test_other_devices_and_dtypes_are_left_to_pytorch():
    assert not is_fused(torch.device("cpu"), torch.float32)
    assert not is_fused(torch.device("cuda"), torch.float64)


@needs_interpreter
def test_losses_and_gradients_in_the_interpreter():
    interpret(__file__)


if __name__ == "__main__":  # run by the test above, in a process of its own
    torch.set_num_threads(1)
    with patch.object(head_loss, "is_fused", lambda device, dtype: True):
        check_all("cpu")
