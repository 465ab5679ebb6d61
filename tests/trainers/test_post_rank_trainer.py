"""Post-ranking training: what is drawn, what trains, both losses, accumulation and resuming."""

import dataclasses

import numpy as np
import pytest
import torch
from lm_stand_ins import tiny_model, tiny_tokenizer
from post_rank_sources import rating_rows, recbole, toy_table

from sidtune.core.errors import ConfigError, DataError
from sidtune.data_builders.post_ranking.movielens_segments import SegmentConfig, movielens_segments
from sidtune.data_builders.readers.movielens import read_ratings
from sidtune.metrics.list_ranking import ListMetrics, evaluate_lists
from sidtune.models.post_ranking.files import add_lora, save_post_rank
from sidtune.models.post_ranking.model import PostRankForCausalLM
from sidtune.models.post_ranking.processor import PostRankProcessor, build_config
from sidtune.trainers.post_ranking.data import PostRankExamples, auxiliary_pair, field_specs, judged_rows
from sidtune.trainers.post_ranking.trainer import PostRankTrainer, adapt_features, learn_to_post_rank, paper_arguments

pytestmark = pytest.mark.medium


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    ratings = read_ratings(recbole(tmp_path_factory.mktemp("ml") / "r", rating_rows()))
    return movielens_segments(ratings, SegmentConfig(width=4, d_q=6, history=3, upstream_share=0.3))


@pytest.fixture(scope="module")
def rows(table):
    """Requests whose five ratings are not all the same."""
    found = table.relevance.reshape(-1, 5)
    return np.flatnonzero(found.max(axis=1) > found.min(axis=1))[:8]


def made(table, rows, aux_weight=1.0, words=False, **options):
    language_model, tokenizer = tiny_model("llama"), tiny_tokenizer()
    config = build_config(
        language_model, tokenizer, field_specs(table, rows), table.d_q, d_h=8, aux_weight=aux_weight, **options
    )
    torch.manual_seed(0)
    return PostRankForCausalLM.from_base(language_model, config), PostRankProcessor(tokenizer, config, words=words)


def args(folder, steps=2, **changes):
    values = {"optim": "sgd", "learning_rate": 0.05, "lr_scheduler_type": "constant", "warmup_steps": 0, "seed": 1}
    values |= {"max_grad_norm": 1e6, "max_steps": steps, "save_strategy": "no", "disable_tqdm": True}
    return paper_arguments(folder, **{**values, **changes})


def weights(model):
    return {name: value.detach().clone() for name, value in model.named_parameters()}


def changed(before, model):
    return {name for name, value in model.named_parameters() if not torch.equal(before[name], value)}


def ndcg(relevance, order):
    settings = ListMetrics((len(order),), ("ndcg",), gain="exp2")
    return evaluate_lists(np.asarray(order)[None], np.asarray(relevance)[None], settings=settings).per_request[
        f"ndcg@{len(order)}"
    ][0]


def graded(relevance):
    """A table whose only feature says the relevance, so that a batch tells what was presented."""
    relevance = np.asarray(relevance, dtype=float)
    features = np.stack([relevance, np.arange(relevance.shape[1]) + 0 * relevance], axis=-1)
    return toy_table(relevance, features, np.eye(len(relevance), 3), ["train"] * len(relevance))


# -- what is drawn ------------------------------------------------------------------------------------------------


def test_the_auxiliary_label_is_the_better_list_and_no_tie_comes_out():
    random = np.random.default_rng(0)
    labels = []
    for _ in range(300):
        relevance = random.choice([1.0, 1.0, 1.0, 5.0], random.integers(2, 7))
        pair = auxiliary_pair(relevance, random)
        if len(set(relevance.tolist())) == 1:
            assert pair is None
            continue
        one, two, better = pair
        values = ndcg(relevance, one), ndcg(relevance, two)
        assert sorted(one) == sorted(two) == list(range(len(relevance)))
        assert abs(values[0] - values[1]) > 1e-7
        assert better == int(values[1] > values[0])
        # swapped lists flip the label: the label is a property of the contents, not of the place
        assert int(values[0] > values[1]) == 1 - better
        labels.append(better)
    assert 0.4 < np.mean(labels) < 0.6
    assert auxiliary_pair(np.array([3.0]), random) is None


def test_an_undecided_draw_ends_with_the_best_list_against_the_worst():
    class Stuck:
        def permutation(self, n):
            return np.arange(n)

    one, two, better = auxiliary_pair(np.array([1.0, 4.0, 2.0]), Stuck())
    assert (one.tolist(), two.tolist(), better) == ([1, 2, 0], [0, 2, 1], 0)


@pytest.mark.parametrize("words", [False, True])
def test_both_answers_of_a_batch_are_right_for_what_is_presented(words):
    relevance = np.random.default_rng(1).choice([1.0, 2.0, 5.0], (12, 4))
    relevance[0] = 3.0
    table = graded(relevance)
    if words:
        table = dataclasses.replace(table, item_texts=[[("n", str(n))] for n in range(len(table.item_ids))])
    _, processor = made(table, np.arange(12), words=words)
    examples = PostRankExamples(table, np.arange(12), processor, shuffle=1.0)
    batch = examples.collate(range(12))
    assert batch["task_id"].tolist() == [0] * 12 + [1] * 11  # one request has no better list
    place = {token: number for number, token in enumerate(processor.config.label_token_ids[:4])}
    one = processor.tokenizer(processor.template.one, add_special_tokens=False)["input_ids"]
    shuffled = 0
    for row in range(23):
        request = row if row < 12 else row - 11
        learned = batch["labels"][row] != -100
        prompt = [place[t] for t in batch["input_ids"][row][~learned].tolist() if t in place]
        answer = batch["input_ids"][row][learned].tolist()
        assert answer[-1] == processor.config.end_token_id
        if words:
            continue
        shown = batch["item_fields"]["x"][row, batch["item_mask"][row]]
        shuffled += shown[:, 1].tolist() != [0, 1, 2, 3]
        assert np.array_equal(relevance[request][shown[:, 1].long().numpy()], shown[:, 0].numpy())
        if row < 12:
            order = [place[token] for token in answer[:-1]]
            assert ndcg(shown[:, 0].numpy(), order) == 1.0 and sorted(order) == [0, 1, 2, 3]
        else:
            lists = prompt[-8:-4], prompt[-4:]
            better = ndcg(shown[:, 0].numpy(), lists[0]) > ndcg(shown[:, 0].numpy(), lists[1])
            assert (answer[:-1] == one) == better
    assert words or shuffled > 12


def test_draws_are_a_function_of_seed_epoch_and_example(table, rows):
    _, processor = made(table, rows)
    examples = PostRankExamples(table, rows, processor, seed=4)
    again = PostRankExamples(table, rows, processor, seed=4)
    together, alone = examples.collate([3, 5]), again.collate([5])
    count = int(together["attention_mask"][1].sum())
    assert torch.equal(together["input_ids"][1, -count:], alone["input_ids"][0, -count:])
    orders = [tuple(examples._order(20, np.random.default_rng([4, n])).tolist()) for n in range(200)]
    assert 80 < sum(order != tuple(range(20)) for order in orders) < 120  # half of them are shuffled
    next_epoch = examples.collate([5 + len(examples)])
    width = min(next_epoch["input_ids"].shape[1], alone["input_ids"].shape[1])
    assert not torch.equal(next_epoch["input_ids"][:, -width:], alone["input_ids"][:, -width:])


def test_each_epoch_visits_every_example_with_new_draws(table, rows, tmp_path):
    class Seen(PostRankExamples):
        def collate(self, numbers):
            seen.extend(numbers)
            return super().collate(numbers)

    seen: list[int] = []
    model, processor = made(table, rows)
    PostRankTrainer(model, args(tmp_path, steps=6, per_device_train_batch_size=4), Seen(table, rows, processor)).train()
    assert [sorted(seen[n : n + 8]) for n in (0, 8, 16)] == [list(range(n, n + 8)) for n in (0, 8, 16)]
    assert [n % 8 for n in seen[:8]] != [n % 8 for n in seen[8:16]]


def test_ties_of_the_main_answer_keep_the_presented_order_or_are_drawn():
    table = graded(np.array([[2.0, 5.0, 2.0, 2.0]] * 2))
    _, processor = made(table, np.arange(2))
    place = {token: number for number, token in enumerate(processor.config.label_token_ids)}

    def answers(ties):
        examples = PostRankExamples(table, np.arange(2), processor, shuffle=0.0, aux=False, ties=ties)
        batch = examples.collate(range(60))
        learned = batch["input_ids"][batch["labels"] != -100].reshape(60, 5)[:, :4]
        return {tuple(place[token] for token in row) for row in learned.tolist()}

    assert answers("incoming") == {(1, 0, 2, 3)}
    drawn = answers("random")
    assert len(drawn) == 6 and all(order[0] == 1 for order in drawn)
    with pytest.raises(ConfigError, match="random"):
        answers("randm")


def test_long_lists_are_presented_in_stretches():
    table = graded(np.random.default_rng(0).integers(1, 6, (3, 40)))
    _, processor = made(table, np.arange(3))
    examples = PostRankExamples(table, np.arange(3), processor, shuffle=0.0, max_candidates=20, aux=False)
    starts = set()
    for epoch in range(12):
        batch = examples.collate(np.arange(3) + 3 * epoch)
        assert batch["item_mask"].shape == (3, 20)
        for shown in batch["item_fields"]["x"][:, :, 1]:
            assert (shown.diff() == 1).all()
            starts.add(int(shown[0]))
    assert len(starts) > 8 and max(starts) <= 20


def test_requests_with_unknown_relevance_are_left_out(table, rows):
    ragged = graded([[1.0, 2.0, np.nan], [2.0, 1.0, 3.0]])
    assert judged_rows(ragged, [0, 1]).tolist() == [0, 1]  # NaN there means no such candidate
    _, processor = made(table, rows)
    unknown = dataclasses.replace(table)
    relevance = table.relevance.copy()
    relevance[rows[0] * 5 + 2] = np.nan
    unknown.__dict__["relevance"] = relevance
    examples = PostRankExamples(unknown, rows, processor)
    assert examples.left_out == 1 and rows[0] not in examples.rows
    with pytest.raises(DataError, match="No post-ranking example is left of 1"):
        PostRankExamples(unknown, rows[:1], processor)


def test_statistics_come_from_the_given_requests_only(table, rows):
    specs = {(s.side, s.name): s for s in field_specs(table, rows[:4])}
    found = table.matrices["candidate/past"].reshape(-1, 5, 3)[rows[:4]].reshape(-1, 3)
    assert np.allclose(specs["item", "past"].mean, found.mean(axis=0), atol=1e-5)
    assert np.allclose(specs["item", "past"].std, found.std(axis=0), atol=1e-5)
    assert specs["item", "genres"].kind == "categorical" and specs["item", "genres"].mean is None


# -- what trains --------------------------------------------------------------------------------------------------


def test_feature_adaptation_trains_the_adapters_and_nothing_else(table, rows, tmp_path):
    model, processor = made(table, rows)
    before, features = weights(model), {name: value.copy() for name, value in table.matrices.items()}
    trainer = adapt_features(model, processor, table, rows, args(tmp_path, steps=1, per_device_train_batch_size=8))
    assert trainer.state.global_step == 1
    adapters = {name for name in before if name.startswith("qia_")}
    assert changed(before, model) == adapters
    assert all(p.grad is None for name, p in model.named_parameters() if name not in adapters)
    assert all(np.array_equal(features[name], value, equal_nan=True) for name, value in table.matrices.items())
    adapt_features(model, processor, table, rows, args(tmp_path / "all", steps=1), train="all")
    assert "language_model.model.layers.0.self_attn.v_proj.weight" in changed(before, model)


@pytest.mark.parametrize("layout", ["A", "B"])
def test_post_ranking_trains_lora_on_query_and_key_and_both_adapters(table, rows, tmp_path, layout):
    model, processor = made(table, rows)
    model.train_adapters_only()
    model = add_lora(model, layout)
    before = weights(model)
    trainer = learn_to_post_rank(model, processor, table, rows, args(tmp_path, steps=2))
    names = changed(before, trainer.model)
    lora, rest = {n for n in names if "lora_" in n}, {n for n in names if "lora_" not in n}
    layers = [f"layers.{n}.self_attn.{p}_proj.lora_{ab}" for n in (0, 1) for p in "qk" for ab in "AB"]
    assert len(lora) == len(layers) and all(any(layer in name for name in lora) for layer in layers)
    trainable = {n for n in before if ".qia_" in f".{n}" and "original_module" not in n}
    assert rest == trainable and not any("qia_" in name for name in lora)
    scales = [m.scaling["default"] for m in model.modules() if hasattr(m, "lora_A")]
    assert scales == [1.0] * 4
    save_post_rank(trainer.model, tmp_path / "saved", processor)
    base = tiny_model("llama")
    loaded = PostRankForCausalLM.from_pretrained(tmp_path / "saved", base=base)
    batch = PostRankExamples(table, rows, processor).collate([0, 1])
    with torch.no_grad():
        assert torch.allclose(loaded(**batch).logits, trainer.model.eval()(**batch).logits, atol=1e-6)


def train(table, rows, folder, *, aux_weight=1.0, aux=True, lora=False, **changes):
    model, processor = made(table, rows, aux_weight)
    if lora:
        torch.manual_seed(0)
        model = add_lora(model, "B", dropout=0.2)
    return learn_to_post_rank(model, processor, table, rows, args(folder, **changes), aux=aux)


def test_weight_zero_of_the_auxiliary_task_is_training_without_it(table, rows, tmp_path):
    zero = weights(train(table, rows, tmp_path / "0", aux_weight=0.0).model)
    without = weights(train(table, rows, tmp_path / "n", aux=False).model)
    one = weights(train(table, rows, tmp_path / "1").model)
    assert all(torch.allclose(zero[name], without[name], atol=1e-6) for name in zero)
    assert max(float((one[name] - zero[name]).abs().max()) for name in one) > 1e-3


def test_two_micro_batches_are_one_batch(table, rows, tmp_path):
    # Main answers only: all have six tokens, so the mean of two means is the mean.
    options = {"steps": 3, "aux": False}
    whole = train(table, rows, tmp_path / "w", per_device_train_batch_size=4, **options)
    halves = train(table, rows, tmp_path / "h", per_device_train_batch_size=2, gradient_accumulation_steps=2, **options)
    assert whole.model_accepts_loss_kwargs is False
    one, two, start = weights(whole.model), weights(halves.model), weights(made(table, rows)[0])
    assert max(float((one[n] - start[n]).abs().max()) for n in one) > 1e-2
    assert all(torch.allclose(one[name], two[name], atol=2e-6) for name in one)


def test_the_logged_losses_are_those_of_both_tasks(table, rows, tmp_path):
    log = train(table, rows, tmp_path, aux_weight=0.5, steps=2, logging_steps=1).state.log_history
    assert sum("loss" in entry for entry in log) == 2
    assert all(abs(e["main_loss"] + 0.5 * e["aux_loss"] - e["loss"]) < 1e-3 for e in log if "loss" in e)


def test_an_interrupted_training_ends_where_an_uninterrupted_one_does(table, rows, tmp_path):
    options = {"lora": True, "optim": "adamw_torch", "learning_rate": 1e-2, "per_device_train_batch_size": 3}
    whole = train(table, rows, tmp_path / "w", steps=7, **options)
    saving = {"save_strategy": "steps", "save_steps": 4, "steps": 7, **options}
    model, processor = made(table, rows)
    torch.manual_seed(0)
    model = add_lora(model, "B", dropout=0.2)

    class Stop(Exception):
        pass

    class StopAt(PostRankTrainer):
        def training_step(self, *arguments, **named):
            if self.state.global_step == 5:
                raise Stop
            return super().training_step(*arguments, **named)

    made_args = args(tmp_path / "r", **{k: v for k, v in saving.items() if k != "lora"})
    with pytest.raises(Stop):
        StopAt(model, made_args, PostRankExamples(table, rows, processor, seed=1)).train()
    checkpoint = tmp_path / "r" / "checkpoint-4"
    assert not list(checkpoint.glob("model*")) and (checkpoint / "trained.safetensors").is_file()
    resumed = train(table, rows, tmp_path / "r", **saving)
    assert resumed.state.global_step == 7
    one, two = weights(whole.model), weights(resumed.model)
    assert all(torch.equal(one[name], two[name]) for name in one)
    other, _ = made(table, rows)
    with pytest.raises(DataError, match="another model"):
        PostRankTrainer(other, made_args, resumed.train_dataset)._load_from_checkpoint(str(checkpoint))


# -- schedule and input -------------------------------------------------------------------------------------------


def test_the_preset_is_the_schedule_of_the_paper(table, rows, tmp_path):
    arguments = paper_arguments(tmp_path, max_steps=20, logging_steps=1, save_strategy="no", disable_tqdm=True)
    model, processor = made(table, rows)
    trainer = learn_to_post_rank(
        model, processor, table, rows, arguments, adapter_learning_rate=5e-3, valid_rows=rows[:2]
    )
    rates = [entry["learning_rate"] for entry in trainer.state.log_history if "learning_rate" in entry]
    assert rates[0] < rates[1] < max(rates) and max(rates) == pytest.approx(1e-3)
    assert rates.index(max(rates)) == 2
    assert trainer.lr_scheduler.get_last_lr()[0] == pytest.approx(1e-6)
    assert all(a >= b for a, b in zip(rates[2:], rates[3:], strict=False))
    groups = trainer.optimizer.param_groups
    assert type(trainer.optimizer.optimizer).__name__ == "AdamW"
    adapters = {id(p) for p in model.adapter_parameters()}
    assert sum(len(group["params"]) for group in groups) == len(list(model.parameters()))
    for group in groups:
        assert all((id(p) in adapters) == (group["initial_lr"] == 5e-3) for p in group["params"])
    found = trainer.evaluate()
    assert {"eval_loss", "eval_main_loss", "eval_aux_loss"} <= found.keys()


def test_wrong_input_is_told_in_one_sentence(table, rows, tmp_path):
    model, processor = made(table, rows)
    with pytest.raises(ConfigError, match="did you mean 'learning_rate'"):
        paper_arguments(tmp_path, learning_speed=1)
    with pytest.raises(ConfigError, match="adaptation"):
        PostRankExamples(table, rows, processor, "adaption")
    for options in ({"shuffle": 2}, {"max_candidates": 1}, {"max_candidates": 27}):
        with pytest.raises(ConfigError, match="max_candidates from 2"):
            PostRankExamples(table, rows, processor, **options)
    with pytest.raises(ConfigError, match="'adapters' or 'all'"):
        adapt_features(model, processor, table, rows, args(tmp_path), train="lora")
    model.requires_grad_(False)
    with pytest.raises(ConfigError, match="Nothing of the post-ranking model trains"):
        PostRankTrainer(model, args(tmp_path), PostRankExamples(table, rows, processor))
    spoken = PostRankProcessor(processor.tokenizer, processor.config, words=True)
    with pytest.raises(ConfigError, match="soft tokens"):
        PostRankExamples(table, rows, spoken, "adaptation")
