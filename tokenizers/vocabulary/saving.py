"""Saves what was trained, and nothing else: new rows and LoRA factors beside a reference to the base model.

| mode | files of `save_trained` |
|---|---|
| rows | `sid_rows.safetensors`: the new rows of embedding and untied head, n x d each |
| lora | a PEFT adapter with the new rows as PEFT's own trainable tokens, so `PeftModel.from_pretrained` has them too |
| all | a plain model folder |

To each come the tokenizer, `sid_vocabulary.json` and, for rows and lora, `trained.json`: the base, a checksum of the
file and a few values of every base weight, by which a wrong base is recognised. `merge_and_save` writes a plain model
folder for serving. Our choice; no paper is involved. (Peers save the whole matrix beside an adapter, hundreds of MB.)
"""

from __future__ import annotations

import copy
import os
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from sidtune.core.errors import ConfigError, DataError
from sidtune.core.folders import fingerprint, read_json, write_json
from sidtune.tokenizers.base_models.loading import check_place, load_plain, load_tokenizer
from sidtune.tokenizers.base_models.settings import clean_settings
from sidtune.tokenizers.vocabulary.embedding_init import OldRows
from sidtune.tokenizers.vocabulary.extension import Vocabulary, fill_spare_rows
from sidtune.tokenizers.vocabulary.token_matrices import base_of, gathered, grow, is_split, vocab_matrices
from sidtune.tokenizers.vocabulary.trainable_tokens import ROWS, plain_model, split_matrices, split_rows, trained_rows

TRAINED_FILE, ROWS_FILE, ADAPTER_FILE = "trained.json", "sid_rows.safetensors", "adapter_model.safetensors"
_ADAPTER_CONFIG = "adapter_config.json"
_PEFT_PREFIX, _PEFT_ROWS = "base_model.model.", ".token_adapter.trainable_tokens_delta"
_PROBED = 4  # values kept of each base weight


def save_trained(
    model: nn.Module,
    vocabulary: Vocabulary,
    tokenizer: PreTrainedTokenizerBase,
    folder: str | Path,
    *,
    base_model: str | Path | None = None,
    state_dict: dict[str, torch.Tensor] | None = None,
    is_main_process: bool = True,
) -> None:
    """Writes what `set_trainable` let train into `folder`, which is made if missing.

    For a folder that is written whole or not at all give the scratch folder of `write_folder`.

    Args:
        model, vocabulary, tokenizer: what `set_trainable` returned, unwrapped (`accelerator.unwrap_model`), and its own.
        base_model: folder or hub id of the base, default the one the model was loaded from. A folder is stored relative
            to `folder`, so both can move together.
        state_dict: whole weights of a sharded model in mode "all" (`accelerator.get_state_dict`).
        is_main_process: only True writes. On a sharded model call this on every process, because gathering is
            collective.

    Raises:
        ConfigError: the base is not known, `folder` holds a full model, or a sharded model in mode "all" without
            `state_dict`.
    """
    folder = Path(folder)
    split = bool(split_matrices(model))
    record = tensors = None
    if split:
        base = _base_reference(model, base_model, folder)
        rows = trained_rows(model)
        lora = hasattr(model, "peft_config")
        tensors = {**_lora_state(model), **_peft_rows(rows)} if lora else rows
        record = {"format": 1, "mode": "lora" if lora else "rows", "base_model": base, "matrices": sorted(rows)}
        record |= {"spare_rows_mean": _spare_rows_mean(model, vocabulary), "base_probe": base_probe(model, vocabulary)}
    elif hasattr(model, "peft_config"):
        raise ConfigError("The adapter was not made by set_trainable, so its SID rows are unknown; merge it first.")
    elif is_main_process and state_dict is None and any(is_split(parameter) for parameter in model.parameters()):
        raise ConfigError("A sharded model needs state_dict=accelerator.get_state_dict(model) to be saved whole.")
    if not is_main_process:
        return
    if split and (folder / "config.json").exists():
        raise ConfigError(f"The folder {folder} holds a full model; choose another folder for the trained rows.")
    folder.mkdir(parents=True, exist_ok=True)
    for stale in (TRAINED_FILE, ROWS_FILE, ADAPTER_FILE, _ADAPTER_CONFIG):
        (folder / stale).unlink(missing_ok=True)
    if record is not None and tensors is not None:
        name = ADAPTER_FILE if record["mode"] == "lora" else ROWS_FILE
        save_file({key: value.contiguous() for key, value in tensors.items()}, folder / name, metadata={"format": "pt"})
        if record["mode"] == "lora":
            _save_peft_config(model, vocabulary, record, folder)
        write_json(folder / TRAINED_FILE, {**record, "file": name, "sha256": fingerprint(folder / name)})
    else:
        clean_settings(model, tokenizer, range(vocabulary.start, vocabulary.stop))
        model.save_pretrained(folder, state_dict=state_dict)  # type: ignore[operator]
    tokenizer.save_pretrained(folder)
    vocabulary.save_pretrained(folder)


def _base_reference(model: nn.Module, given: str | Path | None, folder: Path) -> str:
    name = os.fspath(given) if given is not None else getattr(base_of(model), "name_or_path", "") or ""
    if not name:
        raise ConfigError(
            "The base model was never saved, so the new rows would belong to nothing; save the extended model first "
            "and load it, or pass base_model=."
        )
    if not Path(name).is_dir():
        return name
    return Path(os.path.relpath(Path(name).resolve(), folder.resolve())).as_posix()


def _resolve_base(reference: str, folder: Path) -> str:
    beside = folder / reference
    return os.fspath(beside.resolve()) if beside.is_dir() else reference


def _lora_state(model: nn.Module) -> dict[str, torch.Tensor]:
    from peft import get_peft_model_state_dict

    state = {}
    for name, parameter in model.named_parameters():
        if "lora_" in name or "modules_to_save" in name:
            with gathered(parameter) as whole:
                state[name] = whole.detach().cpu().clone()
    found = get_peft_model_state_dict(model, state_dict=state, save_embedding_layers=False)
    return {key: value for key, value in found.items() if f".{ROWS}." not in key}


def _peft_rows(rows: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {f"{_PEFT_PREFIX}{name}{_PEFT_ROWS}": value for name, value in rows.items()}


def _save_peft_config(model: nn.Module, vocabulary: Vocabulary, record: dict[str, Any], folder: Path) -> None:
    config = copy.deepcopy(model.peft_config["default"])  # type: ignore[index, union-attr]
    others = [name for name in config.modules_to_save or [] if name != ROWS]
    config.modules_to_save = others or None
    ids = vocabulary.sid_token_ids.tolist()
    config.trainable_token_indices = dict.fromkeys(record["matrices"], ids)
    config.base_model_name_or_path = record["base_model"]
    config.inference_mode = True
    config.save_pretrained(folder)


def base_probe(model: nn.Module, vocabulary: Vocabulary) -> dict[str, dict[str, Any]]:
    """A few values of every base weight, of token matrices only from the old rows. Collective when sharded."""
    base = base_of(model)
    tokens = {id(matrix.parameter) for matrix in vocab_matrices(model)}
    found = {}
    for name, parameter in base.named_parameters():
        if not parameter.is_floating_point() or "lora_" in name or f"{ROWS}." in name or "modules_to_save" in name:
            continue
        with gathered(parameter) as whole:
            known = whole[: vocabulary.base_vocab_size] if id(parameter) in tokens else whole
            flat = known.reshape(-1)
            places = torch.linspace(0, flat.numel() - 1, _PROBED, dtype=torch.float64).long().to(flat.device)
            values = flat[places].float().tolist()
        dtype = str(parameter.dtype).removeprefix("torch.")
        found[name.replace(".base_layer.", ".").replace(".original_module.", ".")] = {"dtype": dtype, "values": values}
    return found


def _far_from_mean(rows: torch.Tensor, vocabulary: Vocabulary) -> bool:
    """Whether a spare row is further from the mean row than rounding explains."""
    old, spare = OldRows(rows[: vocabulary.base_vocab_size]), rows[vocabulary.stop :].detach().float().cpu().numpy()
    return bool(spare.size) and float(abs(spare - old.mean).max()) > 0.05 * old.deviation


def _spare_rows_mean(model: nn.Module, vocabulary: Vocabulary) -> bool:
    """Whether the rows behind the last token still are what `extend_vocabulary` makes of an original base."""
    for matrix in split_matrices(model):
        with gathered(matrix.parameter) as whole:
            if _far_from_mean(whole, vocabulary):
                return False
    return True


def check_base(model: PreTrainedModel, vocabulary: Vocabulary, expected: dict[str, Any], where: str) -> None:
    """Raises DataError unless the weights are those `expected` was taken from, in the same or another float dtype."""
    found = base_probe(model, vocabulary)
    absent = [name for name in expected if name not in found]
    if absent or not expected:
        raise DataError(
            f"{where} was trained on another base model than this {type(model).__name__}, which has no weight "
            f"'{absent[0] if absent else ''}'; give the base it was trained on."
        )
    for name in expected:
        kept, got = (torch.tensor(probe[name]["values"]) for probe in (expected, found))
        old, new = (getattr(torch, probe[name]["dtype"]) for probe in (expected, found))
        same = torch.equal(kept.to(new).float(), got) or torch.equal(got.to(old).float(), kept)
        half = torch.finfo(old).bits <= 16 and torch.finfo(new).bits <= 16 and old != new
        if not same and not (half and torch.allclose(kept, got, rtol=2**-6, atol=1e-6)):
            raise DataError(
                f"{where} was trained on another base model: the weight '{name}' differs; give the base it was trained "
                "on, unchanged."
            )


def load_trained(
    folder: str | Path, base_model: str | Path | PreTrainedModel | None = None, merge: bool = False, **options: Any
) -> tuple[nn.Module, PreTrainedTokenizerBase, Vocabulary]:
    """Loads what `save_trained` or `merge_and_save` wrote, in evaluation mode.

    Args:
        base_model: the base, as folder, hub id or loaded model (changed in place); default the one that was stored. It
            may be the original model without SID tokens: then it grows here.
        merge: merge a LoRA adapter, so that the model is a plain one.
        options: `dtype` and other options of `load_plain`.

    Returns:
        `(model, tokenizer, vocabulary)`; the model is plain, rows in place, or a frozen `PeftModel` around a plain one
        (mode lora, not merged).

    Raises:
        DataError: missing, damaged or changed files, another base, rows that do not fit the vocabulary.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise DataError(f"The model folder {folder} does not exist; check the path or run the step that writes it.")
    vocabulary = Vocabulary.from_pretrained(folder)
    if (folder / TRAINED_FILE).exists():
        record, tensors = _read_trained(folder, vocabulary)
        model: nn.Module = _loaded_base(folder, record, base_model, vocabulary, options)
        check_base(model, vocabulary, record["base_probe"], str(folder))  # type: ignore[arg-type]
        _put_rows(model, vocabulary, tensors, record, folder)
        if record["mode"] == "lora":
            model = _with_adapter(model, folder, tensors)  # type: ignore[arg-type]
    else:
        model = load_plain(folder, **options)
        vocabulary.check(rows=model.get_input_embeddings().weight.shape[0])
    tokenizer = load_tokenizer(folder)
    vocabulary.check(tokenizer)
    if merge:
        model = plain_model(model)
    if base_of(model) is model:
        model.name_or_path = model.config._name_or_path = str(folder)  # type: ignore[union-attr, assignment]
    return model.eval(), tokenizer, vocabulary


def _read_trained(folder: Path, vocabulary: Vocabulary) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    record = read_json(folder / TRAINED_FILE)
    keys = {"mode": str, "base_model": str, "matrices": list, "base_probe": dict, "file": str, "sha256": str}
    wrong = [key for key, kind in keys.items() if not isinstance(record, dict) or not isinstance(record.get(key), kind)]
    if wrong or record["mode"] not in ("rows", "lora") or record["file"] not in (ROWS_FILE, ADAPTER_FILE):
        raise DataError(f"The file {folder / TRAINED_FILE} is damaged ({', '.join(wrong) or 'mode'}); save again.")
    path = folder / record["file"]
    if not path.exists():
        raise DataError(f"The file {path} does not exist, but {TRAINED_FILE} names it; copy the whole folder again.")
    try:
        tensors = load_file(path)
    except (SafetensorError, OSError) as error:
        raise DataError(
            f"The file {path} is damaged ({' '.join(str(error).split())}); copy or train it again."
        ) from None
    if fingerprint(path) != record["sha256"]:
        raise DataError(f"The file {path} is not the one {TRAINED_FILE} was written for; copy the whole folder again.")
    count = vocabulary.stop - vocabulary.start
    for name in record["matrices"]:
        rows = tensors.get(_rows_key(record["mode"], name))
        if rows is None or rows.ndim != 2 or len(rows) != count:
            got = "none" if rows is None else str(tuple(rows.shape))
            raise DataError(f"{path}: expected {count} new rows of '{name}', got {got}; the vocabulary is another one.")
        if not torch.isfinite(rows).all():
            raise DataError(f"{path}: the new rows of '{name}' hold NaN or infinity; train again with a smaller step.")
    return record, tensors


def _rows_key(mode: str, name: str) -> str:
    return f"{_PEFT_PREFIX}{name}{_PEFT_ROWS}" if mode == "lora" else name


def _loaded_base(
    folder: Path, record: dict, given: str | Path | PreTrainedModel | None, vocabulary: Vocabulary, options: dict
) -> PreTrainedModel:
    if isinstance(given, PreTrainedModel):
        model = given
    else:
        place = os.fspath(given) if given is not None else _resolve_base(record["base_model"], folder)
        try:
            check_place(place)
        except DataError:
            raise DataError(
                f"The base model {place} of {folder} does not exist; put it back, or name it with base_model=."
            ) from None
        model = load_model(place, **options)
    rows = vocab_matrices(model)[0].parameter.shape[0]
    if rows < vocabulary.base_vocab_size:
        raise DataError(
            f"The base model of {folder} has {rows} token rows, fewer than the {vocabulary.base_vocab_size} tokens "
            "before the SID tokens; give the base it was trained on."
        )
    grow(model, vocabulary.embedding_rows)
    return model


@torch.no_grad()
def _put_rows(model: nn.Module, vocabulary: Vocabulary, tensors: dict, record: dict, folder: Path) -> None:
    for matrix in vocab_matrices(model):
        if not matrix.used:
            continue
        rows = tensors.get(_rows_key("rows", matrix.name), tensors.get(_rows_key("lora", matrix.name)))
        if rows is None or rows.shape[1] != matrix.parameter.shape[1]:
            raise DataError(
                f"{folder} holds no new rows that fit '{matrix.name}' of {type(model).__name__}; give the base it was "
                "trained on (tied and untied heads differ)."
            )
        matrix.parameter[vocabulary.start : vocabulary.stop] = rows.to(matrix.parameter)
        if record.get("spare_rows_mean") and _far_from_mean(matrix.parameter, vocabulary):  # an original base
            fill_spare_rows(matrix, vocabulary.base_vocab_size, vocabulary.stop)


def _adapter_config(folder: Path) -> Any:
    from peft import PeftConfig

    try:
        return PeftConfig.from_pretrained(str(folder))
    except (ValueError, TypeError, OSError) as error:
        raise DataError(f"The adapter config in {folder} is damaged ({' '.join(str(error).split())[:200]}).") from None


def _with_adapter(model: PreTrainedModel, folder: Path, tensors: dict[str, torch.Tensor]) -> nn.Module:
    from peft import get_peft_model, set_peft_model_state_dict

    config = _adapter_config(folder)
    config.trainable_token_indices = config.base_model_name_or_path = None
    config.inference_mode = True
    model = get_peft_model(model, config)  # type: ignore[assignment]
    result = set_peft_model_state_dict(model, {k: v for k, v in tensors.items() if not k.endswith(_PEFT_ROWS)})
    lost = [key for key in result.missing_keys if "lora_" in key or "modules_to_save" in key]
    if lost or result.unexpected_keys:
        raise DataError(f"The adapter in {folder} does not fit its base model ({(lost + result.unexpected_keys)[0]}).")
    return model


def load_model(folder_or_id: str | Path, **options: Any) -> PreTrainedModel:
    """A plain model, ready to train or to serve, from whatever stands in a folder.

    That is a full model, what `save_trained` wrote (its base is found by reference, everything is merged), a checkpoint
    of a LoRA run, or a hub id.

    `options`: `dtype` (default float32) and others of `load_plain`. Raises DataError when nothing readable is there.
    """
    place = Path(check_place(folder_or_id))
    if (place / TRAINED_FILE).exists():
        model = load_trained(place, merge=True, **options)[0]
    elif (place / _ADAPTER_CONFIG).exists():
        model = _load_adapter_checkpoint(place, options)
    else:
        return load_plain(folder_or_id, **options)
    model.name_or_path = model.config._name_or_path = str(place)  # type: ignore[union-attr, assignment]
    return model  # type: ignore[return-value]


def _load_adapter_checkpoint(folder: Path, options: dict[str, Any]) -> PreTrainedModel:
    from peft import PeftModel

    config = _adapter_config(folder)
    reference = config.base_model_name_or_path or ""
    if not reference:
        raise DataError(f"The adapter in {folder} names no base model; write base_model_name_or_path into its config.")
    base = load_model(_resolve_base(reference, folder), **options)
    if ROWS in (config.modules_to_save or []):
        split_rows(base, Vocabulary.from_pretrained(_resolve_base(reference, folder)))
    try:
        return plain_model(PeftModel.from_pretrained(base, str(folder))).eval()
    except (SafetensorError, ValueError, RuntimeError, OSError) as error:
        reason = " ".join(str(error).split())[:200]
        raise DataError(f"The adapter in {folder} cannot be put on its base model ({reason}).") from None


def merge_and_save(
    model: nn.Module, vocabulary: Vocabulary, tokenizer: PreTrainedTokenizerBase, folder: str | Path
) -> PreTrainedModel:
    """Writes a plain model folder for serving: LoRA and new rows merged, loadable by `from_pretrained` alone.

    Consumes `model` and returns the plain one. Raises ConfigError for a sharded model: save that with `save_trained`,
    load it with `load_model` and merge then.
    """
    plain = plain_model(model)
    save_trained(plain, vocabulary, tokenizer, folder)
    return plain
