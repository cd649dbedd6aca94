from .dilated_attention import dilated_attention
from .dilation_pattern import DilationPattern


__all__ = ["DilationPattern", "dilated_attention"]
