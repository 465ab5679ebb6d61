"""A pipeline small enough for tests: a ShopWorld of 150 items and a model of a few thousand weights."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import yaml

SHOP = {"n_items": 150, "n_users": 40, "n_requests": 700, "n_departments": 2, "leaves_per_department": 4}
TINY = {
    "model_type": "qwen3",
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "intermediate_size": 48,
    "tie_word_embeddings": True,
}
TRAIN = {"per_device_train_batch_size": 16, "learning_rate": 0.003, "num_train_epochs": 1, "logging_steps": 5}
PIPELINE: dict[str, Any] = {
    "name": "tiny",
    "steps": [
        {"name": "data", "script": "build_data", "args": {"reader": "shop_world", "options": SHOP}},
        {
            "name": "sids",
            "script": "learn_sids",
            "inputs": {"data_dir": "data"},
            "args": {
                "encoder": {"name": "tfidf_svd", "dims": 16},
                "quantizer": {"name": "residual_kmeans", "level_sizes": [8, 8, 8]},
            },
        },
        {
            "name": "model",
            "script": "init_model",
            "inputs": {"data_dir": "data", "sids_dir": "sids"},
            "args": {"scratch": TINY, "text_vocab_size": 512},
        },
        {
            "name": "sft",
            "script": "sft",
            "inputs": {"data_dir": "data", "sids_dir": "sids", "model_dir": "model"},
            "args": {
                "prompt_max_length": 256,
                "stages": [
                    {"name": "align", "tasks": {"item_to_sid": {}}, "max_length": 256, "args": dict(TRAIN)},
                    {"name": "personalise", "tasks": {"whole_history": {}}, "max_length": 256, "args": dict(TRAIN)},
                ],
            },
        },
        {
            "name": "eval",
            "script": "evaluate",
            "inputs": {"data_dir": "data", "sids_dir": "sids", "model_dir": "sft"},
            "args": {"num_beams": 10, "ks": [5, 10], "samples": 200},
        },
        {
            "name": "bundle",
            "script": "publish",
            "inputs": {"data_dir": "data", "sids_dir": "sids", "model_dir": "sft", "eval_dir": "eval"},
            "args": {"model_name": "tiny"},
        },
        {
            "name": "report",
            "script": "report",
            "inputs": {"data_dir": "data", "sids_dir": "sids", "model_dir": "sft", "eval_dir": "eval"},
        },
    ],
}


GRPO_STEP = {
    "name": "grpo",
    "script": "grpo",
    "inputs": {"data_dir": "data", "sids_dir": "sids", "model_dir": "sft"},
    "args": {
        "max_requests": 40,
        "rewards": {"list_ndcg": 1.0, "prefix_match": 0.3},
        "args": {
            "num_generations": 4, "per_device_train_batch_size": 16, "learning_rate": 1e-3, "beta": 0.02, "max_steps": 3,
            "logging_steps": 1, "save_strategy": "no",
        },
    },
}  # fmt: skip
_FEW_STEPS = {"max_steps": 3, "save_strategy": "no", "per_device_train_batch_size": 4}
POST_RANK_STEP = {
    "name": "post_rank",
    "script": "post_rank",
    "inputs": {"data_dir": "data", "sids_dir": "sids", "model_dir": "grpo"},
    "args": {
        "source": {
            "kind": "generator", "num_beams": 8, "candidates": 4, "train": 40, "valid": 10, "test": 20, "shard_size": 16
        },
        "methods": ["greedy"],
        "metrics": {"ks": [4], "gain": "linear"},
        "primary": "ndcg@4",
        "seeds": [0],
        "samples": 100,
        "training": {
            "scratch": {"model_type": "llama", "hidden_size": 16, "num_hidden_layers": 1, "intermediate_size": 24},
            "vocab_size": 320, "train": "all", "adaptation_trains": "all", "adaptation": _FEW_STEPS,
            "post_rank": _FEW_STEPS, "d_h": 8, "max_history": 2,
        },
    },
}  # fmt: skip


def pipeline() -> dict[str, Any]:
    """A fresh copy to change: data to report with SFT alone."""
    return copy.deepcopy(PIPELINE)


def whole_pipeline() -> dict[str, Any]:
    """The steps of the quickstart: also GRPO, whose model is evaluated beside that of SFT, and post-ranking of its lists."""
    values = pipeline()
    steps = {step["name"]: step for step in values["steps"]}
    steps["eval"]["inputs"] |= {"model_dir": "grpo", "start_dir": "sft"}
    steps["eval"]["args"]["start_name"] = "sft"
    steps["bundle"]["inputs"]["model_dir"] = "grpo"
    steps["report"]["inputs"] |= {"grpo_dir": "grpo", "post_rank_dir": "post_rank"}
    added = copy.deepcopy({"grpo": GRPO_STEP, "post_rank": POST_RANK_STEP})
    order = ("data", "sids", "model", "sft", "grpo", "eval", "post_rank", "bundle", "report")
    return {**values, "steps": [{**steps, **added}[name] for name in order]}


def write_pipeline(path: Path, values: dict[str, Any] | None = None) -> Path:
    """Writes the pipeline as YAML."""
    path.write_text(yaml.safe_dump(values or PIPELINE, sort_keys=False), "utf-8")
    return path


def run_in_process(values: dict[str, Any], output_dir: Path, until: str | None = None) -> Path:
    """Runs the steps in this process, one after another, without the launcher."""
    import importlib

    from sidtune.core.pipeline import RunArguments, resolve

    for step in resolve(RunArguments(steps=values["steps"], output_dir=str(output_dir))):
        importlib.import_module(step.module).main(step.config)
        if step.name == until:
            break
    return output_dir
