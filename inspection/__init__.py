"""See what a pattern reaches and costs: `longnet-inspect`."""

from .costs import Costs, ModelShape, measure_costs
from .coverage import Coverage, measure_coverage
from .suggestion import suggest_pattern


__all__ = ["Costs", "Coverage", "ModelShape", "measure_costs", "measure_coverage", "suggest_pattern"]
