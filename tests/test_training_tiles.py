"""Tiles along the sequence: the function's own output and gradients, for the memory of one tile."""

import importlib

import pytest
import torch
from matmul_flops import MatmulFlops
from peak_bytes import TensorWatch
from tiny_models import checkpointed, random_tokens, tiny_model
from torch import nn
from torch.utils.checkpoint import checkpoint

from modeling_longnet import sequence_tiles
from modeling_longnet.sequence_tiles import in_tiles, tile_tokens


TILE, HIDDEN = 5, 8


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    monkeypatch.setattr(sequence_tiles, "TILE_TOKENS", TILE)


class Mlp(nn.Module):
    """A position-wise module that counts the tokens it computes."""

    def __init__(self, width=16, dropout=0.0, bias=True):
        super().__init__()
        self.up, self.down = nn.Linear(HIDDEN, width), nn.Linear(width, HIDDEN, bias=bias)
        self.dropout, self.computed = nn.Dropout(dropout), 0

    def forward(self, x):
        self.computed += x.shape[1]
        return self.down(self.dropout(self.up(x).tanh()))


def results(layer, x: torch.Tensor, module: nn.Module) -> list[torch.Tensor]:
    """Compute the output and all gradients."""
    leaves = [p for p in (x, *module.parameters()) if p.requires_grad]
    for leaf in leaves:
        leaf.grad = None
    output = layer(x)
    (output * torch.linspace(0, 1, output.numel()).view_as(output)).sum().backward()
    return [output.detach(), *(leaf.grad for leaf in leaves)]


def inputs(length=23, batch=2) -> torch.Tensor:
    torch.manual_seed(1)
    return torch.randn(batch, length, HIDDEN, dtype=torch.float64, requires_grad=True)


@pytest.mark.parametrize("length", [1, TILE, TILE + 1, 23])
def test_output_and_gradients_are_the_functions_own(length):
    module, x = Mlp().double(), inputs(length)
    torch.testing.assert_close(results(lambda x: in_tiles(module, x, [module]), x, module), results(module, x, module))


@pytest.mark.parametrize("frozen", ["input", "module", "one weight"])
def test_only_what_wants_gradients_gets_them(frozen):
    module, x = Mlp().double(), inputs()
    x.requires_grad_(frozen != "input")
    module.requires_grad_(frozen != "module")
    module.up.weight.requires_grad_(frozen == "input")
    found = results(lambda x: in_tiles(module, x, [module]), x, module)
    torch.testing.assert_close(found, results(module, x, module))
    assert len(found) == {"input": 5, "module": 2, "one weight": 5}[frozen]


def test_weights_whose_gradients_are_one_tensor_have_sums_of_their_own():
    module, x = nn.Module(), inputs()
    module.one, module.other = (nn.Parameter(torch.randn(HIDDEN, dtype=torch.float64)) for _ in range(2))

    def scaled(x):
        return x * (module.one + module.other)

    torch.testing.assert_close(results(lambda x: in_tiles(scaled, x, [module]), x, module), results(scaled, x, module))


def test_a_module_that_is_named_twice_has_its_gradient_once():
    module, x = Mlp().double(), inputs()
    found = results(lambda x: in_tiles(module, x, [module, module.up]), x, module)
    torch.testing.assert_close(found, results(module, x, module))


def test_dropout_is_drawn_alike_in_the_backward_pass():
    module, x = Mlp(dropout=0.5).double(), inputs()
    torch.manual_seed(3)
    output, grad_x, *_ = results(lambda x: in_tiles(module, x, [module]), x, module)
    state = torch.get_rng_state()
    # The same draws, tile by tile, in one ordinary graph.
    torch.manual_seed(3)
    expected = results(lambda x: torch.cat([module(tile) for tile in x.split(TILE, dim=1)], dim=1), x, module)
    torch.testing.assert_close([output, grad_x], expected[:2])
    assert torch.equal(torch.get_rng_state(), state), "the backward pass must leave the random state as it was"


def test_autocast_holds_in_the_backward_pass_too():
    torch.manual_seed(0)
    module, x = Mlp(), inputs().detach().float().requires_grad_()
    found, dtypes = [], set()
    module.register_forward_hook(lambda module, inputs, output: dtypes.add(output.dtype))
    for function in (lambda x: in_tiles(module, x, [module]), module):

        def autocast(x, function=function):
            with torch.autocast("cpu", torch.bfloat16):
                return function(x)

        found.append(results(autocast, x, module))
    assert dtypes == {torch.bfloat16}
    torch.testing.assert_close(*found, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("reentrant", [False, True])
def test_inside_a_checkpoint_everything_is_the_same(reentrant):
    module, before, x = Mlp(), nn.Linear(HIDDEN, HIDDEN), inputs()
    both = nn.ModuleList([module, before]).double()

    def layer(x):
        h = before(x).tanh()
        return h + in_tiles(module, h, [module])

    found = results(lambda x: checkpoint(layer, x, use_reentrant=reentrant), x, both)
    torch.testing.assert_close(found, results(lambda x: before(x).tanh() + module(before(x).tanh()), x, both))


def test_inside_a_checkpoint_the_function_runs_twice_not_three_times():
    module, x = Mlp().double(), inputs()

    def layer(x):
        h = x.tanh()
        return h + in_tiles(module, h, [module])

    checkpoint(layer, x, use_reentrant=False).sum().backward()
    assert module.computed == 2 * 23


def test_the_width_inside_costs_memory_for_one_tile_only():
    length, width = 40 * TILE, 50 * HIDDEN
    module = Mlp(width).double()
    x = inputs(length, batch=1).detach()
    own = length * HIDDEN * 8  # bytes of the input, and of the output
    parameters = sum(p.nbytes for p in module.parameters())
    peaks = {}
    for name, function in (("tiles", lambda x: in_tiles(module, x, [module])), ("whole", module)):
        leaf = x.clone().requires_grad_()
        with TensorWatch() as watch:
            function(leaf).sum().backward()
        peaks[name] = watch.peak_bytes
    # Output, its gradient and the input's; two sets of weight gradients while one is added; some intermediates of a tile.
    assert tile_tokens(length) == length / 8
    assert peaks["tiles"] < 3 * own + 3 * parameters + 5 * length / 8 * width * 8
    assert peaks["whole"] > 2 * length * width * 8 > 2 * peaks["tiles"]


def test_without_gradients_memory_is_that_of_one_tile_too():
    module, x = Mlp(50 * HIDDEN).double(), inputs(40 * TILE, batch=1)
    with torch.no_grad(), TensorWatch() as watch:
        output = in_tiles(module, x, [module])
    torch.testing.assert_close(output, module(x).detach())
    assert watch.peak_bytes < output.nbytes + 4 * TILE * 50 * HIDDEN * 8


def test_partitioned_parameters_are_left_to_torchs_own_checkpoint(monkeypatch):
    module, x = Mlp().double(), inputs()
    monkeypatch.setattr(sequence_tiles, "are_partitioned", lambda modules: True)
    expected = results(module, x, module)
    module.computed = 0
    torch.testing.assert_close(results(lambda x: in_tiles(module, x, [module]), x, module), expected)
    assert module.computed == 2 * 23


def test_what_zero_3_gathers_at_a_call_is_called_once():
    module, x = Mlp().double(), inputs()
    assert not sequence_tiles.run_once_per_pass([module])
    weight, module.up.weight.ds_id = module.up.weight.data, 0
    gather = module.up.register_forward_pre_hook(lambda up, inputs: setattr(up.weight, "data", weight))
    module.up.weight.data = torch.empty(0, dtype=torch.float64)  # as ZeRO-3 leaves it between calls
    calls = []
    module.register_forward_hook(lambda module, inputs, output: calls.append(output.shape[1]))
    in_tiles(module, x, [module]).sum().backward()
    gather.remove()
    assert calls == [23]


def test_gradients_of_short_floats_are_summed_in_float32(monkeypatch):
    monkeypatch.setattr(sequence_tiles, "MAX_TILES", 1000)
    # 300 tiles that each add 1/256 to a sum near 1: bfloat16 alone would stay at 1.
    weight = nn.Linear(1, 1, bias=False).to(torch.bfloat16)
    x = torch.full((1, 300 * TILE, 1), 1 / 256 / TILE, dtype=torch.bfloat16)
    in_tiles(weight, x, [weight]).sum().backward()
    assert weight.weight.grad.item() == pytest.approx(300 / 256, rel=5e-3)


@pytest.mark.parametrize(("length", "tiles"), [(1, 1), (TILE, 1), (TILE + 1, 2), (8 * TILE, 8), (100 * TILE, 8)])
def test_tiles_are_no_more_than_eight_where_gradients_are_summed(length, tiles):
    module, x = Mlp().double(), inputs(length)
    calls = []
    module.register_forward_hook(lambda module, inputs, output: calls.append(output.shape[1]))
    in_tiles(module, x, [module])
    assert len(calls) == tiles and sum(calls) == length


def test_what_keeps_only_its_input_is_not_computed_again():
    module, x = Mlp().double(), inputs()
    module.keeps_only_input = True
    expected = results(module, x, module)
    module.computed = 0
    torch.testing.assert_close(results(lambda x: in_tiles(module, x, [module]), x, module), expected)
    assert module.computed == 23


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("frozen", [None, "input", "all before", "last"])
def test_the_product_of_the_last_layer_is_computed_once_and_its_gradients_are_whole(bias, frozen):
    module, x = Mlp(bias=bias).double(), inputs(batch=1)
    x.requires_grad_(frozen not in ("input", "all before"))
    module.up.requires_grad_(frozen != "all before")
    module.down.requires_grad_(frozen != "last")
    expected = results(module, x, module)
    with MatmulFlops() as plain:
        results(module, x, module)
    with MatmulFlops() as tiled:
        found = results(lambda x: in_tiles(module, x, [module], last=module.down), x, module)
    torch.testing.assert_close(found, expected)
    assert tiled.count - plain.count == 2 * x.shape[:2].numel() * module.up.weight.numel()
    assert "forward" not in vars(module.down)


def test_a_last_layer_under_autocast_has_its_gradients():
    torch.manual_seed(0)
    module, x = Mlp(), inputs().detach().float().requires_grad_()
    found = []
    for last in (None, module.down):

        def autocast(x, last=last):
            with torch.autocast("cpu", torch.bfloat16):
                return in_tiles(module, x, [module], last=last)

        found.append(results(autocast, x, module))
    torch.testing.assert_close(*found, rtol=1e-2, atol=1e-2)
    assert {gradient.dtype for gradient in found[1][1:]} == {torch.float32}


def test_whoever_looks_at_the_last_layers_product_sees_it():
    module, x = Mlp().double(), inputs()
    expected = results(module, x, module)
    seen = []
    handle = module.down.register_forward_hook(lambda module, inputs, output: seen.append(output.detach()))
    torch.testing.assert_close(results(lambda x: in_tiles(module, x, [module], last=module.down), x, module), expected)
    assert len(seen) == 2 * 5
    torch.testing.assert_close(torch.cat(seen[5:], dim=1), expected[0])
    handle.remove()

    def not_the_last(x):
        return module(x).tanh()

    expected = results(not_the_last, x, module)
    found = results(lambda x: in_tiles(not_the_last, x, [module], last=module.down), x, module)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("loss_implementation", ["torch", "logits"])
def test_replicas_of_data_parallel_get_all_gradients(loss_implementation, monkeypatch):
    """Trainer makes them where one process sees several GPUs: they hold copies instead of parameters."""
    copies = importlib.import_module("torch.nn.parallel.replicate")
    monkeypatch.setattr(  # its broadcast needs GPUs; the graph is the same
        copies, "_broadcast_coalesced_reshape",
        lambda tensors, devices, detach=False: [
            [x.detach() if detach else x * 1 if x.is_floating_point() else x for x in tensors] for _ in devices
        ],
    )  # fmt: skip
    model = checkpointed(tiny_model(loss_implementation=loss_implementation, num_key_value_heads=2))
    tokens = random_tokens(2, 24)
    model(tokens, labels=tokens).loss.backward()
    expected = {name: p.grad for name, p in model.named_parameters()}
    model.zero_grad()
    losses = [copy(row[None], labels=row[None]).loss for copy, row in zip(copies.replicate(model, [0, 1]), tokens)]
    torch.stack(losses).mean().backward()
    for name, p in model.named_parameters():
        assert p.grad is not None, name
        torch.testing.assert_close(p.grad, expected[name], msg=name)
