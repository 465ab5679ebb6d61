"""The installed TRL has every name we rely on, and a missing one is told in a clear sentence before any training."""

from __future__ import annotations

import ast

import pytest
import trl.trainer.utils
from sft_stand_ins import random_examples, tiny_model, tiny_tokenizer
from trl import SFTConfig, SFTTrainer

from sidtune.core.errors import SidtuneError
from sidtune.trainers.common import trl_surface
from sidtune.trainers.common.trl_surface import NAMES, Name, check, missing
from sidtune.trainers.sft.trainer import SidSFTTrainer


def test_the_installed_versions_have_every_name():
    assert missing() == []
    check()
    assert len({name.path for name in NAMES}) == len(NAMES)
    assert all(name.why for name in NAMES)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        (Name("trl.trainer.sft_trainer:SFTTrainer.compute_los", "", "the loss"), "SFTTrainer.compute_los .the loss."),
        (Name("trl.trainer.no_such_file:Thing", "", "nothing"), "no_such_file:Thing"),
        (Name("trl.trainer.sft_config:SFTConfig", "max_length max_len", "limits"), "'max_len' of trl.trainer.sft"),
        (Name("trl.trainer.utils:add_fused_lm_head", "model kind", "loss"), "'kind' of trl.trainer.utils"),
    ],
)
def test_a_missing_name_is_told_with_the_versions(name, words):
    with pytest.raises(SidtuneError, match=words) as caught:
        check((*NAMES, name))
    text = str(caught.value)
    assert "trl>=1.16,<1.17" in text and "transformers>=5.20,<6" in text and "\n" not in text


def test_the_trainer_checks_before_it_does_anything(monkeypatch, tmp_path):
    monkeypatch.delattr(trl.trainer.utils, "_use_triton")
    config = SFTConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False, activation_checkpointing=False)
    with pytest.raises(SidtuneError, match="_use_triton"):
        SidSFTTrainer(tiny_model(), config, random_examples(4), None, tiny_tokenizer())


def test_every_method_we_override_is_in_the_table(repo_root):
    """The overriding points are read from the source, so a new one cannot be forgotten in the table."""
    tree = ast.parse((repo_root / "trainers" / "sft" / "trainer.py").read_text("utf-8"))
    (ours,) = [n for n in tree.body if isinstance(n, ast.ClassDef) and n.name == "SidSFTTrainer"]
    methods = {n.name for n in ours.body if isinstance(n, ast.FunctionDef)}
    overridden = {name for name in methods if hasattr(SFTTrainer, name)}
    listed = {name.path.rpartition(".")[2] for name in NAMES if name.path.startswith(trl_surface._TRAINER)}
    assert {"compute_loss", "log", "_get_train_sampler"} <= overridden <= listed
    docstring = ast.get_docstring(tree)
    assert all(f"`{name}`" in docstring for name in overridden)


def test_the_version_range_is_that_of_the_package(repo_root):
    text = (repo_root / "pyproject.toml").read_text("utf-8")
    assert f'"trl{trl_surface.TRL_VERSIONS}"' in text
    assert f'"transformers{trl_surface.TRANSFORMERS_VERSIONS}"' in text
    assert f'"accelerate{trl_surface.ACCELERATE_VERSIONS}"' in text
