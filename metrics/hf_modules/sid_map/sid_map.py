"""MAP at k on items as a Hugging Face `evaluate` module; a thin layer over `sidtune.metrics.ranking`."""

import evaluate

from sidtune.metrics.hf import module_info, score_ids

DESCRIPTION = """MAP at k on items: the mean over requests of (sum of the precision at each hit among the
first k) / min(k, number of relevant items)."""


class SidMap(evaluate.Metric):
    def _info(self):
        return module_info(DESCRIPTION)

    def _compute(self, predictions, references, k=10, empty="refuse"):
        return score_ids("map", predictions, references, k, empty)
