"""The dials of the market: each phenomenon one number, gone at 0 to the last bit. Own design; sheet `specs/market.md` 3.

| dial | phenomenon | equation |
|---|---|---|
| `taste_by_department` λ_d | colour, style, price by department | T[u, d] = sqrt(1 − λ_d) g[u] + sqrt(λ_d) e[u, d] |
| `cascade` λ_c | share of requests read from the top | `examining.py` |
| `stop_after_click` η, `stop_after_order` η_o | a cascade reader who has found something goes | `examining.py` |
| `click_fatigue` φ | each click lowers later ones | `examining.py` |
| `satiation` σ_s | alike items further up take interest | S_k = Π_{j<k} (1 − σ_s s(o_k, o_j)) |
| `interaction` c | alike neighbours take clicks from each other | N_k = 1 − (c / 2)(s_{k,k−1} + s_{k,k+1}) |
| `clickbait` κ | some items draw clicks and no orders | logit of a click + .7 κ bait_i, of an order − .7 κ bait_i |
| `value_spread` λ_v | users want different things | `phenomena.Tastes` |
| `feed_noise` ν | clicks of a feed that were not meant | `noise.py` |
| `noise_dwell` δ_n | such clicks are short | mean of log dwell − δ_n |
| `lexical_gap` λ_w | share of queries in words that no item has; feedback stays | `paraphrases.py` |
| `missing_attributes` λ_a | colour, style, material, brand left out of an item's record, each by its own coin | `blanks.py` |
| `score_distortion` λ_s | an upstream score lies by department, outcomes do not | s = σ(exp(λ_s α_d) logit(A) + λ_s β_d) |

s is the weighted share of properties that two items have in common (`crowding.py`).
"""

from __future__ import annotations

from dataclasses import dataclass, fields

from sidtune.core.errors import ConfigError


@dataclass(frozen=True)
class Phenomena:
    """The dials, all 0 by default; ranges are [0, 1], of `clickbait` and `noise_dwell` [0, 4]. See the module's table.

    Raises:
        ConfigError: a dial out of range.
    """

    taste_by_department: float = 0.0
    cascade: float = 0.0
    stop_after_click: float = 0.0
    stop_after_order: float = 0.0
    click_fatigue: float = 0.0
    satiation: float = 0.0
    interaction: float = 0.0
    clickbait: float = 0.0
    value_spread: float = 0.0
    score_distortion: float = 0.0
    lexical_gap: float = 0.0
    missing_attributes: float = 0.0
    feed_noise: float = 0.0
    noise_dwell: float = 0.0

    def __post_init__(self) -> None:
        for one in fields(self):
            value, most = getattr(self, one.name), 4.0 if one.name in ("clickbait", "noise_dwell") else 1.0
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0.0 <= value <= most:
                raise ConfigError(f"The dial {one.name} must lie in [0, {most:g}], got {value!r}.")

    @property
    def new_readers(self) -> bool:
        """Whether clicks come about in another way than place by place, each on its own."""
        return self.page_interacts or self.cascade > 0.0

    @property
    def page_interacts(self) -> bool:
        """Whether what stands elsewhere on a page changes what an item draws."""
        return max(self.satiation, self.interaction, self.click_fatigue) > 0.0


SHOP = Phenomena(
    taste_by_department=0.5, cascade=0.5, stop_after_click=0.5, stop_after_order=0.5, satiation=0.3, interaction=0.4,
    clickbait=2.0, value_spread=0.5, score_distortion=0.5, lexical_gap=0.2, feed_noise=0.3,
    noise_dwell=1.5,
)  # fmt: skip
HIGH = Phenomena(
    taste_by_department=1.0, cascade=1.0, stop_after_click=1.0, stop_after_order=1.0, click_fatigue=0.3, satiation=0.6,
    interaction=0.8, clickbait=2.0, value_spread=1.0, score_distortion=1.0, lexical_gap=0.6,
    missing_attributes=0.5, feed_noise=0.6, noise_dwell=1.5,
)  # fmt: skip
