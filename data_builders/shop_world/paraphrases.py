"""Other words for what people look for, none of which stands in the text of an item. Own design; sheet `specs/market.md` 3.9.

With probability λ_w (`lexical_gap`) a query's noun is typed as one of two paraphrases of its leaf, and an asked colour,
style or material as one of two of that value. What is wanted, and so all feedback, stays: only the words are harder.
"""

from __future__ import annotations

_LEAVES = """
tee: short sleeved undershirt; round neck basic
jacket: something against chilly winds; zipped layer outdoors
jeans: rugged legwear; cowboy legwear
sweater: cosy knitwear; warm knit for winter
shirt: collared upper garment; what goes under a tie
coat: heavy winter layer; warmest garment against snow
trousers: smart legwear; office legwear
skirt: swishy feminine garment; twirly garment
sneaker: running kicks; gymnasium kicks
boot: high ankle footgear; hiking footgear
sandal: open toed summer footgear; beach footgear
oxford: laced dressy footgear; wedding footgear
loafer: laceless smart footgear; penny footgear
slipper: indoor cosy footgear; something warm around bare feet
heel: raised party footgear; elegant tall footgear
wellington: waterproof footgear; puddle footgear
backpack: school pack; pack on shoulders
suitcase: wheeled case; what to check in at airports
tote: grocery sack; reusable sack
wallet: where banknotes go; billholder
handbag: evening accessory on a strap; ladies carry accessory
satchel: schoolbook carrier; over one shoulder carrier
duffel: weekend sack; overnight sack
pouch: tiny zipped holder; cosmetics holder
chair: something to sit on; dining seat
desk: where one writes; study surface
shelf: where novels stand; wall ledge
sofa: seat for three; lounge centrepiece
stool: backless seat; bar perch
table: where families eat; dining surface
cabinet: doored storing unit; crockery storing unit
wardrobe: where dresses hang; bedroom hanging unit
pan: frying vessel; something to fry eggs
mug: coffee vessel; hot cocoa vessel
knife: chopping blade; chef blade
pot: soup vessel; stew vessel
kettle: water boiler; something to boil water
plate: dinner round; flat crockery
bowl: cereal vessel; deep crockery
grater: cheese shredder; carrot shredder
headphones: private listening gear; something for music on a train
keyboard: typing gear; what programmers type on
charger: battery refill; dead battery rescue
speaker: loud music player; party sound
radio: news listening set; broadcast catcher
mouse: pointing gadget; cursor mover
monitor: second computer panel; office panel
lamp: bedside brightness; reading brightness
dumbbell: hand weights; lifting weights
tent: camping roof; overnight canopy
racket: tennis gear; what a serve needs
mat: yoga surface; stretching surface
rope: jumping gear; knotted strand
bicycle: two wheeled ride; pedal ride
helmet: skull protection; crash protection
ball: round game thing; something to kick
planter: seedling vessel; balcony flora holder
shovel: digging implement; dirt mover
grill: sausage roasting fire; summer roasting station
trellis: climbing flora support; vine support
hose: watering tube; lawn watering
rake: leaf gatherer; autumn leaves implement
shears: hedge cutter; twig cutter
hammock: hanging nap spot; between two trees nap
"""
_VALUES = """
black: dark as coal; night coloured
white: bright as snow; milk coloured
grey: ash coloured; like a rainy sky
red: like ripe tomatoes; blood coloured
blue: ocean coloured; like a clear sky
green: grass coloured; like fresh spinach
pink: flamingo coloured; like bubblegum
beige: sand coloured; like oatmeal
classic: timeless; traditional
minimal: uncluttered; bare and simple
sporty: athletic; energetic
vintage: retro; old fashioned
bohemian: hippie; boho chic
futuristic: space age; from tomorrow
cotton: soft natural fibre; breathable fibre
wool: sheep fibre; fleece
linen: flax; airy summer weave
polyester: synthetic fibre; quick drying weave
leather: tanned hide; cowhide
suede: napped hide; velvety hide
canvas: sturdy sailcloth; sailcloth
rubber: latex; bouncy grip
nylon: parachute weave; slick synthetic
felt: pressed fibre; fuzzy fibre
oak: pale hardwood; sturdy hardwood
walnut: brown hardwood; nutty hardwood
steel: stainless metal; shiny metal
rattan: woven cane; wicker
ceramic: fired clay; porcelain
glass: see through; transparent
bamboo: panda food; giant reed
plastic: polymer; moulded synthetic
aluminium: lightweight metal; foil metal
fabric: textile; woven cloth
carbon: graphite fibre; racing composite
foam: squishy padding; cushiony
cedar: fragrant softwood; moth repelling softwood
terracotta: baked earth; orange clay
resin: poly composite; weatherproof composite
"""


def _table(text: str) -> dict[str, tuple[str, str]]:
    lines = (line.split(": ") for line in text.strip().splitlines())
    return {name: tuple(phrases.split("; ")) for name, phrases in lines}  # type: ignore[misc]


LEAVES, ASKED = _table(_LEAVES), _table(_VALUES)  # by canonical noun, by value
