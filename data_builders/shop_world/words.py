"""Words of the simulated shop: category tree with synonyms, materials, colours, styles, invented brands.

Every noun belongs to one leaf only (tested), so that a query noun identifies its leaf.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Department:
    """One department: its names as people type them, materials, sizes, and leaves as (group, nouns)."""

    names: tuple[str, ...]
    materials: tuple[str, ...]
    sizes: tuple[str, ...]
    leaves: tuple[tuple[str, tuple[str, str, str]], ...]


_THREE_SIZES = ("small", "medium", "large")

DEPARTMENTS: tuple[Department, ...] = (
    Department(
        ("clothing", "clothes", "apparel"),
        ("cotton", "wool", "linen", "polyester"),
        ("XS", "S", "M", "L", "XL"),
        (
            ("tops", ("tee", "singlet", "tank top")),
            ("outerwear", ("jacket", "windbreaker", "anorak")),
            ("bottoms", ("jeans", "denims", "dungarees")),
            ("tops", ("sweater", "pullover", "jumper")),
            ("tops", ("shirt", "blouse", "button-down")),
            ("outerwear", ("coat", "parka", "overcoat")),
            ("bottoms", ("trousers", "slacks", "chinos")),
            ("bottoms", ("skirt", "kilt", "sarong")),
        ),
    ),
    Department(
        ("shoes", "footwear", "shoe"),
        ("leather", "suede", "canvas", "rubber"),
        ("37", "39", "41", "43", "45"),
        (
            ("casual shoes", ("sneaker", "trainer", "plimsoll")),
            ("boots", ("boot", "chukka", "desert boot")),
            ("casual shoes", ("sandal", "flip-flop", "slider")),
            ("formal shoes", ("oxford", "brogue", "derby")),
            ("casual shoes", ("loafer", "moccasin", "slip-on")),
            ("casual shoes", ("slipper", "mule", "clog")),
            ("formal shoes", ("heel", "pump", "stiletto")),
            ("boots", ("wellington", "gumboot", "galosh")),
        ),
    ),
    Department(
        ("bags", "bag", "carriers"),
        ("leather", "canvas", "nylon", "felt"),
        _THREE_SIZES,
        (
            ("day bags", ("backpack", "rucksack", "daypack")),
            ("travel bags", ("suitcase", "trolley", "luggage")),
            ("day bags", ("tote", "shopper", "carryall")),
            ("small bags", ("wallet", "billfold", "cardholder")),
            ("day bags", ("handbag", "purse", "clutch")),
            ("day bags", ("satchel", "messenger", "crossbody")),
            ("travel bags", ("duffel", "holdall", "weekender")),
            ("small bags", ("pouch", "etui", "washbag")),
        ),
    ),
    Department(
        ("furniture", "furnishings", "home furniture"),
        ("oak", "walnut", "steel", "rattan"),
        _THREE_SIZES,
        (
            ("seating", ("chair", "armchair", "recliner")),
            ("tables", ("desk", "workstation", "bureau")),
            ("storage", ("shelf", "bookcase", "etagere")),
            ("seating", ("sofa", "couch", "settee")),
            ("seating", ("stool", "ottoman", "pouffe")),
            ("tables", ("table", "console", "trestle")),
            ("storage", ("cabinet", "cupboard", "sideboard")),
            ("storage", ("wardrobe", "closet", "armoire")),
        ),
    ),
    Department(
        ("kitchen", "kitchenware", "cooking"),
        ("ceramic", "steel", "glass", "bamboo"),
        _THREE_SIZES,
        (
            ("cookware", ("pan", "skillet", "wok")),
            ("tableware", ("mug", "cup", "tumbler")),
            ("kitchen tools", ("knife", "cleaver", "slicer")),
            ("cookware", ("pot", "saucepan", "casserole")),
            ("cookware", ("kettle", "teapot", "samovar")),
            ("tableware", ("plate", "dish", "platter")),
            ("tableware", ("bowl", "basin", "ramekin")),
            ("kitchen tools", ("grater", "zester", "peeler")),
        ),
    ),
    Department(
        ("electronics", "gadgets", "tech"),
        ("plastic", "aluminium", "fabric", "carbon"),
        _THREE_SIZES,
        (
            ("audio", ("headphones", "earbuds", "headset")),
            ("computing", ("keyboard", "keypad", "numpad")),
            ("home devices", ("charger", "powerbank", "adapter")),
            ("audio", ("speaker", "soundbar", "boombox")),
            ("audio", ("radio", "tuner", "receiver")),
            ("computing", ("mouse", "trackball", "touchpad")),
            ("computing", ("monitor", "display", "screen")),
            ("home devices", ("lamp", "lantern", "nightlight")),
        ),
    ),
    Department(
        ("sports", "sport", "fitness"),
        ("foam", "rubber", "carbon", "nylon"),
        _THREE_SIZES,
        (
            ("training", ("dumbbell", "kettlebell", "barbell")),
            ("outdoor sports", ("tent", "bivouac", "wigwam")),
            ("team sports", ("racket", "paddle", "bat")),
            ("training", ("mat", "tatami", "gym pad")),
            ("training", ("rope", "skipping cord", "battle line")),
            ("outdoor sports", ("bicycle", "bike", "tandem")),
            ("outdoor sports", ("helmet", "headgear", "headguard")),
            ("team sports", ("ball", "football", "volleyball")),
        ),
    ),
    Department(
        ("garden", "gardening", "backyard"),
        ("cedar", "steel", "terracotta", "resin"),
        _THREE_SIZES,
        (
            ("plant care", ("planter", "flowerpot", "jardiniere")),
            ("garden tools", ("shovel", "spade", "trowel")),
            ("outdoor living", ("grill", "barbecue", "smoker")),
            ("plant care", ("trellis", "arbor", "pergola")),
            ("plant care", ("hose", "sprinkler", "nozzle")),
            ("garden tools", ("rake", "hoe", "cultivator")),
            ("garden tools", ("shears", "pruner", "secateurs")),
            ("outdoor living", ("hammock", "swing", "daybed")),
        ),
    ),
)

COLOURS = ("black", "white", "grey", "red", "blue", "green", "pink", "beige")
STYLES = ("classic", "minimal", "sporty", "vintage", "bohemian", "futuristic")
MATERIALS = tuple(dict.fromkeys(m for department in DEPARTMENTS for m in department.materials))

_BRANDS_TEXT = """
Valmora Tendrik Ostavia Quillon Brantesk Miravel Solhagen Pernika Drevano Calyndra Hofbrenn Zantiro Ulvaska
Norrivane Fabrello Keswin Jorvanta Lumidor Arrondel Tiskova Benaroy Castrivo Elmsworth Grivelle Havento Isolmar
Kordana Lathwick Montresk Nivella Orvendi Palmeron Rushkin Savarre Torvald Umbrello Vistane Wexmoor Yarndel
Zephora Aldrivo Borlaine Cremona Dunvero Estrani Fjordal Gantrel Hexwell Indravo Jaspera Kvistan Lorimar Medrano
Nautivo Opaline Prestova Quenby Rovanni Stellbrook Tramonte Ulmeron Verdano Wintrell Xandrova
"""
BRANDS = tuple(_BRANDS_TEXT.split())
_MODELS_TEXT = """
Aria Atlas Aurora Bolt Breeze Canyon Cosmo Comet Coral Crest Delta Drift Echo Ember Fable Flint Grove Halo
Harbor Haven Iris Juno Kite Lark Linden Luna Maple Meadow Mira Nimbus Nova Onyx Orbit Pearl Pine Prairie Pulse
Quartz Raven Ridge River Sage Sierra Spark Summit Terra Tide Vale Vega Willow Wren Zenith
"""
MODELS = tuple(_MODELS_TEXT.split())

AGE_BANDS = ("18-24", "25-34", "35-49", "50-64", "65+")
GENDERS = ("woman", "man", "unstated")
REGIONS = ("north", "south", "east", "west", "centre", "coast")
PRICE_SEGMENTS = ("budget", "middle", "premium")

PLACES = ("home", "work", "commute", "travel")
DEVICES = ("phone", "tablet", "laptop")
DAYPARTS = ("night", "morning", "afternoon", "evening")
PAGES = ("search", "home", "browse")

TITLES = (
    "{brand} {model} {noun}, {colour} {material}",
    "{Colour} {style} {noun} by {brand}, model {model}",
    "{Style} {material} {noun} in {colour} - {brand} {model}",
    "{brand} {style} {noun} {model} ({colour})",
    "{Material} {noun} {model} from {brand}, {style} and {colour}",
)
CATEGORY_SENTENCES = (
    "This {style} {canonical} belongs to our {group} in {department}.",
    "A {canonical} with a {style} look, from the {group} range of the {department} department.",
    "Shop {group} in {department}: a {style} {canonical}.",
)
MATERIAL_SENTENCES = (
    "Made of {material}, it comes in {colour}, size {size}.",
    "The colour is {colour}, the material {material}, the size {size}.",
    "You get {colour} {material} in size {size}.",
)
PRICE_SENTENCES = (
    "{brand} offers it as {price} choice.",
    "It is {price} choice by {brand}.",
    "Among {group}, {brand} makes this {price} choice.",
)
PRICE_PHRASES = ("a budget", "a mid-price", "a premium")
