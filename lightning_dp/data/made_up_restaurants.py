"""Made-up descriptions of restaurants that do not exist, in the form of the E2E data set, from a small grammar."""

from __future__ import annotations

import random
from typing import Literal

Style = Literal["guide", "local"]
"""How the sentences are put: ``guide`` stands for public text, ``local`` for the private records."""

_OWNERS = (
    "Copper",
    "Old",
    "Little",
    "Velvet",
    "Hidden",
    "Northern",
    "Marble",
    "Windy",
    "Crooked",
    "Lucky",
    "Amber",
    "Quiet",
)
_THINGS = (
    "Kettle",
    "Harbour",
    "Orchard",
    "Lantern",
    "Spoon",
    "Magpie",
    "Anchor",
    "Pantry",
    "Chimney",
    "Terrace",
    "Otter",
)
_VALUES = {
    "eatType": ("bistro", "tavern", "tea room", "diner", "canteen"),
    "food": ("Greek", "Korean", "Polish", "Lebanese", "Peruvian", "vegan", "Basque"),
    "priceRange": ("cheap", "moderate", "high", "under £15"),
    "customer rating": ("2 of 5", "3 of 5", "4 of 5", "excellent", "poor"),
    "area": ("old town", "docklands", "university quarter", "hillside"),
    "familyFriendly": ("yes", "no"),
    "near": ("the Blue Bridge", "Station Square", "the Glass Museum", "Mill Park"),
}
_KEPT = 0.7
"""The share of records that say each of the attributes."""

_GUIDE: dict[str, tuple[str, ...]] = {
    "eatType": ("{name} is a {eatType}.", "{name} is a local {eatType}."),
    "none": ("{name} is a place to eat.",),
    "food": ("It serves {food} food.", "The food is {food}."),
    "priceRange": ("Prices are {priceRange}.", "Its price range is {priceRange}."),
    "customer rating": ("Customers rate it {customer rating}.", "It has a customer rating of {customer rating}."),
    "area": ("You find it in the {area}.", "It is in the {area}."),
    "near": ("It is near {near}.",),
    "familyFriendly=yes": ("It is family friendly.", "Children are welcome."),
    "familyFriendly=no": ("It is not family friendly.",),
}
_LOCAL: dict[str, tuple[str, ...]] = {
    "eatType": ("Oh, {name}, the {eatType} we always pick!", "Try the {eatType} they call {name}, folks!"),
    "none": ("Oh, {name}, we always pick it!", "Try {name}, folks!"),
    "food": ("We go for the {food} plates;", "Come hungry for {food} dishes;"),
    "priceRange": ("the bill is {priceRange} as bills go,", "your wallet says {priceRange},"),
    "customer rating": ("my neighbours gave it {customer rating},", "the regulars say {customer rating},"),
    "area": ("over in the {area},", "down the {area} way,"),
    "near": ("a short stroll from {near},", "with {near} around the corner,"),
    "familyFriendly=yes": ("so bring the little ones along.", "and kids run about happily."),
    "familyFriendly=no": ("so leave the little ones at home.", "but get a sitter first."),
}


def made_up_restaurants(count: int, seed: int, style: Style = "local") -> list[tuple[str, str]]:
    """Draw pairs of a meaning and a text that says it.

    Args:
        count: how many.
        seed: of the draw. The same seed gives the same pairs.
        style: of the sentences.

    Returns:
        Pairs such as ``("name[Old Otter], food[Greek]", "Old Otter is a place to eat. The food is Greek.")``. Meanings are
        written as in the E2E data set; names, values and sentences are this package's own.

    Example:
        >>> made_up_restaurants(1, seed=3, style="guide")[0][0].startswith("name[")
        True
    """
    draw = random.Random(seed)
    return [_pair(draw, _GUIDE if style == "guide" else _LOCAL) for _ in range(count)]


def _pair(draw: random.Random, sentences: dict[str, tuple[str, ...]]) -> tuple[str, str]:
    facts = {"name": f"{draw.choice(_OWNERS)} {draw.choice(_THINGS)}"}
    facts |= {key: draw.choice(values) for key, values in _VALUES.items() if draw.random() < _KEPT}
    said = [draw.choice(sentences["eatType" if "eatType" in facts else "none"])]
    rest = [key for key in ("food", "priceRange", "customer rating", "area", "near", "familyFriendly") if key in facts]
    said += [draw.choice(sentences[key if key in sentences else f"{key}={facts[key]}"]) for key in rest]
    text = " ".join(said)
    for key, value in facts.items():
        text = text.replace("{" + key + "}", value)
    return ", ".join(f"{key}[{value}]" for key, value in facts.items()), text
