"""What attention costs by length, against dense attention: FLOPs of a forward pass, bytes of the KV cache."""

from collections.abc import Sequence
from dataclasses import dataclass

from modeling_longnet import DilationPattern, LongNetConfig


@dataclass(frozen=True)
class ModelShape:
    """What costs depend on beside the pattern.

    Args:
        num_heads, num_kv_heads: query and KV heads of a layer.
        head_dim: width of a head.
        bytes_per_value: of a cached number.
        layers: the pattern of each layer.
    """

    num_heads: int
    num_kv_heads: int
    head_dim: int
    bytes_per_value: int
    layers: tuple[DilationPattern, ...]

    @classmethod
    def of(cls, config: LongNetConfig) -> "ModelShape":
        """Read the shape of a model from its configuration; weights of unknown dtype count two bytes."""
        return cls(
            num_heads=config.num_attention_heads,
            num_kv_heads=config.num_key_value_heads,
            head_dim=config.head_dim,
            bytes_per_value=getattr(config.dtype, "itemsize", 2),
            layers=tuple(config.layer_pattern(i) for i in range(config.num_hidden_layers)),
        )

    @property
    def bytes_per_entry(self) -> int:
        """Bytes of the keys and values of one position, all KV heads of a layer."""
        return 2 * self.num_kv_heads * self.head_dim * self.bytes_per_value


@dataclass(frozen=True)
class Costs:
    """Costs of all layers for one document.

    Args:
        length: tokens.
        flops, dense_flops: floating-point operations of the attention in one forward pass, two to a multiply-add.
        kv_bytes, dense_kv_bytes: keys and values held after the last token.
    """

    length: int
    flops: int
    dense_flops: int
    kv_bytes: int
    dense_kv_bytes: int


def measure_costs(shape: ModelShape, lengths: Sequence[int]) -> list[Costs]:
    """Count attention FLOPs and cache bytes exactly, by the patterns' own formulas.

    Args:
        shape: of the model.
        lengths: tokens of the document.

    Returns:
        One entry for each length.

    Raises:
        ValueError: if a length is negative, or the head counts do not fit.
    """
    found = []
    for length in lengths:
        dense = DilationPattern((max(length, 1),), (1,))
        flops = dense_flops = entries = 0
        for pattern in shape.layers:
            for counted, weight in ((pattern, 1), (dense, 0)):
                n = counted.attention_flops(length, shape.num_heads, shape.head_dim, num_kv_heads=shape.num_kv_heads)
                flops += weight * n
                dense_flops += (1 - weight) * n
            entries += pattern.cache_entries(length)
        bytes_per_entry = shape.bytes_per_entry
        found.append(
            Costs(length, flops, dense_flops, entries * bytes_per_entry, length * len(shape.layers) * bytes_per_entry)
        )
    return found
