"""What a TRL user passes works as in TRL: names of models, no args, texts and messages, PEFT, reward functions, item ids."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from datasets import Dataset
from grpo_stand_ins import END, PATHS, SID_TOKENS, catalogue, config, prompts
from peft import LoraConfig
from sft_stand_ins import LEVELS, level_token_ids, tiny_model, tiny_tokenizer
from transformers import TrainingArguments
from trl import GRPOConfig, GRPOTrainer, SFTConfig, SFTTrainer

from sidtune.core.errors import ConfigError, DataError
from sidtune.decoding.trie import SidTrie
from sidtune.trainers.grpo.config import DebiasedGRPOConfig
from sidtune.trainers.grpo.rollout_rewards import SidCatalogue
from sidtune.trainers.grpo.trainer import DebiasedGRPOTrainer
from sidtune.trainers.grpo.trl_rewards import as_trl_reward
from sidtune.trainers.rewards.registry import REWARDS
from sidtune.trainers.sft.trainer import SidSFTTrainer

pytestmark = pytest.mark.medium

PLAIN = {"bf16": False, "use_cpu": True, "report_to": [], "activation_checkpointing": False, "save_strategy": "no"}
PLAIN |= {"max_steps": 2, "per_device_train_batch_size": 8, "disable_tqdm": True, "logging_steps": 1}
TEMPLATE = "{% for m in messages %}{{ m['role'] }} {{ m['content'] }} {% endfor %}"
PAIRS = [{"prompt": f"w{n} w{n + 1}", "completion": f" {LEVELS[0][n % 3]} {LEVELS[1][n % 2]}"} for n in range(16)]
TALKS = [[{"role": "w3", "content": one["prompt"]}, {"role": "w4", "content": one["completion"]}] for one in PAIRS]
DATA = {
    "texts": Dataset.from_list([{"text": one["prompt"] + one["completion"]} for one in PAIRS]),
    "pairs": Dataset.from_list(PAIRS),
    "messages": Dataset.from_list([{"messages": talk} for talk in TALKS]),
    "pairs of messages": Dataset.from_list([{"prompt": talk[:1], "completion": talk[1:]} for talk in TALKS]),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    place = tmp_path_factory.mktemp("model") / "tiny"
    tiny_model().save_pretrained(place)
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(place)
    return str(place)


@pytest.mark.parametrize("kind", DATA)
def test_sft_learns_the_tokens_that_trl_learns(folder, tmp_path, kind):
    """The same loss as stock TRL's trainer from the same data, by the name of a model, with all examples in one batch."""
    losses = []
    for trainer in (SFTTrainer, SidSFTTrainer):
        args = SFTConfig(str(tmp_path), **{**PLAIN, "per_device_train_batch_size": 16, "max_steps": 1})
        made = trainer(folder, args=args, train_dataset=DATA[kind], eval_dataset=DATA[kind])
        made.train()
        losses.append([h["loss"] for h in made.state.log_history if "loss" in h] + [made.evaluate()["eval_loss"]])
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)


def test_sft_without_args_and_with_those_of_transformers(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    made = SidSFTTrainer(model=folder, train_dataset=DATA["pairs"])
    assert made.args.output_dir == "tiny-SFT" and isinstance(made.args, SFTConfig) and made.train_mode == "all"
    options = {k: v for k, v in PLAIN.items() if k != "activation_checkpointing"}
    made = SidSFTTrainer(tiny_model(), TrainingArguments("x", **options), DATA["pairs"], None, tiny_tokenizer())
    made.train()
    assert made.state.global_step == 2 and made.args.max_length == SFTConfig(str(tmp_path), **PLAIN).max_length


@pytest.mark.parametrize("packing", [False, True])
def test_sft_sees_a_peft_config(folder, tmp_path, packing):
    """Only the factors train and decay, and what is measured is measured through the adapter."""
    args = SFTConfig(str(tmp_path), packing=packing, max_length=64, **PLAIN)
    lora = LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM")
    made = SidSFTTrainer(folder, args, train_dataset=DATA["pairs"], peft_config=lora, level_token_ids=level_token_ids())
    trained = [n for n, p in made.model.named_parameters() if p.requires_grad]
    decayed = made.get_decay_parameter_names(made.model)
    assert made.train_mode == "lora" and all("lora_" in n for n in trained)
    assert decayed and all("lora_" in n for n in decayed)
    made.train()
    assert "sid_accuracy_2" in made.state.log_history[0]


def test_sft_cuts_no_text_and_says_what_it_cannot_read(folder, tmp_path):
    with pytest.raises(ConfigError, match="longer than max_length=4"):
        SidSFTTrainer(folder, SFTConfig(str(tmp_path), max_length=4, **PLAIN), DATA["pairs"])
    with pytest.raises(DataError, match="training data must be a datasets.Dataset, got list"):
        SidSFTTrainer(folder, SFTConfig(str(tmp_path), **PLAIN), PAIRS)


def known_items() -> SidCatalogue:
    return catalogue(leaf_of_item={f"item {n}": n for n in range(9)})


def test_grpo_by_item_ids_one_function_and_a_plain_config(folder, tmp_path):
    """Targets by item id reward as their leaves do; a function of TRL's kind rewards beside them."""
    leaves = prompts(8)
    items = leaves.remove_columns(["target_leaves", "prompt_ids"])
    items = items.add_column("target_items", [[f"item {leaf}" for leaf in row] for row in leaves["target_leaves"][:]])
    seen = []

    def shorter(completions, **columns):
        return [1.0 / (1 + len(text)) for text in completions]

    for data, rewards in ((leaves, {"hit": 1.0}), (items, [{"hit": 1.0}, shorter])):
        args = GRPOConfig(str(tmp_path), num_generations=4, beta=0.0, loss_type="bnpo", **PLAIN)
        made = DebiasedGRPOTrainer(folder, rewards, args, train_dataset=data, catalogue=known_items())
        made.train()
        assert (made.args.preset, made.args.loss_type, made.args.rollout) == ("none", "bnpo", "sample")
        assert type(args) is GRPOConfig and args.reward_weights is None
        seen.append([h["rewards/hit/mean"] for h in made.state.log_history if "reward" in h][0])
    assert seen[0] == seen[1] and "rewards/shorter/mean" in made.state.log_history[0]


@pytest.mark.parametrize("positional", [True, False])
def test_grpo_with_nothing_but_a_reward_function(folder, tmp_path, monkeypatch, positional):
    monkeypatch.chdir(tmp_path)

    def first_code(completion_ids, **columns):
        return [float(ids[0] == SID_TOKENS[0]) for ids in completion_ids]

    rewards = {"rewards" if positional else "reward_funcs": first_code}
    data = prompts(8).select_columns(["prompt"])
    made = DebiasedGRPOTrainer(folder, train_dataset=data, catalogue=catalogue(), **rewards)
    assert isinstance(made.args, DebiasedGRPOConfig) and made.args.preset == "strict"
    assert made.args.output_dir == "tiny-GRPO" and made.reward_func_names == ["first_code"]
    lora = LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM")
    made = DebiasedGRPOTrainer(
        folder, args=config(tmp_path), train_dataset=data, catalogue=catalogue(), peft_config=lora, **rewards
    )
    made.train()
    assert made.train_mode == "lora" and made.state.global_step == 2


@pytest.mark.parametrize(
    ("columns", "words"),
    [
        ({"target_leave": [[1]] * 8}, "column 'target_leave', which no reward reads: did you mean 'target_leaves'"),
        ({"target_leaves": [[1]] * 8, "target_gain": [[1.0]] * 8}, "did you mean 'target_gains'"),
        ({"answer": [[1]] * 8}, "'hit' compares with targets, but the data has neither target_leaves nor target_items"),
        ({"target_items": ["item 1"] * 7 + ["item 99"]}, "'item 99' .1 such items., which has no semantic ID"),
    ],
)
def test_a_misspelt_target_is_refused_at_once(tmp_path, columns, words):
    data = Dataset.from_dict({"prompt": ["w1"] * 8, **columns})
    with pytest.raises(DataError, match=words):
        DebiasedGRPOTrainer(
            tiny_model(), {"hit": 1.0}, config(tmp_path), data, None, tiny_tokenizer(), catalogue=known_items()
        )
    completion = {"prompts": ["w1"], "completions": [""], "completion_ids": [[1]]}
    with pytest.raises(DataError, match=words):
        first = {name: [values[-1]] for name, values in columns.items()}
        as_trl_reward("hit", known_items())(**completion, **first)


def test_grpo_says_what_is_missing(tmp_path):
    data = prompts(8)
    with pytest.raises(ConfigError, match="Rollouts need the catalogue, got None"):
        DebiasedGRPOTrainer(tiny_model(), {"hit": 1.0}, config(tmp_path), data)
    with pytest.raises(ConfigError, match="were given twice"):
        rewards = [{"hit": 1.0}, {"hit": 2.0}]
        DebiasedGRPOTrainer(tiny_model(), rewards, config(tmp_path), data, catalogue=catalogue())


def test_every_reward_scores_in_a_stock_trainer(folder, tmp_path):
    known = catalogue(popularity_of_leaf=np.arange(9.0))
    data = Dataset.from_dict({"prompt": [f"w{n}" for n in range(8)], "target_leaves": [[n % 9] for n in range(8)]})
    names = sorted(REWARDS)
    functions = [as_trl_reward(name, known, end_token_id=END) for name in names]
    args = GRPOConfig(str(tmp_path), num_generations=4, max_completion_length=4, **PLAIN)
    made = GRPOTrainer(folder, functions, args, data)
    made.train()
    assert {f"rewards/{name}/mean" for name in names} <= made.state.log_history[0].keys()


def test_a_trl_reward_is_that_of_the_list_of_one_place():
    """Against a plain loop: the SID stands at the start, or behind the first end mark; what is no item is worth nothing."""
    some = catalogue(PATHS[[0, 1, 4]])
    a, b = SID_TOKENS[:3].tolist(), SID_TOKENS[3:].tolist()
    answers = [[a[0], b[0], 1], [a[0], b[1]], [a[1], b[1], 1], [a[2], b[2], 1], [a[0]], [], [9, a[0], b[0]]]
    target = [[0]] * 7
    hit = as_trl_reward("hit", some)
    columns = {"prompts": ["p"] * 7, "completions": [""] * 7, "target_leaves": target}
    assert hit(completion_ids=answers, **columns) == [1, 0, 0, 0, 0, 0, 0] and hit.__name__ == "hit"
    prefix = as_trl_reward("prefix_match", some, weights=[3.0, 1.0])
    assert prefix(completion_ids=answers, **columns) == [1, 0.75, 0, 0, 0, 0, 0]
    both = as_trl_reward({"hit": 1.0, "validity": 0.5}, some)
    assert both(completion_ids=answers, **columns) == [1.5, 0.5, 0.5, 0, 0, 0, 0]
    reasoned = [[9, 9, END, *ids] for ids in answers[:6]] + [[9, 9, *answers[0]]]
    behind = as_trl_reward({"hit": 1.0, "format": 0.5}, some, end_token_id=END)
    assert behind(completion_ids=reasoned, **columns) == [1.5, 0.5, 0.5, 0, 0, 0, 0]
    assert hit(completion_ids=answers, **{**columns, "target_leaves": [[0]] * 6 + [[]]})[-1] is None


def test_the_table_of_items_is_that_of_the_trie():
    from sidtune.tokenizers.sids.semantic_ids import SemanticIds
    from sidtune.tokenizers.vocabulary.extension import Vocabulary

    codes = np.array([[2, 1], [0, 0], [2, 1], [1, 2]], np.int32)
    sids = SemanticIds(["d", "a", "b", "c"], codes, (3, 3))
    vocabulary = Vocabulary((3, 3), SID_TOKENS, int(SID_TOKENS[0]), int(SID_TOKENS[-1]) + 1)
    found = SidCatalogue.from_semantic_ids(sids, vocabulary)
    trie = SidTrie.from_semantic_ids(sids)
    for item, code in zip(sids.item_ids, codes, strict=True):
        assert trie.leaf_codes(torch.tensor([found.leaf_of_item[item]])).tolist() == [code.tolist()]
    assert found.leaves_of(["d", None, ["a", "b"]]) == [[2], [], [0, 2]]


def test_targets_are_read_and_checked_in_every_data_set(tmp_path):
    data = prompts(8)
    wrong = data.rename_column("target_leaves", "target_leafs")
    others = (tiny_model(), "hit", config(tmp_path, per_device_eval_batch_size=8), data)
    for evals in (wrong, {"a": data, "b": wrong}):
        with pytest.raises(DataError, match="did you mean 'target_leaves'"):
            DebiasedGRPOTrainer(*others, evals, tiny_tokenizer(), catalogue=catalogue())
    made = DebiasedGRPOTrainer(*others, {"a": data, "b": data}, tiny_tokenizer(), catalogue=catalogue())
    assert {"eval_a_loss", "eval_b_loss"} <= made.evaluate().keys() and made.reward_func_names == ["hit"]
