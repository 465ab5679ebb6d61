"""Wording of the post-ranking prompts, one string per slot, by version.

The literal templates of LLM4PR (arXiv 2411.01178) stand in figures that no text copy has; this is our reconstruction. A model
remembers its version, so a wording, once published, is never changed: add a version instead.
"""

from __future__ import annotations

from dataclasses import dataclass

from sidtune.core.errors import ConfigError, nearest


@dataclass(frozen=True)
class PostRankTemplate:
    """Texts around the values; each is tokenised on its own. Slots without a value (no query, no history) are left out.

    Attributes:
        query: before the query text. user: before the user's soft token (or words). history: before the watched items.
        candidates: before the first label. rank: the main task's instruction.
        list_one, list_two: before the two lists of the auxiliary task. which: its instruction. one, two: its answers.
        item: before the single item of feature adaptation. describe: its instruction.
        user_says, item_says, rating_says: openings of the three parts of its target. pair: one feature in words.
        pair_end: between two features. stop: after each part.
        words: before a candidate's features in words (text-only prompt).
    """

    query: str = "Query:"
    user: str = " User:"
    history: str = " History:"
    candidates: str = " Candidates:"
    rank: str = " Rank all candidates, best first:"
    list_one: str = " List I:"
    list_two: str = " List II:"
    which: str = " Which list is better?"
    one: str = " I"
    two: str = " II"
    item: str = " Item:"
    describe: str = " Describe the user and the item, then predict the rating."
    user_says: str = " User"
    item_says: str = " Item"
    rating_says: str = " Rating"
    pair: str = " {name} is {value}"
    pair_end: str = ","
    stop: str = "."
    words: str = ":"


TEMPLATES = {"v1": PostRankTemplate()}


def template(version: str) -> PostRankTemplate:
    """The templates of a version. Raises ConfigError that names the nearest known one."""
    if version not in TEMPLATES:
        raise ConfigError(f"There is no post-ranking template version '{version}': {nearest(version, TEMPLATES)}")
    return TEMPLATES[version]
