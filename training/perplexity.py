"""Perplexity by position, as a metric of ``evaluate``: does a model use what stands far back?"""

import math

import datasets
import evaluate
import torch


IGNORED = -100


class PerplexityByPosition(evaluate.Metric):
    """Collect tokens' losses batch by batch; ``compute`` gives the perplexity of stretches of positions.

    Add with ``add_batch(predictions=losses, references=positions)``: two lists of equal lengths per row, each token's
    own loss and the position it stands at, -100 for a token that does not count. Needs no network: the metric is this
    class, not a script of the Hub.

    Args:
        edges: borders of the stretches, ascending; positions from the last on form one stretch more.
    """

    def __init__(self, edges: list[int], **kwargs):
        if sorted(set(edges)) != list(edges) or not edges or edges[0] < 1:
            raise ValueError(f"edges must be positive and ascend, got {list(edges)}")
        self.edges = list(edges)
        super().__init__(keep_in_memory=True, **kwargs)

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description="Perplexity of stretches of positions", citation="",
            inputs_description="losses and positions of tokens",
            features=datasets.Features(
                {
                    "predictions": datasets.Sequence(datasets.Value("float64")),
                    "references": datasets.Sequence(datasets.Value("int64")),
                }
            ),
        )  # fmt: skip

    def _compute(self, predictions: list[list[float]], references: list[list[int]]) -> dict[str, float]:
        losses = torch.tensor([x for row in predictions for x in row], dtype=torch.float64)
        positions = torch.tensor([p for row in references for p in row])
        losses, positions = losses[positions != IGNORED], positions[positions != IGNORED]
        stretch = torch.bucketize(positions, torch.tensor(self.edges), right=True)
        result = {"perplexity": math.exp(losses.mean()) if len(losses) else math.nan}
        starts = [0, *self.edges]
        for i, start in enumerate(starts):
            end = self.edges[i] if i < len(self.edges) else None
            found = losses[stretch == i]
            if len(found):
                result[f"perplexity_{start}_{'' if end is None else end}"] = math.exp(found.mean())
        return result
