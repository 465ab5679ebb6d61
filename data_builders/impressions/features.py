"""What an impression is described by: named features, each of a kind, stored once for whatever it belongs to.

| kind | array of its scope | where nothing is known |
|---|---|---|
| `numeric` | (n,) float32 | NaN |
| `categorical` | (n,) int32 codes 0 ... size − 1 | −1 |
| `multi_categorical` | `Ragged` of codes | an empty list |
| `text` | n strings, Arrow | null |
| `vector` | (n, size) float32 | a row with NaN |
| `sid` | (n, levels) int32 codes | −1 in every level |
| `sequence` | `Ragged` of numbers, oldest first, such as item rows | an empty list |

Scopes: `item`, `user`, `request`, and `impression` (a candidate of a request). Own design.
"""

from __future__ import annotations

from dataclasses import dataclass

from sidtune.core.errors import ConfigError, nearest

KINDS = ("numeric", "categorical", "multi_categorical", "text", "vector", "sid", "sequence")
SCOPES = ("item", "user", "request", "impression")


@dataclass(frozen=True)
class Feature:
    """One feature.

    Attributes:
        name: unique among all features.
        kind, scope: see the module's table.
        size: values of a categorical feature or of the elements of a sequence, width of a vector; else 1.
        levels: codes per level of a semantic ID.
        most: longest list of a sequence or multi-categorical feature in a batch, the latest elements; None for all.
        values: names of the codes, where they have names.
        sources: fingerprints of the semantic IDs that it holds.

    Raises:
        ConfigError: an unknown kind or scope, or a size that does not fit.

    >>> Feature("colour", "categorical", "item", size=2, values=("red", "blue"))
    Feature(name='colour', kind='categorical', scope='item', size=2, levels=(), most=None, values=('red', 'blue'), sources=())
    """

    name: str
    kind: str
    scope: str
    size: int = 1
    levels: tuple[int, ...] = ()
    most: int | None = None
    values: tuple[str, ...] = ()
    sources: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for what, value, known in (("kind", self.kind, KINDS), ("scope", self.scope, SCOPES)):
            if value not in known:
                raise ConfigError(f"The feature '{self.name}' has the {what} '{value}': {nearest(value, known)}")
        if self.size < 1 or (self.most or 1) < 1 or (self.kind == "sid") != bool(self.levels):
            raise ConfigError(
                f"The feature '{self.name}' needs a size and a longest list of at least 1, and levels if it is a sid; got "
                f"{self.size}, {self.most} and {self.levels}."
            )
        if self.values and len(self.values) != self.size:
            raise ConfigError(f"The feature '{self.name}' has {self.size} codes but {len(self.values)} names.")
