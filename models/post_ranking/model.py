"""A language model that reads soft tokens of users and items and answers with an order: LLM4PR (arXiv 2411.01178).

`PostRankForCausalLM` holds any causal language model of transformers and two adapters, `qia_user` and `qia_item` (candidates and
history share the latter), whose outputs stand at placeholders of the prompt (`models/soft_prompt`).

The loss is in `losses.py`. How LoRA joins (layout A: one PEFT adapter; layout B: LoRA inside, for ZeRO-3) and what is saved:
`files.py`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    GenerationConfig,
    LogitsProcessorList,
    PreTrainedModel,
)

from sidtune.core.errors import ConfigError, DataError, nearest
from sidtune.models.post_ranking.adapter import MLPAdapter, build_adapter
from sidtune.models.post_ranking.config import PostRankConfig
from sidtune.models.post_ranking.files import forget_layout, load_post_rank, push_post_rank, save_adapters
from sidtune.models.post_ranking.losses import IGNORE, PostRankOutput, answer_loss
from sidtune.models.post_ranking.permutation import (
    PermutationLogitsProcessor,
    RankOutput,
    check_counts,
    parse_orders,
    single_forward_order,
)
from sidtune.models.soft_prompt.soft_prompt import check_left_padded, generate, look_up, put, run, takes

METHODS = ("greedy", "beam", "single_forward", "unconstrained")


class PostRankForCausalLM(PreTrainedModel):
    """See the module's text.

    Args:
        config: the configuration.
        language_model: a causal language model to use as is; None builds an untrained one from `config.text_config`.
    """

    config_class = PostRankConfig
    base_model_prefix = ""
    accepts_loss_kwargs = False
    supports_gradient_checkpointing = True
    _supports_sdpa = _supports_flash_attn = _supports_flex_attn = True
    _keep_in_fp32_modules_strict = ["qia_user", "qia_item"]

    def __init__(self, config: PostRankConfig, language_model: PreTrainedModel | None = None) -> None:
        super().__init__(config)
        given = language_model is not None
        self.language_model = language_model if given else AutoModelForCausalLM.from_config(config.text_config)
        if given:
            for part in (*language_model.modules(), *language_model.parameters()):
                part._is_hf_initialized = True
        width = self.language_model.get_input_embeddings().weight.shape[-1]
        for side in ("user", "item"):
            fields = config.side_fields(side)
            adapter = build_adapter(config.adapter, fields, config.d_q, config.d_h, width) if fields else None
            setattr(self, f"qia_{side}", adapter)
        self.post_init()

    @classmethod
    def from_base(
        cls, base: PreTrainedModel | str | Path, config: PostRankConfig, **options: Any
    ) -> PostRankForCausalLM:
        """New adapters around a trained language model.

        Args:
            base: the model, or its folder or hub id (`options` go to `AutoModelForCausalLM.from_pretrained`).
            config: made for that model, see `processor.build_config`.

        Raises:
            ConfigError: the config was made for a vocabulary of another size. DataError: there is no such model.
        """
        if not isinstance(base, PreTrainedModel):
            config.base_model_name_or_path = str(base)
            try:
                base = AutoModelForCausalLM.from_pretrained(base, **options)
            except Exception as error:  # transformers, safetensors and the hub client each raise their own kinds here
                reason = " ".join(str(error).split())[:300].rstrip(".")
                raise DataError(
                    f"No language model can be read from '{base}' ({type(error).__name__}: {reason}); check the name."
                ) from error
        if base.config.vocab_size != config.text_config.vocab_size:
            raise ConfigError(
                f"The post-ranking config was made for a vocabulary of {config.text_config.vocab_size} tokens, but the language "
                f"model has {base.config.vocab_size}; make the config from this model."
            )
        if config.base_model_name_or_path is None:
            config.base_model_name_or_path = getattr(base.config, "_name_or_path", "") or None
        return cls(config, base)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        # torch's own start values for the adapters; the language model looks after itself.
        if isinstance(module, nn.Linear):
            bound = module.in_features**-0.5
            nn.init.uniform_(module.weight, -bound, bound)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, std=module.embedding_dim**-0.5)
        elif isinstance(module, MLPAdapter):
            nn.init.zeros_(module.hidden_bias)

    def get_input_embeddings(self) -> nn.Module:
        return self.language_model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.language_model.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module | None:
        return self.language_model.get_output_embeddings()

    def adapter_parameters(self) -> Iterator[nn.Parameter]:
        """Parameters of both adapters."""
        for adapter in (self.qia_user, self.qia_item):
            yield from adapter.parameters() if adapter is not None else ()

    def train_adapters_only(self) -> None:
        """Freezes the language model and frees the adapters, for feature adaptation. Gradients still pass through it."""
        self.language_model.requires_grad_(False)
        for parameter in self.adapter_parameters():
            parameter.requires_grad_(True)

    def embed_prompt(
        self,
        input_ids: Tensor,
        query: Tensor | None = None,
        user_fields: dict[str, Tensor] | None = None,
        item_fields: dict[str, Tensor] | None = None,
        item_mask: Tensor | None = None,
    ) -> Tensor:
        """Input embeddings (B, T, d_llm) with soft tokens in the placeholders' places; arguments as in `forward`.

        Raises:
            DataError: placeholders and features that do not match.
        """
        user_slots, item_slots = input_ids == self.config.user_token_id, input_ids == self.config.item_token_id
        slots = user_slots | item_slots
        embedded = look_up(self.language_model, input_ids, slots)
        if item_mask is None:
            item_mask = torch.zeros((len(input_ids), 0), dtype=torch.bool, device=input_ids.device)
        self._check_slots(item_slots, item_mask)
        if query is None:
            query = embedded.new_zeros((len(input_ids), self.config.d_q), dtype=torch.float32)
        # Adapters run even for no rows: under ZeRO-3 and DDP every process must call the same modules.
        rows = user_slots.nonzero()[:, 0]
        embedded = self._fill(embedded, user_slots, self.qia_user, "user", query[rows], user_fields, rows)
        owner = item_mask.nonzero()[:, 0]
        filled = self._fill(embedded, item_slots, self.qia_item, "item", query[owner], item_fields, item_mask)
        return self._with_labels(filled, embedded, input_ids, item_slots) if self.config.label_sum else filled

    def _with_labels(self, filled: Tensor, embedded: Tensor, input_ids: Tensor, item_slots: Tensor) -> Tensor:
        """Adds the embedding of the label before a candidate to the candidate's soft token."""
        labels = torch.as_tensor(self.config.label_token_ids, device=input_ids.device)
        labelled = item_slots[:, 1:] & torch.isin(input_ids[:, :-1], labels)
        before = torch.nn.functional.pad(embedded[:, :-1] * labelled[..., None], (0, 0, 1, 0))
        return filled + before

    def _fill(
        self,
        embedded: Tensor,
        slots: Tensor,
        adapter: nn.Module | None,
        side: str,
        query: Tensor,
        fields: dict[str, Tensor] | None,
        taken: Tensor,
    ) -> Tensor:
        """Soft tokens of one side in row-major order into their slots."""
        if adapter is None:
            if len(query):
                raise DataError(
                    f"The prompt has {side} placeholders, but the model has no {side} fields; use another prompt."
                )
            return embedded
        specs = self.config.side_fields(side)
        if fields is None and len(query):
            raise DataError(f"The prompt has {side} placeholders, but no {side}_fields were given; pass them.")
        if fields is None:
            given = {spec.name: query.new_zeros((0, spec.dim)) for spec in specs}
        else:
            given = {spec.name: fields[spec.name][taken] for spec in specs if spec.name in fields}
        return put(embedded, slots, adapter(query, given))

    def _check_slots(self, item_slots: Tensor, item_mask: Tensor) -> None:
        wrong = (item_slots.sum(dim=1) != item_mask.sum(dim=1)).nonzero()[:, 0]
        if len(wrong):
            row = int(wrong[0])
            raise DataError(
                f"Row {row} of the batch has {int(item_slots[row].sum())} item placeholders but {int(item_mask[row].sum())} items; "
                "give one item per placeholder, in the order of the prompt."
            )

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        query: Tensor | None = None,
        user_fields: dict[str, Tensor] | None = None,
        item_fields: dict[str, Tensor] | None = None,
        item_mask: Tensor | None = None,
        task_id: Tensor | None = None,
        **options: Any,
    ) -> PostRankOutput:
        """Logits, and the loss where labels are given.

        In training, the head is applied only where some row of the batch has an answer (`logits_to_keep` of the language
        model): answers are a few tokens of a prompt, a vocabulary is large. `logits` are then (B, places, V) of those places,
        rising. Batches padded on the left have the fewest.

        Args:
            input_ids: (B, T) with placeholder ids; padded on either side.
            attention_mask: (B, T), default all ones.
            labels: (B, T), -100 outside of answers.
            query: (B, d_q), zeros where there is none; default all zeros.
            user_fields: name -> (B, dim). item_fields: name -> (B, n, dim), in the order of the row's item placeholders
                (history, then candidates in our templates). NaN or a negative code means missing.
            item_mask: (B, n) which of them are real; their number must be that of the row's placeholders.
            task_id: (B,), see `answer_loss`.
            options: passed to the language model.

        Raises:
            DataError: placeholders and features that do not match, or rows without any known feature.
        """
        embedded = self.embed_prompt(input_ids, query, user_fields, item_fields, item_mask)
        if labels is None:
            return PostRankOutput(logits=run(self.language_model, embedded, attention_mask, **options).logits)
        if self.training and takes(self.language_model, "logits_to_keep"):
            places = (labels[:, 1:] != IGNORE).any(dim=0).nonzero()[:, 0]
            options["logits_to_keep"], targets = places, labels[:, places + 1]
            logits = said = run(self.language_model, embedded, attention_mask, **options).logits
        else:
            logits = run(self.language_model, embedded, attention_mask, **options).logits
            said, targets = logits[:, :-1], labels[:, 1:]
        loss, main, aux = answer_loss(said, targets, task_id, *self._loss_options)
        return PostRankOutput(loss=loss, logits=logits, main_loss=main.detach(), aux_loss=aux.detach())

    @property
    def _loss_options(self) -> tuple[float, Sequence[int] | None]:
        config = self.config
        return config.aux_weight, config.label_token_ids if config.main_loss == "permutation" else None

    @torch.no_grad()
    def generate(self, input_ids: Tensor, attention_mask: Tensor | None = None, **options: Any) -> Any:
        """Generated tokens only, (B, new): `generate` of the language model behind left-padded prompts.

        `query`, `user_fields`, `item_fields` and `item_mask` are those of `forward`; other options go to the language model.
        """
        features = {key: options.pop(key, None) for key in ("query", "user_fields", "item_fields", "item_mask")}
        options.pop("task_id", None)
        return generate(self.language_model, self.embed_prompt(input_ids, **features), attention_mask, **options)

    @torch.no_grad()
    def rank(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        *,
        counts: Tensor,
        method: str = "greedy",
        num_beams: int = 4,
        **features: Any,
    ) -> RankOutput:
        """Orders of the candidates of each prompt.

        Args:
            input_ids, attention_mask: left-padded prompts of the main task.
            counts: (B,) candidates of each, at most as many as labels.
            method: `greedy` or `beam` (always permutations), `single_forward` (one pass, by first-step label logits), or
                `unconstrained` (greedy over the whole vocabulary, then repaired).
            num_beams: beams of `beam`.
            features: `query`, `user_fields`, `item_fields`, `item_mask` of `forward`.

        Raises:
            ConfigError: an unknown method, or too many candidates. DataError: as `forward`.
        """
        if method not in METHODS:
            raise ConfigError(f"There is no way to rank called '{method}': {nearest(method, METHODS)}")
        counts = counts.to(input_ids.device)
        check_counts(counts, len(self.config.label_token_ids))
        if method == "single_forward":
            return self._rank_once(input_ids, attention_mask, counts, features)
        labels, end = self.config.label_token_ids, self.config.end_token_id
        longest = int(counts.max())
        free = method == "unconstrained"
        # Under the constraint the last label is known without asking.
        steps = longest + 1 if free else longest - 1
        scores = None
        tokens = input_ids.new_zeros((len(input_ids), 0))
        if steps:
            settings = self._settings(steps, num_beams if method == "beam" else 1)
            processor = PermutationLogitsProcessor(labels, counts, end, renormalize=not free)
            found = self.generate(
                input_ids, attention_mask, generation_config=settings,
                logits_processor=LogitsProcessorList([] if free else [processor]), **features,
            )  # fmt: skip
            tokens, scores = found.sequences, found.get("sequences_scores")
        order = parse_orders(tokens, labels, counts, end)
        if free:
            return order
        zero = torch.zeros_like(counts)
        scores = zero.float() if scores is None and method == "beam" else scores
        return RankOutput(order.order, zero, zero, zero, scores)

    def _rank_once(
        self, input_ids: Tensor, mask: Tensor | None, counts: Tensor, features: dict[str, Any]
    ) -> RankOutput:
        mask = torch.ones_like(input_ids) if mask is None else mask
        check_left_padded(mask)
        embedded = self.embed_prompt(input_ids, **features)
        last = {"logits_to_keep": 1} if takes(self.language_model, "logits_to_keep") else {}
        logits = run(self.language_model, embedded, mask, **last).logits[:, -1]
        return single_forward_order(logits, self.config.label_token_ids, counts)

    def _settings(self, steps: int, beams: int) -> GenerationConfig:
        end = self.config.end_token_id
        beam = {"length_penalty": 0.0, "early_stopping": False, "output_scores": True} if beams > 1 else {}
        # Everything a published generation config may set to sample or to penalise is set back.
        return GenerationConfig(
            do_sample=False, num_beams=beams, max_new_tokens=steps, eos_token_id=end, pad_token_id=end,
            repetition_penalty=1.0, no_repeat_ngram_size=0, return_dict_in_generate=True, **beam,
        )  # fmt: skip

    def merge(self) -> PostRankForCausalLM:
        """Layout B: merges the LoRA of the language model into its weights, in place; nothing to do without LoRA."""
        if hasattr(self.language_model, "merge_and_unload"):
            self.language_model = self.language_model.merge_and_unload()
        return self

    def save_pretrained(self, save_directory: str | Path, **options: Any) -> None:
        """Saves the whole model, or in layout B only LoRA and adapters, see `files.py`."""
        if hasattr(self.language_model, "peft_config"):
            save_adapters(self, save_directory, state_dict=options.get("state_dict"))
        else:
            forget_layout(save_directory)
            super().save_pretrained(save_directory, **options)

    def push_to_hub(self, repo_id: str, processor: Any = None, **options: Any) -> str:
        """Uploads what `save_post_rank` writes; see `push_post_rank`."""
        return push_post_rank(self, repo_id, processor, **options)

    @classmethod
    def from_pretrained(cls, folder_or_repo: str | Path, *args: Any, **options: Any) -> Any:
        """Loads what `save_pretrained` or `save_post_rank` wrote, whichever layout; options as of `load_post_rank`."""
        return load_post_rank(cls, folder_or_repo, **options)

    @classmethod
    def load_whole(cls, folder: str | Path, **options: Any) -> PostRankForCausalLM:
        """Loads a folder that holds all weights."""
        return super().from_pretrained(folder, **options)


AutoModel.register(PostRankConfig, PostRankForCausalLM, exist_ok=True)
AutoModelForCausalLM.register(PostRankConfig, PostRankForCausalLM, exist_ok=True)
