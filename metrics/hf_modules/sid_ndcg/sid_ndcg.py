"""NDCG at k on items as a Hugging Face `evaluate` module; a thin layer over `sidtune.metrics.ranking`."""

import evaluate

from sidtune.metrics.hf import module_info, score_ids

DESCRIPTION = """NDCG at k on items: discounted cumulative gain of the first k (gain 1, discount 1 / log2(rank + 1))
over that of the ideal ranking."""


class SidNdcg(evaluate.Metric):
    def _info(self):
        return module_info(DESCRIPTION)

    def _compute(self, predictions, references, k=10, empty="refuse"):
        return score_ids("ndcg", predictions, references, k, empty)
