"""sidtune: fine-tune an LLM to search, recommend and re-rank a catalogue with semantic IDs.

The names below are the public API. They are imported on first use, so `import sidtune` is instant and loads no torch.
"""

from typing import TYPE_CHECKING

from sidtune.core.lazy import lazy_names

__version__ = "0.1.0"

if TYPE_CHECKING:
    from sidtune.core.errors import ConfigError as ConfigError
    from sidtune.core.errors import DataError as DataError
    from sidtune.core.errors import Problem as Problem
    from sidtune.core.errors import SidtuneError as SidtuneError
    from sidtune.data_builders.impressions.build import impressions_of as impressions_of
    from sidtune.data_builders.impressions.features import Feature as Feature
    from sidtune.data_builders.impressions.table import Impressions as Impressions
    from sidtune.data_builders.post_ranking.schema import PostRankBatch as PostRankBatch
    from sidtune.data_builders.post_ranking.schema import PostRankRequest as PostRankRequest
    from sidtune.data_builders.post_ranking.schema import PostRankTable as PostRankTable
    from sidtune.data_builders.prompts.sanitizer import Sanitizer as Sanitizer
    from sidtune.data_builders.prompts.serializer import Serializer as Serializer
    from sidtune.data_builders.shop_world.config import ShopWorldConfig as ShopWorldConfig
    from sidtune.data_builders.shop_world.dials import Phenomena as Phenomena
    from sidtune.data_builders.shop_world.market import Market as Market
    from sidtune.data_builders.shop_world.market import Served as Served
    from sidtune.data_builders.shop_world.world import ShopWorld as ShopWorld
    from sidtune.data_builders.tables.history import History as History
    from sidtune.data_builders.tables.history import TimeCut as TimeCut
    from sidtune.data_builders.tables.schema import Tables as Tables
    from sidtune.data_builders.tables.store import DataFolder as DataFolder
    from sidtune.data_builders.tables.store import load_folder as load_folder
    from sidtune.decoding.beam_search import sid_beam_search as sid_beam_search
    from sidtune.decoding.engine.generation_settings import SidGenerationConfig as SidGenerationConfig
    from sidtune.decoding.filters import ItemFilter as ItemFilter
    from sidtune.decoding.filters import RequestFilter as RequestFilter
    from sidtune.decoding.items import BeamOutput as BeamOutput
    from sidtune.decoding.items import LeafItems as LeafItems
    from sidtune.decoding.items import rank_items as rank_items
    from sidtune.decoding.logits_processor import SidLogitsProcessor as SidLogitsProcessor
    from sidtune.decoding.reasoning import ReasonedBeams as ReasonedBeams
    from sidtune.decoding.reasoning import reason_then_search as reason_then_search
    from sidtune.decoding.retrieval.catalogue import Catalogue as Catalogue
    from sidtune.decoding.retrieval.evaluator import Evaluator as Evaluator
    from sidtune.decoding.retrieval.prompter import Prompter as Prompter
    from sidtune.decoding.retrieval.prompter import PromptSettings as PromptSettings
    from sidtune.decoding.retrieval.retriever import Hit as Hit
    from sidtune.decoding.retrieval.retriever import SidRetriever as SidRetriever
    from sidtune.decoding.retrieval.search_request import PastTurn as PastTurn
    from sidtune.decoding.retrieval.search_request import SearchRequest as SearchRequest
    from sidtune.decoding.sampling import sid_sample as sid_sample
    from sidtune.decoding.trie import SidTrie as SidTrie
    from sidtune.metrics.hf import load_metric as load_metric
    from sidtune.metrics.ranking import RankingResult as RankingResult
    from sidtune.metrics.ranking import Relevance as Relevance
    from sidtune.metrics.ranking import evaluate_ranking as evaluate_ranking
    from sidtune.metrics.statistics.bootstrap import PairedResult as PairedResult
    from sidtune.metrics.statistics.bootstrap import paired_bootstrap as paired_bootstrap
    from sidtune.models.post_ranking.config import FieldSpec as FieldSpec
    from sidtune.models.post_ranking.config import PostRankConfig as PostRankConfig
    from sidtune.models.post_ranking.losses import PostRankOutput as PostRankOutput
    from sidtune.models.post_ranking.model import PostRankForCausalLM as PostRankForCausalLM
    from sidtune.models.post_ranking.permutation import RankOutput as RankOutput
    from sidtune.models.post_ranking.processor import PostRankProcessor as PostRankProcessor
    from sidtune.models.post_ranking.ranker import PostRanker as PostRanker
    from sidtune.models.soft_prompt.soft_prompt import SoftPrompt as SoftPrompt
    from sidtune.tokenizers.encoders.base import Encoder as Encoder
    from sidtune.tokenizers.encoders.base import load_encoder as load_encoder
    from sidtune.tokenizers.encoders.base import make_encoder as make_encoder
    from sidtune.tokenizers.quantizers.base import Quantizer as Quantizer
    from sidtune.tokenizers.quantizers.base import load_quantizer as load_quantizer
    from sidtune.tokenizers.quantizers.base import make_quantizer as make_quantizer
    from sidtune.tokenizers.quantizers.residual_kmeans import ResidualKMeans as ResidualKMeans
    from sidtune.tokenizers.quantizers.residual_kmeans import ResidualKMeansConfig as ResidualKMeansConfig
    from sidtune.tokenizers.sids.catalogue_updates import extend_catalogue as extend_catalogue
    from sidtune.tokenizers.sids.collision_cost import CollisionCost as CollisionCost
    from sidtune.tokenizers.sids.collision_cost import compare_collisions as compare_collisions
    from sidtune.tokenizers.sids.collisions import CollisionMethod as CollisionMethod
    from sidtune.tokenizers.sids.collisions import make_collisions as make_collisions
    from sidtune.tokenizers.sids.learning import LearnedIds as LearnedIds
    from sidtune.tokenizers.sids.learning import learn_semantic_ids as learn_semantic_ids
    from sidtune.tokenizers.sids.quality import SidQuality as SidQuality
    from sidtune.tokenizers.sids.quality import SidThresholds as SidThresholds
    from sidtune.tokenizers.sids.quality import sid_quality as sid_quality
    from sidtune.tokenizers.sids.query_codes import QueryCoder as QueryCoder
    from sidtune.tokenizers.sids.query_recall import QueryItemRecall as QueryItemRecall
    from sidtune.tokenizers.sids.query_recall import query_item_recall as query_item_recall
    from sidtune.tokenizers.sids.semantic_ids import SemanticIds as SemanticIds
    from sidtune.tokenizers.vocabulary.extension import Vocabulary as Vocabulary
    from sidtune.tokenizers.vocabulary.extension import extend_vocabulary as extend_vocabulary
    from sidtune.tokenizers.vocabulary.saving import load_model as load_model
    from sidtune.tokenizers.vocabulary.saving import merge_and_save as merge_and_save
    from sidtune.tokenizers.vocabulary.saving import save_trained as save_trained
    from sidtune.tokenizers.vocabulary.trainable_tokens import set_trainable as set_trainable
    from sidtune.trainers.common.evaluation import EvaluateItems as EvaluateItems
    from sidtune.trainers.grpo.config import DebiasedGRPOConfig as DebiasedGRPOConfig
    from sidtune.trainers.grpo.logps.group_logps import LogpsOutput as LogpsOutput
    from sidtune.trainers.grpo.logps.group_logps import group_logps as group_logps
    from sidtune.trainers.grpo.rollout_rewards import SidCatalogue as SidCatalogue
    from sidtune.trainers.grpo.trainer import DebiasedGRPOTrainer as DebiasedGRPOTrainer
    from sidtune.trainers.grpo.trl_rewards import as_trl_reward as as_trl_reward
    from sidtune.trainers.rewards.batch import CombinedReward as CombinedReward
    from sidtune.trainers.rewards.batch import build_rewards as build_rewards
    from sidtune.trainers.sft.mixture import StageConfig as StageConfig
    from sidtune.trainers.sft.mixture import TaskMix as TaskMix
    from sidtune.trainers.sft.stages import run_stages as run_stages
    from sidtune.trainers.sft.trainer import SidSFTTrainer as SidSFTTrainer
else:
    __all__, __getattr__, __dir__ = lazy_names(__name__, __file__)
