"""A model folder is complete by itself: weights, tokenizer, SID tokens, semantic IDs, prompt settings and templates.

`complete_model_folder` writes what belongs beside the weights, `ModelFolder.open` reads it all but the weights: the one loader of
evaluation, training, publishing, export and serving. It refuses a missing part, and semantic IDs or items that are not the
model's own. Folders written before models carried the fingerprint of their semantic IDs hold no `sids/`, and the stages of `sft`
have their prompt settings in the folder above.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sidtune.core.errors import ConfigError, DataError
from sidtune.core.folders import RUN_FILE, fingerprint, read_json, read_record, read_run, write_json
from sidtune.data_builders.prompts.serializer import TEMPLATES, Serializer
from sidtune.data_builders.tables.store import DataFolder
from sidtune.tokenizers.base_models.loading import load_tokenizer
from sidtune.tokenizers.sids.query_codes import CODER_FOLDER, CODER_PARTS, QueryCoder
from sidtune.tokenizers.sids.semantic_ids import SemanticIds
from sidtune.tokenizers.vocabulary.extension import VOCABULARY_FILE, Vocabulary
from sidtune.tokenizers.vocabulary.saving import ADAPTER_FILE, ROWS_FILE, load_model

SERIALIZER_FILE, TEMPLATES_FOLDER, SIDS_FOLDER = "serializer.json", "templates", "sids"
_WEIGHTS = ("model.safetensors", "model*.safetensors", "pytorch_model*.bin", ROWS_FILE, ADAPTER_FILE)
_LONGEST_CHAIN = 100


@dataclass(frozen=True)
class PromptSettings:
    """How requests become prompts; saved beside a model so that serving renders what training rendered.

    Attributes:
        max_history: most past turns in a prompt, None for all.
        max_length: most tokens of prompt and SID together, None for no limit.
        max_chars: longest text of a field, by name (see `serializer.MAX_CHARS`).
        history_context: render the context of past turns too.
        query_sids: show the SID of a query behind its text; its coder lies beside the model.
    """

    max_history: int | None = 20
    max_length: int | None = 1024
    max_chars: dict[str, int | None] | None = None
    history_context: bool = True
    query_sids: bool = False


def make_serializer(
    tokenizer: Any, templates: str | Path, settings: PromptSettings, coder_folder: str | Path | None = None
) -> Serializer:
    """The serializer that `settings` describe.

    Args:
        tokenizer, templates: see `Serializer`.
        settings: how prompts look.
        coder_folder: with `settings.query_sids`, where `QueryCoder.from_pretrained` finds the coder of queries.
    """
    if settings.query_sids and coder_folder is None:
        raise ConfigError("query_sids is true, but no folder of a query coder is known; give that of learn_sids.")
    return Serializer(
        tokenizer,
        templates=templates,
        max_chars=settings.max_chars,
        history_context=settings.history_context,
        query_sids=QueryCoder.from_pretrained(coder_folder) if settings.query_sids else None,
    )


def complete_model_folder(
    folder: str | Path, serializer: Serializer, settings: PromptSettings, sids: SemanticIds
) -> None:
    """Puts beside saved weights, tokenizer and vocabulary what makes the folder complete.

    Args:
        folder: where a model was saved (the scratch folder of a step). Its vocabulary, and that of what was trained alone
            below it, gets the fingerprint of `sids`.
        serializer, settings: how prompts are rendered.
        sids: the semantic IDs the model was trained on.
    """
    folder = Path(folder)
    for file in folder.rglob(VOCABULARY_FILE):
        Vocabulary.from_pretrained(file.parent).of(sids).save_pretrained(file.parent)
    sids.save_pretrained(folder / SIDS_FOLDER)
    serializer.save_templates(folder / TEMPLATES_FOLDER)
    write_json(folder / SERIALIZER_FILE, dataclasses.asdict(settings))
    if settings.query_sids:
        serializer.query_sids.save_pretrained(folder / CODER_FOLDER)


@dataclass(frozen=True)
class ModelFolder:
    """A model folder but its weights.

    Attributes:
        path: the folder, of several stages the last.
        tokenizer, vocabulary, serializer, settings: read from it.
        sids: its own semantic IDs, or the ones that were given and belong to it.
    """

    path: Path
    tokenizer: Any
    vocabulary: Vocabulary
    sids: SemanticIds
    serializer: Serializer
    settings: PromptSettings

    @classmethod
    def open(
        cls,
        model_dir: str | Path,
        sids_dir: str | Path | None = None,
        data: DataFolder | None = None,
        whole: bool = False,
    ) -> ModelFolder:
        """Reads a folder and refuses strangers, before any long work.

        Args:
            model_dir: a model folder, a bundle of publish, or the folder of `sft`, whose last stage is taken.
            sids_dir: folder of learn_sids or extend_sids; None for the semantic IDs in the model folder.
            data: items that are joined with the model, None for none.
            whole: see `SemanticIds.check_items`.

        Raises:
            DataError: a missing or damaged part, or folders that do not belong together; names them.
        """
        path = final_model(model_dir)
        _require(path, VOCABULARY_FILE, "the token ids of the semantic IDs")
        _require(path, _WEIGHTS, "the weights")
        vocabulary, tokenizer = Vocabulary.from_pretrained(path), load_tokenizer(path)
        sids = None
        if vocabulary.sids_fingerprint is not None or (sids_dir is None):
            _require(path, SIDS_FOLDER, "the semantic IDs it was trained on")
            sids = SemanticIds.from_pretrained(path / SIDS_FOLDER)
            vocabulary.check(tokenizer, sids)
        if sids is None or sids_dir is not None:
            sids = SemanticIds.from_pretrained(Path(str(sids_dir)) / "sids")
        vocabulary.check(tokenizer, sids)
        if data is not None:
            sids.check_items(data.items, data.path, whole)
        place, settings = read_settings(path)
        serializer = make_serializer(tokenizer, place / TEMPLATES_FOLDER, settings, place / CODER_FOLDER)
        return cls(path, tokenizer, vocabulary, sids, serializer, settings)

    def load_model(self, **options: Any) -> Any:
        """The plain model, on the CPU; `options` as in `vocabulary.saving.load_model`."""
        return load_model(self.path, **options)

    def complete(self, folder: str | Path, sids: SemanticIds | None = None) -> None:
        """Makes a model that came from this one complete, see `complete_model_folder`."""
        complete_model_folder(folder, self.serializer, self.settings, sids or self.sids)


def read_settings(path: Path) -> tuple[Path, PromptSettings]:
    """Prompt settings of a model folder, and the folder they lie in, with all templates that they need.

    Raises:
        DataError: a part is missing or damaged.
    """
    place = path
    if not (path / SERIALIZER_FILE).exists() and _is_stage(path):
        # Before models carried the fingerprint, all stages shared what lay in the folder above.
        place = path.parent if Vocabulary.from_pretrained(path).sids_fingerprint is None else path
    _require(place, SERIALIZER_FILE, "the settings of its prompts")
    for name in TEMPLATES:
        _require(place, f"{TEMPLATES_FOLDER}/{name}", "a template of its prompts")
    try:
        settings = PromptSettings(**read_json(place / SERIALIZER_FILE, PromptSettings))
    except TypeError as error:
        raise DataError(f"The file {place / SERIALIZER_FILE} is damaged ({error}); copy the folder again.") from None
    for name in CODER_PARTS if settings.query_sids else ():
        _require(place, f"{CODER_FOLDER}/{name}", "a part of its coder of queries")
    return place, settings


def _is_stage(path: Path) -> bool:
    """Whether the folder above is that of `sft` and names this one among its stages."""
    run = read_record(path.parent / RUN_FILE)
    return path.name in [stage["name"] for stage in run.get("metrics", {}).get("stages", [])]


def _require(folder: Path, name: str | tuple[str, ...], what: str) -> None:
    """Raises DataError when a part is missing; of several patterns one must match."""
    patterns = (name,) if isinstance(name, str) else name
    if not any(next(folder.glob(pattern), None) for pattern in patterns):
        raise DataError(
            f"The model folder {folder} lacks {patterns[0]}, {what}; copy the whole folder again, or run the step that "
            "writes it."
        )


def final_model(folder: str | Path) -> Path:
    """The model folder itself, or the last stage below a folder of `sft`. Raises DataError when there is neither."""
    folder = Path(folder)
    if (folder / "config.json").exists():
        return folder
    final = read_record(folder / RUN_FILE).get("metrics", {}).get("final")
    if final and (folder / final).is_dir():
        return folder / final
    raise DataError(
        f"{folder} holds no model (no config.json) and no finished training, so it is no sidtune bundle; run the step that "
        "writes it."
    )


def training_runs(folder: str | Path) -> list[dict[str, Any]]:
    """`run.json` of the step that wrote a model and of the steps whose models it started from, the first one first.

    The chain ends where the folder of an earlier step is gone.
    """
    found: list[dict[str, Any]] = []
    file = Path(folder) / RUN_FILE
    while file.is_file() and len(found) < _LONGEST_CHAIN:
        found.insert(0, read_run(file.parent))
        start = found[0].get("inputs", {}).get("model_dir", {}).get("path")
        if not start:
            break
        file = Path(start) / RUN_FILE
    return found


def check_made_from(result: str | Path, **inputs: str | list[str]) -> None:
    """Refuses the results of a step that read other folders than the ones they are joined with.

    Args:
        result: folder with the `run.json` of the step.
        inputs: role of an input in that file → the folder, or several of which the step must have read one. Folders compare
            by content; of a model, the folder of `sft` and its last stage are the same.

    Raises:
        DataError: it read another folder; names both.
    """
    for role, given in inputs.items():
        folders = [Path(folder) for folder in ([given] if isinstance(given, str) else given)]
        same = folders
        if role == "model_dir":
            finals = [final_model(folder) for folder in folders]
            same = [*folders, *finals, *(one.parent for one in finals if _is_stage(one))]
        read = read_run(result).get("inputs", {}).get(role)
        if read is not None and read["sha256"] not in map(fingerprint, dict.fromkeys(same)):
            raise DataError(
                f"{result} was made from another {role} ({read['path']}) than {' or '.join(map(str, folders))}, so they do "
                "not belong together; run the step that writes it again with these folders."
            )
