"""sidtune: fine-tune an LLM to search, recommend and re-rank a catalogue with semantic IDs.

The names below are the public API. They are imported on first use, so `import sidtune` is instant and loads no torch.
"""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

_PUBLIC = {
    "SidtuneError": "sidtune.core.errors",
    "ConfigError": "sidtune.core.errors",
    "DataError": "sidtune.core.errors",
    "ShopWorld": "sidtune.data_builders.shop_world.world",
    "Tables": "sidtune.data_builders.tables.schema",
    "load_folder": "sidtune.data_builders.tables.store",
    "History": "sidtune.data_builders.tables.history",
    "Sanitizer": "sidtune.data_builders.prompts.sanitizer",
    "Serializer": "sidtune.data_builders.prompts.serializer",
    "ResidualKMeans": "sidtune.tokenizers.quantizers.residual_kmeans",
    "SemanticIds": "sidtune.tokenizers.sids.semantic_ids",
    "QueryCoder": "sidtune.tokenizers.sids.query_codes",
    "query_item_recall": "sidtune.tokenizers.sids.query_recall",
    "sid_quality": "sidtune.tokenizers.sids.quality",
    "compare_collisions": "sidtune.tokenizers.sids.collision_cost",
    "extend_catalogue": "sidtune.tokenizers.sids.catalogue_updates",
    "Vocabulary": "sidtune.tokenizers.vocabulary.extension",
    "extend_vocabulary": "sidtune.tokenizers.vocabulary.extension",
    "set_trainable": "sidtune.tokenizers.vocabulary.trainable_tokens",
    "load_model": "sidtune.tokenizers.vocabulary.saving",
    "PostRankForCausalLM": "sidtune.models.post_ranking.model",
    "PostRankConfig": "sidtune.models.post_ranking.config",
    "PostRankProcessor": "sidtune.models.post_ranking.processor",
    "PostRanker": "sidtune.models.post_ranking.ranker",
    "FieldSpec": "sidtune.models.post_ranking.config",
    "SidTrie": "sidtune.decoding.trie",
    "sid_beam_search": "sidtune.decoding.beam_search",
    "sid_sample": "sidtune.decoding.sampling",
    "RequestFilter": "sidtune.decoding.filters",
    "ItemFilter": "sidtune.decoding.filters",
    "LeafItems": "sidtune.decoding.items",
    "SidLogitsProcessor": "sidtune.decoding.logits_processor",
    "rank_items": "sidtune.decoding.items",
    "reason_then_search": "sidtune.decoding.reasoning",
    "ReasonedBeams": "sidtune.decoding.reasoning",
    "SidRetriever": "sidtune.decoding.retrieval.retriever",
    "SearchRequest": "sidtune.decoding.retrieval.search_request",
    "PastTurn": "sidtune.decoding.retrieval.search_request",
    "evaluate_ranking": "sidtune.metrics.ranking",
    "paired_bootstrap": "sidtune.metrics.statistics.bootstrap",
    "load_metric": "sidtune.metrics.hf",
    "SidSFTTrainer": "sidtune.trainers.sft.trainer",
    "run_stages": "sidtune.trainers.sft.stages",
    "DebiasedGRPOTrainer": "sidtune.trainers.grpo.trainer",
    "DebiasedGRPOConfig": "sidtune.trainers.grpo.config",
    "SidCatalogue": "sidtune.trainers.grpo.rollout_rewards",
    "build_rewards": "sidtune.trainers.rewards.batch",
    "group_logps": "sidtune.trainers.grpo.logps.group_logps",
}

__all__ = ["__version__", *_PUBLIC]


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        return getattr(importlib.import_module(_PUBLIC[name]), name)
    raise AttributeError(f"module 'sidtune' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
