"""Recall at k on items as a Hugging Face `evaluate` module; a thin layer over `sidtune.metrics.ranking`."""

import evaluate

from sidtune.metrics.hf import module_info, score_ids

DESCRIPTION = """Recall at k on items: the mean share of a request's relevant items among the first k."""


class SidRecall(evaluate.Metric):
    def _info(self):
        return module_info(DESCRIPTION)

    def _compute(self, predictions, references, k=10, empty="refuse"):
        return score_ids("recall", predictions, references, k, empty)
