"""The tasks by the name a stage of a recipe calls them: one line each.

A task is `task(data: TaskInput, limit: int | None = None, **options) -> datasets.Dataset` with the columns task,
pieces, learn, key.
"""

from __future__ import annotations

from sidtune.core.registry import Registry

TASKS = Registry(
    "task",
    {
        "item_to_sid": "sidtune.data_builders.tasks:item_to_sid",
        "sid_to_item": "sidtune.data_builders.tasks:sid_to_item",
        "sid_to_category": "sidtune.data_builders.tasks:sid_to_category",
        "text_to_category": "sidtune.data_builders.tasks:text_to_category",
        "query_to_sid": "sidtune.data_builders.tasks:query_to_sid",
        "query_to_item_text": "sidtune.data_builders.tasks:query_to_item_text",
        "item_text_to_query": "sidtune.data_builders.tasks:item_text_to_query",
        "history_to_sid": "sidtune.data_builders.examples:history_to_sid",
        "request_to_sid": "sidtune.data_builders.examples:request_to_sid",
        "reason_to_sid": "sidtune.data_builders.reasoning:reason_to_sid",
        "whole_history": "sidtune.data_builders.examples:whole_history",
    },
)
