"""The tasks by the name a stage of a recipe calls them: one line each.

A task is `task(data: TaskInput, limit: int | None = None, **options) -> datasets.Dataset` with the columns task,
pieces, learn, key.
"""

from __future__ import annotations

from sidtune.core.registry import Registry

TASKS = Registry(
    "task",
    {
        "item_to_sid": "sidtune.data_builders.tasks.alignment:item_to_sid",
        "sid_to_item": "sidtune.data_builders.tasks.alignment:sid_to_item",
        "sid_to_category": "sidtune.data_builders.tasks.alignment:sid_to_category",
        "text_to_category": "sidtune.data_builders.tasks.alignment:text_to_category",
        "query_to_sid": "sidtune.data_builders.tasks.alignment:query_to_sid",
        "query_to_item_text": "sidtune.data_builders.tasks.alignment:query_to_item_text",
        "item_text_to_query": "sidtune.data_builders.tasks.alignment:item_text_to_query",
        "history_to_sid": "sidtune.data_builders.tasks.behaviour:history_to_sid",
        "request_to_sid": "sidtune.data_builders.tasks.behaviour:request_to_sid",
        "reason_to_sid": "sidtune.data_builders.tasks.reasoning:reason_to_sid",
        "whole_history": "sidtune.data_builders.tasks.behaviour:whole_history",
    },
)
