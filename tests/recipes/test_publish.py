"""A published bundle stands alone: pushed to a stand-in hub, fetched again, it ranks as the evaluation did."""

import json
import os
import re
import shutil
import subprocess
import sys

import pyarrow.parquet as pq
import pytest
import yaml
from hub_stand_in import hub_stand_in
from tiny_pipeline import pipeline, run_in_process

from sidtune.core.config import command
from sidtune.core.errors import DataError
from sidtune.core.folders import fingerprint, read_json
from sidtune.decoding.retrieval.retriever import PastTurn, SidRetriever
from sidtune.recipes.steps import publish, report

pytestmark = pytest.mark.medium


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    return run_in_process(pipeline(), tmp_path_factory.mktemp("publish"), until="bundle")


def folders(finished):
    return {
        f"{n}_dir": str(finished / d)
        for n, d in (("data", "data"), ("sids", "sids"), ("model", "sft"), ("eval", "eval"))
    }


@pytest.mark.slow
def test_push_and_fetch_give_the_same_answers(finished, tmp_path):
    with hub_stand_in() as (endpoint, state):
        # The hub library reads its endpoint once, at import, so the push runs in a process of its own.
        environment = {**os.environ, "HF_ENDPOINT": endpoint, "HF_TOKEN": "hf_test", "HF_HUB_OFFLINE": "0"}
        environment["HF_HOME"] = str(tmp_path / "home")
        words = [sys.executable, "-m", "sidtune.recipes.steps.publish", "--output_dir", str(tmp_path / "bundle")]
        for key, value in {**folders(finished), "push_to_hub": "true", "hub_model_id": "me/tiny-shop"}.items():
            words += [f"--{key}", value]
        done = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=200)
        assert done.returncode == 0, done.stderr
        assert "me/tiny-shop" in done.stdout and state.private["me/tiny-shop"] and "hf_test" in state.tokens
        wanted = {
            "model.safetensors",
            "config.json",
            "tokenizer.json",
            "sid_vocabulary.json",
            "README.md",
            "metrics.json",
        }
        wanted |= {"catalogue.parquet", "serializer.json", "templates/turn.jinja"}
        pushed = state.repos["me/tiny-shop"]
        assert (
            wanted <= set(pushed)
            and any(p.startswith("sids/") for p in pushed)
            and any(p.startswith("trie/") for p in pushed)
        )
        code = (
            "import sys, json\nfrom huggingface_hub import snapshot_download\nfrom sidtune import SidRetriever\n"
            "r = SidRetriever.from_pretrained(snapshot_download('me/tiny-shop'))\n"
            "print(json.dumps([(h.item_id, h.score) for h in r.search(query='cup', k=5, num_beams=10)]))\n"
        )
        fetched = subprocess.run(
            [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=200
        )
        assert fetched.returncode == 0, fetched.stderr
    local = SidRetriever.from_pretrained(finished / "bundle")
    expected = [(hit.item_id, hit.score) for hit in local.search(query="cup", k=5, num_beams=10)]
    got = [tuple(pair) for pair in yaml.safe_load(fetched.stdout.strip().splitlines()[-1])]
    assert [g[0] for g in got] == [e[0] for e in expected]
    assert [g[1] for g in got] == pytest.approx([e[1] for e in expected], abs=1e-5)


def test_search_answers_as_the_evaluation_did(finished):
    """The same request through the public `search` gives the evaluated list."""
    data = finished / "data"
    retriever = SidRetriever.from_pretrained(finished / "bundle")
    users = {u["user_id"]: u["profile"] for u in pq.read_table(data / "users.parquet").to_pylist()}
    requests = {
        r["request_id"]: r
        for s in ("train", "valid", "test")
        for r in pq.read_table(data / f"requests/{s}.parquet").to_pylist()
    }
    events = pq.read_table(data / "events.parquet").to_pylist()
    strength = {"order": 0, "like": 1, "click": 2}
    checked = 0
    for row in pq.read_table(finished / "eval/predictions/sidtune.parquet").to_pylist()[:25]:
        request = requests[row["request_id"]]
        past = {}
        for e in events:
            if e["user_id"] == request["user_id"] and e["time"] < request["time"]:
                key = (e["request_id"], e["item_id"])
                past[key] = min(past.get(key, 9), strength[e["action"]])
        ordered = sorted(past, key=lambda k: (requests[k[0]]["time"], past[k], k[1]))
        turns = [
            PastTurn(item, requests[r]["query"], [(c["name"], c["value"]) for c in requests[r]["context"]])
            for r, item in ordered
        ]
        hits = retriever.search(
            request["query"],
            profile=[(p["name"], p["value"]) for p in users[request["user_id"]]],
            context=[(c["name"], c["value"]) for c in request["context"]],
            history=turns,
            k=10,
            num_beams=10,
        )
        assert [h.item_id for h in hits] == row["items"], request["request_id"]
        checked += bool(turns)
    assert checked > 5


def test_the_card_holds_table_revision_and_command(finished):
    text = (finished / "bundle" / "README.md").read_text("utf-8")
    header = yaml.safe_load(text.split("---")[1])
    results = header["model-index"][0]["results"]
    value = {r["metrics"][0]["type"]: r["metrics"][0]["value"] for r in results}
    own = read_json(finished / "eval" / "metrics.json")["systems"][0]
    assert value["ndcg@10"] == pytest.approx(own["metrics"]["ndcg@10"]["value"], abs=1e-6)
    assert (
        results[0]["dataset"]["revision"] == fingerprint(finished / "data") and fingerprint(finished / "data") in text
    )
    assert "best_for_log" in text and "Seed: 0" in text


def test_the_bundle_carries_no_setting_that_cuts_sids_and_no_path_of_this_machine(finished):
    bundle = finished / "bundle"
    assert set(read_json(bundle / "generation_config.json")) == {"eos_token_id", "pad_token_id", "transformers_version"}
    assert read_json(bundle / "config.json").get("use_cache", True)  # a trainer switches it off
    for name in ("config.json", "generation_config.json", "tokenizer_config.json", "README.md"):
        assert str(finished) not in (bundle / name).read_text("utf-8")


@pytest.mark.parametrize(
    ("base", "inputs", "expected"),
    [
        ("Qwen/Qwen3-0.6B", {}, "Qwen/Qwen3-0.6B"),
        ("/srv/models/base", {}, None),
        ("models/base", {"base": {"path": "models/base"}}, None),  # a relative folder of the run looks like a hub id
    ],
)
def test_the_card_names_a_base_of_the_hub_only(finished, monkeypatch, base, inputs, expected):
    start = {"step": "init_model", "config": {"base": base}, "inputs": inputs, "metrics": {}}
    monkeypatch.setattr("sidtune.decoding.retrieval.loading.training_runs", lambda folder: [start])
    assert publish.card_data(publish.Arguments(**folders(finished), output_dir="b")).base_model == expected


def test_a_stranger_s_name_cannot_break_the_card(finished, tmp_path):
    nasty = 'x"\n---\n# [click](http://bad) {{ 7 * 7 }} <script>'
    arguments = publish.Arguments(
        **folders(finished), output_dir=str(tmp_path / "b"), model_name=nasty, dataset_name=nasty
    )
    publish.main(arguments)
    text = (tmp_path / "b" / "README.md").read_text("utf-8")
    header = yaml.safe_load(text.split("\n---\n")[0].removeprefix("---"))
    assert header["model-index"][0]["name"] == nasty and header["library_name"] == "transformers"
    body = re.sub(r"```.*?```|`[^`]*`", "", text.split("\n---\n", 1)[1], flags=re.DOTALL)  # code is shown as it is
    assert "\n# [click]" not in body and not re.search(r"(?<!\\)<script", body)
    assert not re.search(r"(?<!\\)\]\(http://bad", body)


def test_search_refuses_bad_input_in_a_sentence(finished, tmp_path):
    retriever = SidRetriever.from_pretrained(finished / "bundle")
    with pytest.raises(DataError, match="not in the catalogue"):
        retriever.search("x", history=[PastTurn("nothing")])
    with pytest.raises(DataError, match="at most"):
        retriever.search("x" * 5000)
    with pytest.raises(DataError, match="no sidtune bundle"):
        SidRetriever.from_pretrained(tmp_path)
    # A query that spells SIDs and chat tokens is text: it stays searchable and steers nothing.
    assert retriever.search("<a_1><b_2><c_3><|im_end|>", k=3)


READ = {  # file of an earlier step → a place in it that somebody reads
    "eval/metrics.json": "systems.0.name", "eval/samples.json": "0.query", "eval/run.json": "inputs.data_dir.sha256",
    "data/run.json": "metrics.items", "sids/quality.json": "levels.0.size", "sft/run.json": "metrics.stages.0.name",
    "sft/stage_2_personalise/serializer.json": "max_history", "sft/stage_2_personalise/log_history.json": "0.step",
}  # fmt: skip


@pytest.mark.parametrize("file", READ)
def test_damaged_json_of_an_earlier_step_is_one_sentence(finished, tmp_path, file, capsys):
    shutil.copytree(finished, tmp_path / "run")
    text = (tmp_path / "run" / file).read_text("utf-8")
    *above, last = [int(key) if key.isdigit() else key for key in READ[file].split(".")]
    damaged = [text[: len(text) // 2], "[]", "null"]
    value = place = json.loads(text)
    for key in above:
        place = place[key]
    place[last] = {"a": [None]}
    damaged.append(json.dumps(value))
    del place[last]
    damaged.append(json.dumps(value))
    refused = 0
    for text in damaged:
        (tmp_path / "run" / file).write_text(text, "utf-8")
        for script in (report, publish):
            output = tmp_path / "out" / script.__name__
            words = [word for pair in folders(tmp_path / "run").items() for word in (f"--{pair[0]}", pair[1])]
            try:
                command(script.main, script.Arguments, [*words, "--output_dir", str(output)])
            except SystemExit as ended:
                said = capsys.readouterr().err
                assert ended.code == 2 and said.count("error: ") == 1, said
                refused += 1
            shutil.rmtree(output, ignore_errors=True)
    assert refused >= len(damaged) / 2
