"""The official code's LongNetDecoder, as a converted model is held against it: its modules and names, plainly computed.

Written from the published definitions (MAGNETO, arXiv 2210.06423; xPos, arXiv 2212.10554) and the names of the tensors
that torchscale saves; only for reading a few hundred tokens.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from modeling_longnet import DilationPattern, dilated_attention


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"gelu": F.gelu, "relu": F.relu}


@dataclass(frozen=True)
class DecoderArguments:
    """What torchscale's arguments say of a decoder, under shorter names; ``dtype`` is that of its weights."""

    width: int
    num_heads: int
    inner_width: int
    num_layers: int
    vocab_size: int
    pattern: DilationPattern
    activation: str
    norm_eps: float
    sub_norm: bool
    xpos: bool
    xpos_scale_base: int
    scale_embedding: bool
    tied: bool
    dtype: torch.dtype


class TorchscaleDecoder(nn.Module):
    """The decoder under the official names."""

    def __init__(self, config: DecoderArguments):
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.width)
        self.layers = nn.ModuleList([_Layer(config) for _ in range(config.num_layers)])
        self.layer_norm = nn.LayerNorm(config.width, eps=config.norm_eps)
        self.output_projection = nn.Linear(config.width, config.vocab_size, bias=False)
        self.all_tied_weights_keys = {"output_projection.weight": "embed_tokens.weight"} if config.tied else {}

    def get_output_embeddings(self) -> nn.Module:
        """Return the output head, as transformers' models do."""
        return self.output_projection

    def get_decoder(self) -> Callable[..., SimpleNamespace]:
        """Return what computes the states that the head reads, as transformers' models do."""
        return self._decode

    def _decode(self, input_ids: Tensor, use_cache: bool = False) -> SimpleNamespace:
        hidden = self.embed_tokens(input_ids)  # [B, L, width]
        if self.config.scale_embedding:
            hidden = hidden * math.sqrt(self.config.width)
        for layer in self.layers:
            hidden = layer(hidden)
        return SimpleNamespace(last_hidden_state=self.layer_norm(hidden))


class _Layer(nn.Module):
    def __init__(self, config: DecoderArguments):
        super().__init__()
        self.self_attn = _Attention(config)
        self.self_attn_layer_norm = nn.LayerNorm(config.width, eps=config.norm_eps)
        self.ffn = _FeedForward(config)
        self.final_layer_norm = nn.LayerNorm(config.width, eps=config.norm_eps)

    def forward(self, hidden: Tensor) -> Tensor:
        hidden = hidden + self.self_attn(self.self_attn_layer_norm(hidden))
        return hidden + self.ffn(self.final_layer_norm(hidden))


class _Attention(nn.Module):
    def __init__(self, config: DecoderArguments):
        super().__init__()
        self.config = config
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (
            nn.Linear(config.width, config.width) for _ in range(4)
        )
        if config.sub_norm:
            self.inner_attn_ln = nn.LayerNorm(config.width, eps=config.norm_eps)

    def forward(self, hidden: Tensor) -> Tensor:
        query, key, value = (
            project(hidden).unflatten(-1, (self.config.num_heads, -1)).transpose(1, 2)
            for project in (self.q_proj, self.k_proj, self.v_proj)
        )  # [B, H, L, D]
        if self.config.xpos:
            query, key = _xpos(query, self.config.xpos_scale_base), _xpos(key, -self.config.xpos_scale_base)
        heads: Tensor = dilated_attention(query, key, value, self.config.pattern)
        heads = heads.transpose(1, 2).flatten(2)
        return self.out_proj(self.inner_attn_ln(heads) if self.config.sub_norm else heads)


class _FeedForward(nn.Module):
    def __init__(self, config: DecoderArguments):
        super().__init__()
        self.config = config
        self.fc1 = nn.Linear(config.width, config.inner_width)
        self.fc2 = nn.Linear(config.inner_width, config.width)
        if config.sub_norm:
            self.ffn_layernorm = nn.LayerNorm(config.inner_width, eps=config.norm_eps)

    def forward(self, hidden: Tensor) -> Tensor:
        inner = ACTIVATIONS[self.config.activation](self.fc1(hidden))
        return self.fc2(self.ffn_layernorm(inner) if self.config.sub_norm else inner)


def xpos_scale(head_dim: int) -> Tensor:
    """Return what each pair of neighbouring dimensions fades by over ``xpos_scale_base`` tokens, ``[D/2]`` float32."""
    return (torch.arange(0, head_dim, 2) + 0.4 * head_dim) / (1.4 * head_dim)


def _xpos(x: Tensor, scale_base: int) -> Tensor:
    """Rotate neighbouring dimensions of ``x [B, H, L, D]`` by position; they fade with it, or grow if the base is < 0."""
    length, head_dim = x.shape[-2:]
    positions = torch.arange(length, dtype=torch.float)
    frequencies = 10000.0 ** -(torch.arange(0, head_dim, 2) / head_dim)
    angles = positions[:, None] * frequencies  # [L, D/2]
    factors = xpos_scale(head_dim) ** ((positions - length // 2) / scale_base)[:, None]
    cos, sin = (angles.cos() * factors).to(x.dtype), (angles.sin() * factors).to(x.dtype)
    even, odd = x[..., ::2], x[..., 1::2]
    return torch.stack((even * cos - odd * sin, odd * cos + even * sin), dim=-1).flatten(-2)
