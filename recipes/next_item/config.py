"""What `next_item` can be told: the systems of a table, and the table itself."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from sidtune.core.config import build, check_range, merged
from sidtune.core.errors import ConfigError, nearest
from sidtune.data_builders.sequences.source import SequenceSource
from sidtune.metrics.registry import BASELINES
from sidtune.metrics.statistics.bootstrap import check_bootstrap
from sidtune.recipes.over_seeds import check_seeds
from sidtune.tokenizers.registry import QUANTIZERS, made_by
from sidtune.tokenizers.sids.sequence_sids import PUBLISHED, quantizer_spec


@dataclass
class System:
    """One system of the table.

    Attributes:
        sids: `{name: published}` (the only `*.index.json` of the folder), or the name of a quantizer in `tokenizers/registry.py`
            with its options, fitted on the only `*.npy` of the folder (row n = item n); `collisions` treats shared codes.
        network: fields of `models.next_item.network.NextItemConfig` but level_sizes and num_items.
        examples: `whole` (a user's training items are all targets of one example) or `windows` (one copy per target).
        max_history: most items before a target, in training, validation and test.
        packed: items of a packed training row; null for one example per row.
        noise: fields of `trainers.next_item.data.NoiseConfig`.
        fit: fields of `trainers.next_item.trainer.FitSettings`; `loss` is one of them.
    """

    sids: dict = field(default_factory=lambda: {"name": PUBLISHED})
    network: dict = field(default_factory=dict)
    examples: Literal["whole", "windows"] = "whole"
    max_history: int = 50
    packed: int | None = None
    noise: dict = field(default_factory=dict)
    fit: dict = field(default_factory=dict)

    def check(self, where: str) -> None:
        """Raises ConfigError for a wrong option anywhere in this system, before any work."""
        name = self.sids.get("name")
        if name != PUBLISHED:
            if name not in QUANTIZERS:
                raise ConfigError(f"{where}.sids: {nearest(str(name), [PUBLISHED, *QUANTIZERS])}")
            made_by(QUANTIZERS, quantizer_spec(self.sids))
        self.parts(where, [2], 1)
        if self.max_history < 1 or (self.packed is not None and self.packed < 2):
            raise ConfigError(f"{where}: max_history must be 1 or more, packed 2 or more or null.")
        if self.packed and self.network.get("user_tokens"):
            raise ConfigError(
                f"{where}: a packed row holds several users, so it has no user token; choose one of both."
            )
        kind = self.network.get("network", "items")
        for option, value, kinds in (("causal_encoder", True, ("t5",)), ("code_layers", 1, ("items", "t5"))):
            if self.network.get(option, value) != value and kind not in kinds:
                raise ConfigError(f"{where}.network: {option} is for {' and '.join(kinds)} only; leave it out.")
        full = kind == "t5" and not self.network.get("causal_encoder", True)
        if full and (self.examples == "whole" or self.packed):
            raise ConfigError(
                f"{where}: an encoder with full attention (causal_encoder: false) takes windows, not packed."
            )

    def parts(self, where: str, level_sizes: list[int], items: int) -> tuple[Any, Any, Any]:
        """The filled configs of network, noise and training."""
        from sidtune.models.next_item.network import NextItemConfig
        from sidtune.trainers.next_item.data import NoiseConfig
        from sidtune.trainers.next_item.loss import LossConfig
        from sidtune.trainers.next_item.trainer import FitSettings

        shape = {**self.network, "level_sizes": level_sizes, "num_items": items}
        loss = build(LossConfig, self.fit.get("loss", {}), f"{where}.fit.loss")
        return (
            build(NextItemConfig, shape, f"{where}.network"),
            build(NoiseConfig, self.noise, f"{where}.noise"),
            build(FitSettings, {**self.fit, "loss": loss}, f"{where}.fit"),
        )


@dataclass
class Arguments:
    """Options of next_item.

    Attributes:
        source: where the data is, see `SequenceSource`; `--source.path FOLDER` is all that another data set needs.
        output_dir: folder to write.
        systems: name → options of a `System`, over `defaults`.
        defaults: options of every system.
        ensembles: name → list of systems, baselines of the table, or ensembles above it; they propose candidates together, each
            scores all of them, probabilities are averaged. A baseline's probability of an item is its share of all its scores.
        only: names of systems to train now; null for all. The table shows what is there.
        seeds: each system is trained with each.
        test: read the test targets. Without it, only validation figures are shown; choose all settings so.
        num_beams: beams of every search. exclude_seen: never rank an item the user already has.
        baselines: names of baselines in `metrics/registry.py`.
        level, samples: of the bootstrap.
        results: JSON file that receives all figures, beside `results.json` of the output folder.
        readme: README files whose table is replaced.
    """

    source: dict
    output_dir: str
    systems: dict
    defaults: dict = field(default_factory=dict)
    ensembles: dict = field(default_factory=dict)
    only: list[str] | None = None
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2])
    test: bool = True
    num_beams: int = 30
    exclude_seen: bool = False
    baselines: list[str] = field(default_factory=lambda: ["popularity", "item_knn"])
    level: float = 0.95
    samples: int = 1000
    results: str | None = None
    readme: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.data()
        check_seeds(self.seeds)
        names = [*self.systems, *self.ensembles, *self.baselines]
        if len(set(names)) < len(names) or any("/" in name or name in ("test", "") for name in names):
            raise ConfigError("Systems, ensembles and baselines need different names without '/', and none is 'test'.")
        for name in self.systems:
            self.system(name).check(f"systems.{name}")
        from sidtune.decoding.next_item.ensembles import check_ensembles

        check_ensembles(self.ensembles, [*self.systems, *self.baselines])
        for name in self.only or []:
            if name not in self.systems:
                raise ConfigError(f"only: there is no system '{name}': {nearest(name, self.systems)}")
        for name in self.baselines:
            BASELINES.get(name)
        check_range(self, 10, "num_beams")  # to fill ten places
        check_bootstrap(self.level, self.samples)

    def data(self) -> SequenceSource:
        """The source."""
        return build(SequenceSource, self.source, "source")

    def system(self, name: str) -> System:
        """A system with the defaults below its own options."""
        return build(System, merged(self.defaults, self.systems[name] or {}, f"systems.{name}"), f"systems.{name}")

    def folder(self, seed: int, name: str) -> Path:
        """Folder of a trained system."""
        return Path(self.output_dir) / f"seed_{seed}" / name
