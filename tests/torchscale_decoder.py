"""The official LongNetDecoder in float64, written from the published definitions, under the official tensor names.

It stands for the official code where numbers from that code itself are missing: xPos and Sub-LN. Without those two it
is held to them (``test_golden.py``). Sources: MAGNETO (arXiv 2210.06423), xPos (arXiv 2212.10554) and, for what those
leave open (rounding of angles, which pairs rotate, order of norms), the facts of torchscale's code. It shares no code
with the package; attention is ``oracle.dilated_attention`` unless another is given.
"""

import math
from collections.abc import Callable
from functools import partial

import oracle
import torch
import torch.nn.functional as F
from torch import Tensor


ARGUMENTS = {
    "decoder_embed_dim": 32,
    "decoder_attention_heads": 4,
    "decoder_ffn_embed_dim": 48,
    "decoder_layers": 2,
    "activation_fn": "gelu",
    "layernorm_eps": 1e-5,
    "no_scale_embedding": True,
    "share_decoder_input_output_embed": False,
    "subln": True,
    "xpos_rel_pos": True,
    "xpos_scale_base": 512,
    "vocab_size": 97,
    "segment_length": [8, 16, 32],
    "dilated_ratio": [1, 2, 4],
}


def random_weights(seed: int = 0, **changes) -> tuple[dict[str, Tensor], dict]:
    """Draw float32 weights of a decoder with these arguments, large enough that every part shows in the logits.

    Returns:
        The state dict as the official code saves it (xPos' scales included), and all arguments.
    """
    arguments = {**ARGUMENTS, **changes}
    width, inner, vocabulary = (arguments[n] for n in ("decoder_embed_dim", "decoder_ffn_embed_dim", "vocab_size"))
    head_dim = width // arguments["decoder_attention_heads"]
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int, mean: float = 0.0) -> Tensor:
        return mean + torch.randn(shape, generator=generator) * (0.3 if len(shape) == 1 else shape[-1] ** -0.5)

    weights = {"embed_tokens.weight": draw(vocabulary, width) * math.sqrt(width)}
    weights["output_projection.weight"] = draw(vocabulary, width) * 2
    if arguments["share_decoder_input_output_embed"]:
        weights["output_projection.weight"] = weights["embed_tokens.weight"]
    linears = {f"self_attn.{x}_proj": (width, width) for x in ("q", "k", "v", "out")}
    linears |= {"ffn.fc1": (inner, width), "ffn.fc2": (width, inner)}
    norms = {"self_attn_layer_norm": width, "final_layer_norm": width}
    if arguments["subln"]:
        norms |= {"self_attn.inner_attn_ln": width, "ffn.ffn_layernorm": inner}
    for layer in (f"layers.{i}." for i in range(arguments["decoder_layers"])):
        for name, shape in linears.items():
            sharper = 3 if name[-6] in "qk" else 1  # attention that tells keys apart
            weights |= {f"{layer}{name}.weight": draw(*shape) * sharper, f"{layer}{name}.bias": draw(shape[0])}
        for name, size in norms.items():
            weights |= {f"{layer}{name}.weight": draw(size, mean=1.0), f"{layer}{name}.bias": draw(size)}
        if arguments["xpos_rel_pos"]:
            weights[f"{layer}self_attn.xpos.scale"] = xpos_scale(head_dim)
    weights |= {"layer_norm.weight": draw(width, mean=1.0), "layer_norm.bias": draw(width)}
    return weights, arguments


def xpos_scale(head_dim: int) -> Tensor:
    """What each rotated pair fades by over ``xpos_scale_base`` tokens, ``[head_dim / 2]`` float32."""
    return (torch.arange(0, head_dim, 2) + 0.4 * head_dim) / (1.4 * head_dim)


def xpos(x: Tensor, scale_base: int, grows: bool) -> Tensor:
    """Rotate pairs of neighbouring dimensions by position, and let them fade or grow with it.

    The angles are products in float32, as in the official code, whatever the dtype of the model.

    Args:
        x: ``[B, H, L, D]`` queries, or keys (``grows``).
    """
    length, head_dim = x.shape[-2:]
    frequencies = 1.0 / 10000 ** (torch.arange(head_dim // 2) / (head_dim // 2))
    angles = (torch.arange(length)[:, None].float() * frequencies).double()  # [L, D/2]
    centred = torch.arange(length) + (-length) // 2
    factors = xpos_scale(head_dim).double() ** (centred.double() / scale_base)[:, None]
    factors = 1 / factors if grows else factors
    even, odd = x[..., ::2], x[..., 1::2]
    turned = (even * angles.cos() - odd * angles.sin(), odd * angles.cos() + even * angles.sin())
    return torch.stack([part * factors for part in turned], dim=-1).flatten(-2)


def decoder_logits(
    weights: dict[str, Tensor], input_ids: Tensor, arguments: dict, attend: Callable | None = None
) -> Tensor:
    """Run the decoder in float64.

    Args:
        weights: by official name.
        input_ids: ``[B, L]``.
        arguments: as the official code names them.
        attend: ``(query, key, value) -> output``, all ``[B, H, L, D]``.

    Returns:
        ``[B, L, vocabulary]``.
    """
    if attend is None:
        pattern = {"segment_lengths": arguments["segment_length"], "dilation_rates": arguments["dilated_ratio"]}
        rules = {"head_offsets": "blocked", "count_overlaps": True, "dilate_queries": True, "window": "segment"}
        oracle_attention = partial(oracle.dilated_attention, **pattern, **rules)

        def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            return oracle_attention(query, key, value)[0]

    weights = {name: x.double() for name, x in weights.items()}
    activation = {"gelu": F.gelu, "relu": F.relu}[arguments["activation_fn"]]

    def linear(name: str, x: Tensor) -> Tensor:
        return F.linear(x, weights[f"{name}.weight"], weights.get(f"{name}.bias"))

    def norm(name: str, x: Tensor) -> Tensor:
        return F.layer_norm(
            x, x.shape[-1:], weights[f"{name}.weight"], weights[f"{name}.bias"], eps=arguments["layernorm_eps"]
        )

    hidden = weights["embed_tokens.weight"][input_ids]  # [B, L, H * D]
    if not arguments["no_scale_embedding"]:
        hidden = hidden * math.sqrt(hidden.shape[-1])
    for layer in (f"layers.{i}" for i in range(arguments["decoder_layers"])):
        normed = norm(f"{layer}.self_attn_layer_norm", hidden)
        query, key, value = (
            linear(f"{layer}.self_attn.{x}_proj", normed)
            .unflatten(-1, (arguments["decoder_attention_heads"], -1))
            .transpose(1, 2)
            for x in "qkv"
        )  # [B, H, L, D]
        if arguments["xpos_rel_pos"]:
            query = xpos(query, arguments["xpos_scale_base"], grows=False)
            key = xpos(key, arguments["xpos_scale_base"], grows=True)
        heads = attend(query, key, value).transpose(1, 2).flatten(2)
        if arguments["subln"]:
            heads = norm(f"{layer}.self_attn.inner_attn_ln", heads)
        hidden = hidden + linear(f"{layer}.self_attn.out_proj", heads)
        inner = activation(linear(f"{layer}.ffn.fc1", norm(f"{layer}.final_layer_norm", hidden)))
        if arguments["subln"]:
            inner = norm(f"{layer}.ffn.ffn_layernorm", inner)
        hidden = hidden + linear(f"{layer}.ffn.fc2", inner)
    return linear("output_projection", norm("layer_norm", hidden))
