"""The self-evolving loop: what may be learned from, what a round does, when it stops, and that it goes on after a kill."""

import json
import shutil

import numpy as np
import pyarrow.parquet as pq
import pytest
from self_evolve_stand_ins import STAGE, Faked, InProcess, fake_prompt_settings, stand_in_script
from tiny_pipeline import pipeline, run_in_process

from sidtune.core.config import build
from sidtune.core.errors import ConfigError, DataError
from sidtune.core.folders import read_json
from sidtune.decoding.retrieval.loading import final_model
from sidtune.decoding.retrieval.reasoner import few, is_hard, ranks_of, sample_trajectories
from sidtune.decoding.retrieval.reasoning_requests import load_requests
from sidtune.recipes.crs import reason, self_evolve, trajectories
from sidtune.recipes.crs.self_evolve import Arguments, Loop
from sidtune.trainers.grpo.examples import hard_rows

pytestmark = pytest.mark.medium

NAMES = [
    "aligned/valid",
    "seeds",
    "cold_start/sft",
    "cold_start/valid",
    "round_1/hard",
    "round_1/rl",
    "round_1/trajectories",
    "round_1/sft",
    "round_1/valid",
]


@pytest.fixture(scope="module")
def shop(tmp_path_factory):
    """A tiny shop with an aligned model whose tokenizer knows the marks of a reasoning."""
    values = pipeline()
    values["steps"][2]["args"]["extra_tokens"] = ["<think>", "</think>"]
    return run_in_process(values, tmp_path_factory.mktemp("shop"), until="sft")


def options(shop, output, **more):
    return {
        "data_dir": str(shop / "data"),
        "sids_dir": str(shop / "sids"),
        "model_dir": str(shop / "sft"),
        "output_dir": str(output),
        "rounds": 1,
        "seeds": {"max_requests": 80, "aspects": ["price", "category"]},
        "cold_start": {"stages": [STAGE]},
        "hard": {"max_requests": 150, "max_reasoning_tokens": 24},
        "trajectories": {"samples": 16, "max_requests": 120, "max_reasoning_tokens": 24},
        "sft": {"stages": [STAGE]},
        "validate": {"max_requests": 40, "max_reasoning_tokens": 24},
        **more,
    }


def arguments(shop, output, **more):
    return build(Arguments, options(shop, output, **more), "test")


@pytest.fixture(scope="module")
def loop(shop, tmp_path_factory):
    """The loop run to its end, broken off twice on the way; with the launches of each attempt."""
    patch = pytest.MonkeyPatch()
    patch.setattr(self_evolve, "find_script", stand_in_script)
    output = tmp_path_factory.mktemp("evolve")
    launched = []
    for stop_at in ("cold_start/valid", "round_1/trajectories", None):
        launch = InProcess(stop_at)
        run = Loop(arguments(shop, output), launch)
        if stop_at:
            with pytest.raises(KeyboardInterrupt):
                run.run()
        else:
            run.run()
        launched.append(launch.names)
    yield output, launched
    patch.undo()


def test_a_broken_off_loop_goes_on_where_it_was(loop, shop, monkeypatch):
    monkeypatch.setattr(self_evolve, "find_script", stand_in_script)
    output, launched = loop
    assert [name for names in launched for name in names] == NAMES
    assert launched[0] == NAMES[:3] and launched[2][0] == "round_1/trajectories"
    for name in NAMES:
        assert (output / name / "run.json").exists()
    again = InProcess()
    before = read_json(output / "run.json")["metrics"]
    assert Loop(arguments(shop, output), again).run() == before and again.names == []
    # Other options of a step start again there, and what comes after follows only if its input changed.
    backup = output.parent / "backup"
    shutil.copytree(output, backup)
    for more, wanted in (
        ({"validate": {"max_requests": 20, "max_reasoning_tokens": 24}}, [n for n in NAMES if n.endswith("valid")]),
        ({"trajectories": {"samples": 15, "max_requests": 120, "max_reasoning_tokens": 24}}, NAMES[6:]),
    ):
        changed = InProcess()
        Loop(arguments(shop, output, **more), changed).run()
        assert changed.names == wanted
        shutil.rmtree(output)
        shutil.copytree(backup, output)


def test_the_result_is_a_model_like_any_other(loop):
    output, _ = loop
    record = read_json(output / "run.json")["metrics"]
    model = final_model(output)
    assert (model / "config.json").exists() and (model / "serializer.json").exists()
    assert model == output / record["final"] and record["best"] in ("cold_start", "round_1")
    assert set(record["valid"]) == {"aligned", "cold_start", "round_1"}
    best = max(("cold_start", "round_1"), key=lambda name: record["valid"][name]["ndcg@10"])
    assert record["valid"][record["best"]]["ndcg@10"] == record["valid"][best]["ndcg@10"]
    gain = record["rounds"][0]
    assert gain["difference"] == pytest.approx(
        record["valid"]["round_1"]["ndcg@10"] - record["valid"]["cold_start"]["ndcg@10"]
    )


def test_the_hard_set_is_what_the_same_checkpoint_gets_wrong(loop, shop):
    """Second implementation: one request at a time, and the plain definition of the rank."""
    output, _ = loop
    answers = pq.read_table(output / "round_1/hard/answers.parquet").to_pydict()
    hard = set(pq.read_table(output / "round_1/hard/hard_set.parquet")["request_id"].to_pylist())
    solved = {r for r, rank in zip(answers["request_id"], answers["rank"], strict=True) if rank == 0}
    assert hard.isdisjoint(solved) and hard | solved == set(answers["request_id"]) and hard and solved
    found = load_requests(
        shop / "data", shop / "sids", output / "cold_start/sft", "train", 0, max_reasoning_tokens=24, batch_size=1
    )
    place = {request: n for n, request in enumerate(found.ids)}
    for request in [*sorted(hard)[:6], *sorted(solved)[:6]]:
        row = place[request]
        answer = found.reasoner.answer(found.reasoner.prompts(found.pieces(np.array([row]))))
        leaves = answer.leaves[0, 0].tolist()
        rank = leaves.index(found.leaf[row]) if found.leaf[row] in leaves else -1
        assert rank == answers["rank"][answers["request_id"].index(request)]


def test_every_trajectory_ranks_its_target_first_and_tells_nothing(loop, shop):
    """Check 16 of the sheet."""
    output, _ = loop
    lines = [json.loads(line) for line in (output / "round_1/trajectories/trajectories.jsonl").open()]
    seeds = [json.loads(line) for line in (output / "seeds/trajectories.jsonl").open()]
    record = read_json(output / "round_1/trajectories/run.json")["metrics"]
    own = lines[: record["trajectories"]]
    assert own and len(lines) - len(own) == record["replayed"] == max(1, round(0.15 * len(own)))
    assert all(line in seeds for line in lines[len(own) :])
    found = load_requests(shop / "data", shop / "sids", output / "round_1/rl", "train", 0, max_reasoning_tokens=24)
    place = {request: n for n, request in enumerate(found.ids)}
    rows = np.array([place[line["request_id"]] for line in own])
    hard = set(pq.read_table(output / "round_1/hard/hard_set.parquet")["request_id"].to_pylist())
    assert {line["request_id"] for line in own} <= hard
    assert max(np.bincount(rows)) <= 2 and len({(line["request_id"], line["reasoning"]) for line in own}) == len(own)
    tokenizer, reasoner = found.reasoner.retriever.tokenizer, found.reasoner
    sid_ids = set(reasoner.retriever.vocabulary.sid_token_ids.tolist())
    prompts = reasoner.prompts(found.pieces(rows))
    full = [
        [*prompt, *tokenizer.encode(f"<think>{line['reasoning']}</think>", add_special_tokens=False)]
        for prompt, line in zip(prompts, own, strict=True)
    ]
    leaves, _ = reasoner.search(full)
    assert (leaves[:, 0] == found.leaf[rows]).all()
    for line, row, ids in zip(own, rows, full, strict=True):
        written = ids[ids.index(reasoner.think) :]
        assert not sid_ids & set(written) and written.count(reasoner.end) == 1 and written[-1] == reasoner.end
        assert found.item_ids[row] == line["item_id"]
        assert (
            found.sids[row] not in line["reasoning"]
            and (found.titles[row] or "?").lower() not in line["reasoning"].lower()
        )


def test_a_wrong_answer_is_never_kept(loop, shop):
    """The same samples judged against another target: nothing passes that the search does not rank first."""
    output, _ = loop
    found = load_requests(shop / "data", shop / "sids", output / "cold_start/sft", "train", 0, max_reasoning_tokens=24)
    found = found.take(np.arange(40))
    reasoner = found.reasoner
    prompts = reasoner.prompts(found.pieces(np.arange(40)))
    texts = [reasoner.written(ids[0]) for ids in reasoner.answer(prompts).reasonings]
    top = reasoner.search([[*p, *reasoner.closed_ids(t or "x")] for p, t in zip(prompts, texts, strict=True)])[0][:, 0]
    right = sample_trajectories(reasoner, prompts, top, ["<a_0>"] * 40, [None] * 40, samples=6, seed=1)
    wrong = sample_trajectories(reasoner, prompts, np.full(40, -2), ["<a_0>"] * 40, [None] * 40, samples=6, seed=1)
    assert right.counts["requests_solved"] > 20 and not len(wrong.row)
    assert (np.bincount(right.row) <= 2).all() and right.counts["sampled"] == 240
    same = sample_trajectories(reasoner, prompts, top, ["<a_0>"] * 40, [None] * 40, samples=6, seed=1)
    assert same.text == right.text
    leaky = sample_trajectories(reasoner, prompts, top, ["<a_0>"] * 40, [right.text[0]] * 40, samples=6, seed=1)
    assert right.text[0] not in leaky.text
    with pytest.raises(ConfigError, match="keep"):
        sample_trajectories(reasoner, prompts, top, ["<a_0>"] * 40, [None] * 40, keep=0)


def test_ranks_and_hardness():
    leaves = np.array([[4, 2, -1], [2, 4, 1], [1, 2, 3]])
    ranks = ranks_of(leaves, np.array([4, 4, 4]))
    assert ranks.tolist() == [0, 1, -1]
    assert is_hard(ranks).tolist() == [False, True, True] and is_hard(ranks, 2).tolist() == [False, False, True]
    with pytest.raises(ConfigError, match="at least 1"):
        is_hard(ranks, 0)


def test_the_shortest_and_random_others_are_kept():
    texts = ["aaaa", "bb", "cc", "ddd"]
    seen = {tuple(few(texts, 2, np.random.default_rng(n))) for n in range(50)}
    assert all("bb" in pair and len(set(pair)) == 2 for pair in seen) and len(seen) == 3
    assert few(texts[:2], 2, np.random.default_rng(0)) == texts[:2]


# -- the stop rule, without any model


def faked(tmp_path, values, counts=(5, 5), **more):
    for name in ("data", "sids"):
        (tmp_path / name).mkdir(exist_ok=True)
        (tmp_path / name / "x").write_text(name)
    aligned = tmp_path / "sft" / "stage_1_align"
    if not aligned.exists():
        aligned.mkdir(parents=True)
        (aligned / "config.json").write_text("{}")
        (tmp_path / "sft" / "run.json").write_text(json.dumps({"metrics": {"final": "stage_1_align"}}))
        fake_prompt_settings(aligned)
    launch = Faked(values, *counts)
    return Loop(arguments(tmp_path, tmp_path / "evolve", **{"rounds": 3, **more}), launch).run(), launch


@pytest.fixture
def values():
    rng = np.random.default_rng(0)
    base = rng.random(500)
    return {"aligned": base * 0.5, "cold_start": base, **{f"round_{n}": base + 0.1 * n for n in (1, 2, 3)}}, rng


@pytest.fixture(autouse=True)
def _stand_in(monkeypatch):
    monkeypatch.setattr(self_evolve, "find_script", stand_in_script)


def test_rounds_go_on_while_they_gain(values, tmp_path):
    record, launch = faked(tmp_path, values[0])
    assert record["best"] == "round_3" and record["final"] == "round_3/sft/stage_1_reason"
    assert "all 3 rounds" in record["stopped"] and [r["against"] for r in record["rounds"]] == [
        "cold_start",
        "round_1",
        "round_2",
    ]
    by_name = {step.name: step for step in launch.steps}
    output = tmp_path / "evolve"
    assert by_name["round_2/rl"].config.model_dir == str(output / "round_1/sft")
    assert by_name["round_2/rl"].config.hard_set == str(output / "round_2/hard/hard_set.parquet")
    assert by_name["round_2/trajectories"].config.model_dir == str(output / "round_2/rl")
    assert by_name["round_2/sft"].config.model_dir == str(output / "round_2/rl")
    stage = by_name["round_2/sft"].config.stages[0]["tasks"]["reason_to_sid"]["options"]
    assert stage["file"] == str(output / "round_2/trajectories/trajectories.jsonl") and len(stage["sha256"]) == 64
    # Prompts are rendered as the aligned model knows them.
    assert by_name["cold_start/sft"].config.prompt_max_history == 3
    assert by_name["cold_start/sft"].config.templates == str(tmp_path / "sft/stage_1_align/templates")
    assert by_name["aligned/valid"].config.reasoning is False and by_name["round_1/valid"].config.reasoning is True


def test_a_gain_within_noise_stops_the_loop(values, tmp_path):
    made, rng = values
    made["round_2"] = made["round_1"] + rng.normal(0.001, 0.5, 500)
    record, launch = faked(tmp_path, made)
    assert "round_2" in record["stopped"] and "noise" in record["stopped"]
    assert record["rounds"][1]["low"] <= 0 and not any(s.name.startswith("round_3") for s in launch.steps)
    better = record["rounds"][1]["difference"] > 0
    assert record["best"] == ("round_2" if better else "round_1")


def test_a_comparison_runs_all_rounds_and_says_whether_reasoning_pays(values, tmp_path, capsys):
    made, _ = values
    made["round_1"], made["round_2"] = made["cold_start"] - 0.2, made["cold_start"] - 0.1
    made["round_3"], made["aligned"] = made["cold_start"] - 0.3, made["cold_start"] + 0.25
    record, _ = faked(tmp_path, made, stop_within_noise=False)
    assert len(record["rounds"]) == 3 and record["best"] == "cold_start" and "all 3 rounds" in record["stopped"]
    assert record["reasoning"]["difference"] == pytest.approx(-0.25) and record["reasoning"]["high"] < 0
    assert "answers better without reasoning" in capsys.readouterr().out


def test_a_loss_stops_the_loop_and_keeps_the_better_model(values, tmp_path):
    made, _ = values
    made["round_1"] = made["cold_start"] - 0.2
    record, _ = faked(tmp_path, made)
    assert record["best"] == "cold_start" and record["final"] == "cold_start/sft/stage_1_reason"
    assert len(record["rounds"]) == 1 and record["rounds"][0]["high"] < 0


@pytest.mark.parametrize("counts", [(0, 5), (5, 0)])
def test_nothing_to_learn_from_stops_the_loop(values, tmp_path, counts):
    record, launch = faked(tmp_path, values[0], counts)
    assert record["best"] == "cold_start" and record["rounds"] == [] and "nothing to learn" in record["stopped"]
    assert not any(step.name == "round_1/sft" for step in launch.steps)


@pytest.mark.parametrize(
    ("base", "wanted"), [("previous", "cold_start/sft/stage_1_reason"), ("aligned", "../sft/stage_1_align")]
)
def test_the_base_of_a_round(values, tmp_path, base, wanted):
    _, launch = faked(tmp_path, values[0], sft_from=base)
    step = next(step for step in launch.steps if step.name == "round_1/sft")
    assert (tmp_path / "evolve" / wanted).resolve() == type(tmp_path)(step.config.model_dir).resolve()


def test_changed_trajectories_train_again(values, tmp_path):
    faked(tmp_path, values[0])
    file = tmp_path / "evolve/round_1/trajectories/trajectories.jsonl"
    file.write_text(file.read_text().replace('"b"', '"c"'))
    _, launch = faked(tmp_path, values[0])
    assert launch.steps[0].name == "round_1/sft"


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"rounds": -1}, "rounds"),
        ({"level": 1.0}, "level"),
        ({"grpo": {"model_dir": "x"}}, "'model_dir' is set by the loop"),
        ({"trajectories": {"source": "file"}}, "remove 'source'"),
        ({"trajectories": {"sampels": 3}}, "did you mean 'samples'"),
        ({"hard": {"hard_k": 0}}, "hard_k"),
        ({"sft": {"stages": [STAGE, STAGE]}}, "exactly one stage"),
        ({"cold_start": {"stages": [{"name": "x", "tasks": {"item_to_sid": {}}}]}}, "reason_to_sid"),
        ({"cold_start": {"stages": [{**STAGE, "args": {"learning_rat": 1}}]}}, "did you mean 'learning_rate'"),
        ({"validate": {"primary": "ndcg@7"}}, "primary"),
    ],
)
def test_a_wrong_config_is_told_before_the_first_step(values, tmp_path, more, words):
    with pytest.raises(ConfigError, match=words):
        faked(tmp_path, values[0], **more)
    assert not (tmp_path / "evolve").exists()


# -- scripts


def test_hard_sets_that_do_not_fit_are_refused(tmp_path, shop):
    found = pq.read_table(shop / "data/requests/train.parquet")["request_id"]
    path = tmp_path / "hard.parquet"
    with pytest.raises(DataError, match="no parquet file"):
        hard_rows(path, found)
    for table, words in (
        (found.slice(0, 0), "is empty"),
        (pq.read_table(shop / "data/requests/test.parquet")["request_id"], "not in the split that is trained on"),
    ):
        pq.write_table(table_of(table), path)
        with pytest.raises(DataError, match=words):
            hard_rows(path, found)
    pq.write_table(table_of(found.slice(5, 3)), path)
    assert hard_rows(path, found).tolist() == [5, 6, 7]
    with pytest.raises(ConfigError, match="source: sampled"):
        trajectories.Arguments("d", "s", "m", "o", hard_set="x")
    with pytest.raises(ConfigError, match="go together"):
        trajectories.Arguments("d", "s", "m", "o", source="file")
    with pytest.raises(ConfigError, match="split"):
        reason.Arguments("d", "s", "m", "o", split="all")


def table_of(column):
    import pyarrow as pa

    return pa.table({"request_id": column})


def test_a_teachers_file_passes_the_same_filters(shop, loop, tmp_path):
    output, _ = loop
    found = load_requests(shop / "data", shop / "sids", output / "cold_start/sft", "train", 0, max_reasoning_tokens=24)
    lines = [
        {"request_id": found.ids[0], "reasoning": "price low"},
        {"request_id": found.ids[1], "reasoning": f"buys {found.titles[1].upper()} again"},
        {"request_id": found.ids[2], "reasoning": f"surely {found.sids[2]}"},
        {"request_id": found.ids[3], "reasoning": "<think>price high</think>"},
        {"request_id": found.ids[4], "reasoning": "words " * 60},
    ]
    file = tmp_path / "teacher.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    base = {"data_dir": str(shop / "data"), "sids_dir": str(shop / "sids"), "model_dir": str(output / "cold_start/sft")}
    made = trajectories.Arguments(**base, output_dir=str(tmp_path / "a"), source="file", file=str(file), longest=24)
    trajectories.main(made)
    kept = [json.loads(line) for line in (tmp_path / "a/trajectories.jsonl").open()]
    assert [(k["request_id"], k["reasoning"]) for k in kept] == [
        (found.ids[0], "price low"),
        (found.ids[3], "price high"),
    ]
    assert [k["item_id"] for k in kept] == [found.item_ids[0], found.item_ids[3]]
    # With top_k as large as the catalogue everything passes; the filter itself is `accept`.
    trajectories.main(
        build(
            trajectories.Arguments,
            {**vars(made), "top_k": 200, "num_beams": 200, "output_dir": str(tmp_path / "b")},
            "",
        )
    )
    assert (tmp_path / "b/trajectories.jsonl").read_text() == (tmp_path / "a/trajectories.jsonl").read_text()
