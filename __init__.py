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
    "ShopWorld": "sidtune.data_builders.shop_world",
    "Tables": "sidtune.data_builders.schema",
    "load_folder": "sidtune.data_builders.store",
    "History": "sidtune.data_builders.history",
    "Sanitizer": "sidtune.data_builders.sanitizer",
    "Serializer": "sidtune.data_builders.serializer",
    "ResidualKMeans": "sidtune.tokenizers.residual_kmeans",
    "SemanticIds": "sidtune.tokenizers.semantic_ids",
    "QueryCoder": "sidtune.tokenizers.query_codes",
    "query_item_recall": "sidtune.tokenizers.query_recall",
    "sid_quality": "sidtune.tokenizers.quality",
    "compare_collisions": "sidtune.tokenizers.collision_cost",
    "extend_catalogue": "sidtune.tokenizers.living_catalogue",
    "Vocabulary": "sidtune.tokenizers.vocabulary",
    "extend_vocabulary": "sidtune.tokenizers.vocabulary",
    "set_trainable": "sidtune.tokenizers.row_training",
    "load_model": "sidtune.tokenizers.row_saving",
    "PostRankForCausalLM": "sidtune.models.post_rank",
    "PostRankConfig": "sidtune.models.post_rank_config",
    "PostRankProcessor": "sidtune.models.post_rank_processor",
    "PostRanker": "sidtune.models.post_ranker",
    "FieldSpec": "sidtune.models.post_rank_config",
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
    "SidRetriever": "sidtune.decoding.retriever",
    "SearchRequest": "sidtune.decoding.search_request",
    "PastTurn": "sidtune.decoding.search_request",
    "evaluate_ranking": "sidtune.metrics.ranking",
    "paired_bootstrap": "sidtune.metrics.bootstrap",
    "load_metric": "sidtune.metrics.hf",
    "SidSFTTrainer": "sidtune.trainers.sft",
    "run_stages": "sidtune.trainers.stages",
    "DebiasedGRPOTrainer": "sidtune.trainers.grpo",
    "DebiasedGRPOConfig": "sidtune.trainers.grpo_config",
    "SidCatalogue": "sidtune.trainers.grpo_rewards",
    "build_rewards": "sidtune.trainers.rewards",
    "group_logps": "sidtune.trainers.group_logps",
}

__all__ = ["__version__", *_PUBLIC]


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        return getattr(importlib.import_module(_PUBLIC[name]), name)
    raise AttributeError(f"module 'sidtune' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
