"""Hit rate at k on items as a Hugging Face `evaluate` module; a thin layer over `sidtune.metrics.ranking`."""

import evaluate

from sidtune.metrics.hf import module_info, score_ids

DESCRIPTION = """Hit rate at k on items: the share of requests with at least one relevant item among the first k."""


class SidHr(evaluate.Metric):
    def _info(self):
        return module_info(DESCRIPTION)

    def _compute(self, predictions, references, k=10, empty="refuse"):
        return score_ids("hr", predictions, references, k, empty)
