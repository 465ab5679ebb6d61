"""MRR at k on items as a Hugging Face `evaluate` module; a thin layer over `sidtune.metrics.ranking`."""

import evaluate

from sidtune.metrics.hf import module_info, score_ids

DESCRIPTION = (
    """MRR at k on items: the mean of 1 / rank of the first relevant item, 0 where it is not among the first k."""
)


class SidMrr(evaluate.Metric):
    def _info(self):
        return module_info(DESCRIPTION)

    def _compute(self, predictions, references, k=10, empty="refuse"):
        return score_ids("mrr", predictions, references, k, empty)
