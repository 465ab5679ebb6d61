"""The items of the simulated shop as sellers describe them: one row per item, texts composed from the item's values.

Own design; no paper.
"""

from __future__ import annotations

import numpy as np
import pyarrow as pa

from sidtune.data_builders.shop_world import words
from sidtune.data_builders.shop_world.blanks import BLANK, BLANKABLE, left_out, tidied
from sidtune.data_builders.shop_world.catalogue import ShopCatalogue, item_ids, leaf_nouns
from sidtune.data_builders.shop_world.config import ShopWorldConfig
from sidtune.data_builders.tables.schema import SCHEMAS, table_from_columns


def price_bucket(price_level: np.ndarray) -> np.ndarray:
    """0 budget, 1 mid-price, 2 premium: thirds of a standard normal."""
    return np.digitize(price_level, [-0.43, 0.43])


def item_table(config: ShopWorldConfig, catalogue: ShopCatalogue) -> pa.Table:
    """The items table; counts are null (statistics are taken from the past when a split is made)."""
    nouns = leaf_nouns(config)
    bucket = price_bucket(catalogue.price_level)
    titles, descriptions, categories, attributes = [], [], [], []
    blank = left_out(config)
    for i in range(config.n_items):
        leaf, choice = catalogue.leaf[i], catalogue.text_choice[i]
        department = words.DEPARTMENTS[catalogue.leaf_department[leaf]]
        group = department.leaves[leaf % config.leaves_per_department][0]
        values = {
            "colour": words.COLOURS[catalogue.colour[i]],
            "style": words.STYLES[catalogue.style[i]],
            "material": words.MATERIALS[catalogue.material[i]],
            "size": department.sizes[catalogue.size[i]],
        }
        gone = {name for name, out in zip(BLANKABLE, blank[i], strict=True) if out}
        fields = {
            **values,
            "brand": words.BRANDS[catalogue.brand[i]],
            "model": words.MODELS[choice[0] % len(words.MODELS)],
            "noun": nouns[leaf][choice[1] % 3],
            "canonical": nouns[leaf][0],
            "group": group,
            "department": department.names[0],
            "price": words.PRICE_PHRASES[bucket[i]],
            **{name.capitalize(): value.capitalize() for name, value in values.items()},
        }
        for name in gone:
            fields[name] = fields[name.capitalize()] = BLANK
        titles.append(_fill(words.TITLES, choice[2], fields))
        sentences = [
            _fill(words.CATEGORY_SENTENCES, choice[3], fields),
            _fill(words.MATERIAL_SENTENCES, choice[4], fields),
            _fill(words.PRICE_SENTENCES, choice[5], fields),
        ]
        turn = choice[6] % 3
        descriptions.append(" ".join(sentences[turn:] + sentences[:turn]))
        categories.append([department.names[0], group, nouns[leaf][0]])
        attributes.append([{"name": name, "value": value} for name, value in values.items() if name not in gone])
    columns = {
        "item_id": item_ids(config),
        "title": titles,
        "description": descriptions,
        "brand": pa.array(words.BRANDS).take(pa.array(catalogue.brand, mask=blank[:, -1])),
        "category": categories,
        "attributes": pa.array(attributes, type=SCHEMAS["items"].arrow_schema.field("attributes").type),
        "price": catalogue.price,
    }
    return table_from_columns("items", columns, config.n_items)


def _fill(templates: tuple[str, ...], choice: int, fields: dict[str, str]) -> str:
    text = templates[choice % len(templates)].format(**fields)
    return tidied(text) if BLANK in text else text
