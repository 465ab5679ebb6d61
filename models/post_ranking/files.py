"""LoRA for the post-ranking model, and its folders: whole, layout A, layout B; local or on the hub.

| folder | holds | made by | loaded as |
|---|---|---|---|
| whole | all weights | `save_pretrained` without LoRA | `PostRankForCausalLM` |
| layout A | one PEFT adapter file: LoRA and both adapters (`modules_to_save`) | `add_lora(model, "A")` | `PeftModel` around it |
| layout B | `qia.safetensors`, and LoRA files if any | `add_lora(model, "B")`, or `save_adapters` | `PostRankForCausalLM` |

A and B hold no weight of the language model; it is loaded again from `config.base_model_name_or_path`, or given. Layout B keeps the
adapters out of PEFT, whose `modules_to_save` has been broken under ZeRO-3 (peft #1450, DeepSpeed #7669). LoRA is r = 32,
alpha = 32, dropout 0.1 on the query and key projections, as in LLM4PR (arXiv 2411.01178), or on a fused projection where there
is no other.
"""

from __future__ import annotations

import contextlib
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import PreTrainedModel

from sidtune.core.errors import ConfigError, DataError, nearest
from sidtune.core.finite import check_weights
from sidtune.core.folders import read_json, write_json
from sidtune.core.hub import push_folder, resolve_folder
from sidtune.models.post_ranking.config import PostRankConfig

QIA_FILE = "qia.safetensors"
LORA_FILE = "adapter_config.json"
SIDES = ("qia_user", "qia_item")
_SPLIT = ("q_proj", "k_proj")
_FUSED = ("c_attn", "W_pack", "qkv_proj", "query_key_value", "Wqkv")


def check_lora(where: str = "LoRA", *, r: Any = 32, alpha: Any = 32, dropout: Any = 0.1, targets: Any = None) -> None:
    """Raises ConfigError for options of `add_lora` that make no LoRA."""
    known = {
        "r": (isinstance(r, int) and r >= 1, "a whole number of at least 1", r),
        "alpha": (isinstance(alpha, (int, float)) and 0 < alpha < float("inf"), "a number above 0", alpha),
        "dropout": (isinstance(dropout, (int, float)) and 0 <= dropout < 1, "a share in [0, 1)", dropout),
        "targets": (targets is None or (isinstance(targets, (list, tuple)) and targets), "names of layers", targets),
    }
    for name, (fine, wanted, value) in known.items():
        if not fine:
            raise ConfigError(f"{where}: {name} must be {wanted}, got {value!r}; correct it.")


def lora_targets(language_model: nn.Module) -> tuple[str, ...]:
    """Names of the linear layers LoRA goes on: q_proj and k_proj, or the fused projection.

    Raises:
        ConfigError: the model has neither; name them yourself.
    """
    found = {name.rpartition(".")[2] for name, _ in language_model.named_modules()}
    for names in (_SPLIT, *[(name,) for name in _FUSED]):
        if found.issuperset(names):
            return names
    raise ConfigError(
        "The language model has no q_proj and k_proj and no fused projection known here; name lora targets yourself."
    )


def add_lora(
    model: Any,
    layout: str = "A",
    *,
    r: int = 32,
    alpha: int = 32,
    dropout: float = 0.1,
    targets: tuple[str, ...] | None = None,
) -> Any:
    """Freezes the language model and puts LoRA on it; the adapters stay trainable.

    Args:
        layout: `A` returns a PEFT model around `model`, `B` returns `model` with a PEFT language model inside.
        r, alpha, dropout: of LoRA; the scale is alpha / r.
        targets: layer names inside the language model, default `lora_targets`.

    Raises:
        ConfigError: an unknown layout, or no target.
    """
    from peft import LoraConfig, get_peft_model

    if layout not in ("A", "B"):
        raise ConfigError(
            f"The layout must be 'A' (one PEFT adapter) or 'B' (LoRA inside, for ZeRO-3), got {layout!r}."
        )
    check_lora(r=r, alpha=alpha, dropout=dropout, targets=targets)
    inner = {name.rpartition(".")[2] for name, _ in model.language_model.named_modules()}
    if unknown := sorted({*(targets or ())} - inner):
        raise ConfigError(f"LoRA: the language model has no layer '{unknown[0]}': {nearest(unknown[0], inner - {''})}")
    names = "|".join(re.escape(name) for name in targets or lora_targets(model.language_model))
    settings = {"r": r, "lora_alpha": alpha, "lora_dropout": dropout}
    settings["fan_in_fan_out"] = any(type(module).__name__ == "Conv1D" for module in model.language_model.modules())
    if layout == "A":
        kept = [side for side in SIDES if getattr(model, side) is not None]
        inside = rf"language_model\..*\.({names})"
        return get_peft_model(model, LoraConfig(target_modules=inside, modules_to_save=kept, **settings))
    lora = LoraConfig(target_modules=rf".*\.({names})", task_type="CAUSAL_LM", **settings)
    model.language_model = get_peft_model(model.language_model, lora)
    for parameter in model.adapter_parameters():
        parameter.requires_grad_(True)
    return model


def merge_post_rank(model: Any) -> Any:
    """The plain model of either layout with LoRA merged into the weights; it is saved whole."""
    return model.merge_and_unload() if _is_layout_a(model) else model.merge()


def _is_layout_a(model: Any) -> bool:
    return hasattr(model, "get_base_model")  # a PEFT model around the post-ranking model


def forget_layout(folder: str | Path) -> None:
    """Removes what tells the layout of a former save into the same folder, which would be taken for the new one's."""
    for name in (QIA_FILE, LORA_FILE):
        (Path(folder) / name).unlink(missing_ok=True)


def save_adapters(model: Any, folder: str | Path, *, state_dict: dict | None = None) -> None:
    """Writes layout B: config, adapters, and LoRA if there is any; no weight of the language model.

    Args:
        state_dict: gathered weights, where the live ones are sharded (Trainer passes it under ZeRO-3).
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    forget_layout(folder)
    weights = model.state_dict() if state_dict is None else state_dict
    kept = {key: value.detach().cpu().contiguous() for key, value in weights.items() if key.split(".")[0] in SIDES}
    if any(value.numel() == 0 for value in kept.values()):
        raise DataError("The adapters' weights are sharded; pass the gathered state_dict to save them.")
    if hasattr(model.language_model, "peft_config"):
        prefix = "language_model."
        inner = None
        if state_dict is not None:
            inner = {key.removeprefix(prefix): value for key, value in state_dict.items() if key.startswith(prefix)}
        model.language_model.save_pretrained(folder, state_dict=inner, save_embedding_layers=False)
    save_file(kept, folder / QIA_FILE, metadata={"format": "pt"})
    model.config.save_pretrained(folder)


def save_post_rank(model: Any, folder: str | Path, processor: Any = None) -> None:
    """Writes a model of any layout, and its processor, into one folder."""
    folder = Path(folder)
    if _is_layout_a(model):
        forget_layout(folder)
        model.save_pretrained(folder, save_embedding_layers=False)
        model.get_base_model().config.save_pretrained(folder)
    else:
        model.save_pretrained(folder)
    if processor is not None:
        processor.save_pretrained(folder)


def push_post_rank(model: Any, repo_id: str, processor: Any = None, **options: Any) -> str:
    """Uploads what `save_post_rank` writes; returns the address of the commit.

    Args:
        options: as in `push_folder`.

    Raises:
        DataError: the hub refused, with its reason.
    """
    options.setdefault("commit_message", "Upload a post-ranking model with sidtune")
    with tempfile.TemporaryDirectory() as scratch:
        save_post_rank(model, scratch, processor)
        _forget_local_base(Path(scratch))
        return push_folder(scratch, repo_id, **options)


def _forget_local_base(folder: Path) -> None:
    """A folder of this machine is no name for others: who loads the upload is asked for the language model instead."""
    for file in (folder / "config.json", folder / "adapter_config.json"):
        record = read_json(file) if file.exists() else {}
        if record.get("base_model_name_or_path") and Path(record["base_model_name_or_path"]).exists():
            write_json(file, {**record, "base_model_name_or_path": None})
            (folder / "README.md").unlink(missing_ok=True)  # PEFT's card, which names it too


def load_post_rank(
    kind: Any,
    folder_or_repo: str | Path,
    *,
    base: PreTrainedModel | str | Path | None = None,
    is_trainable: bool = False,
    revision: str | None = None,
    token: str | None = None,
    cache_dir: str | Path | None = None,
    **options: Any,
) -> Any:
    """Loads a folder or hub repository of any layout; it is `PostRankForCausalLM.from_pretrained`.

    Args:
        kind: the class of the model.
        folder_or_repo: folder or hub id.
        base: the language model of layouts A and B, or where it is; default the one the config names.
        is_trainable: leave LoRA and adapters trainable.
        revision, token, cache_dir: of the hub.
        options: of `from_pretrained`, for example `dtype` (adapters stay in float32).

    Returns:
        `PostRankForCausalLM`, in layout A inside a `PeftModel`.

    Raises:
        DataError: nothing there, or the language model is not found or another one.
    """
    folder = find_folder(folder_or_repo, revision=revision, token=token, cache_dir=cache_dir)
    lora, adapters = (folder / LORA_FILE).exists(), (folder / QIA_FILE).exists()
    options.pop("config", None)
    with _one_sentence("post-ranking model", folder):
        if not lora and not adapters:
            model = kind.load_whole(folder, **options)
            check_weights(model, folder)
            return model
        model = _around_base(kind, PostRankConfig.from_pretrained(folder), base, folder, options)
        if not adapters:
            from peft import PeftModel

            model = PeftModel.from_pretrained(model, folder, is_trainable=is_trainable)
            check_weights(model, folder)
            return model
        _load_adapters(model, folder)
        if lora:
            from peft import PeftModel

            model.language_model = PeftModel.from_pretrained(model.language_model, folder, is_trainable=is_trainable)
        check_weights(model, folder)
    for parameter in model.adapter_parameters():
        parameter.requires_grad_(is_trainable)
    return model.eval()


def _around_base(kind: Any, config: PostRankConfig, base: Any, folder: Path, options: dict[str, Any]) -> Any:
    base = config.base_model_name_or_path if base is None else base
    if base is None:
        raise DataError(
            f"The config in {folder} names no language model and none was given; pass base=<model, folder or hub id>."
        )
    if not isinstance(base, PreTrainedModel) and config.base_model_revision:
        options = {"revision": config.base_model_revision, **options}
    return kind.from_base(base, config, **({} if isinstance(base, PreTrainedModel) else options))


def _load_adapters(model: Any, folder: Path) -> None:
    weights = load_file(folder / QIA_FILE)
    wanted = {key: value.shape for key, value in model.state_dict().items() if key.split(".")[0] in SIDES}
    found = {key: value.shape for key, value in weights.items()}
    if wanted != found:
        wrong = sorted(key for key in wanted.keys() | found.keys() if wanted.get(key) != found.get(key))
        raise DataError(
            f"{QIA_FILE} in {folder} does not fit its config and language model (first difference: '{wrong[0]}')."
        )
    with torch.no_grad():
        model.load_state_dict(weights, strict=False)


def find_folder(folder_or_repo: str | Path, **hub: Any) -> Path:
    """The local folder of a model, downloaded where a hub id was given. Raises DataError when there is neither."""
    folder = resolve_folder(folder_or_repo, what="post-ranking model", **hub)
    if not (folder / "config.json").is_file():
        raise DataError(
            f"{folder} is no folder of a post-ranking model, as it has no config.json; name the folder it was saved in."
        )
    return folder


@contextlib.contextmanager
def _one_sentence(what: str, folder: Path) -> Iterator[None]:
    """Turns what the libraries below raise on unreadable files into a DataError."""
    try:
        yield
    except (DataError, ConfigError):
        raise
    except Exception as error:  # transformers, safetensors, peft and the hub client each raise their own kinds here
        reason = " ".join(str(error).split())[:300].rstrip(".")
        raise DataError(
            f"No {what} can be read from {folder} ({type(error).__name__}: {reason}); check the folder, or the language "
            "model its config names."
        ) from error
