"""The words of the English tasks: things, rooms, and sentences that say nothing about either."""

import random
from collections.abc import Sequence

_COLOURS = ["red", "green", "blue", "black", "white", "yellow", "brown", "grey", "golden", "silver"]
_OBJECTS = ["box", "bag", "chest", "drawer", "cupboard", "suitcase", "basket", "locker", "safe", "trunk"]
ROOMS = ("cellar", "attic", "kitchen", "library", "garage", "workshop", "pantry", "office")
FILLER = (
    "The morning train left the station a few minutes late.",
    "A thin fog lay over the fields until noon.",
    "The baker opened his shop before sunrise.",
    "Two swans crossed the pond without a sound.",
    "The old bridge was painted again last summer.",
    "Children were playing near the fountain.",
    "Most of the shops close early on Sundays.",
    "The museum shows a small collection of maps.",
    "Rain had washed the dust from the windows.",
    "An orchestra rehearsed in the town hall.",
    "The path along the river is lined with willows.",
    "Nobody noticed the cat on the warm roof.",
    "Fresh bread was sold at the corner of the market.",
    "The town council keeps its records for ten years.",
    "A gardener trimmed the hedge behind the church.",
    "The ferry crosses the lake twice a day.",
    "Someone had left an umbrella on the bench.",
    "The hills look hazy in the evening light.",
    "A new lamp was put up beside the gate.",
    "The clock in the tower stopped during the storm.",
    "The neighbours planted tulips along the fence.",
    "A violinist practised with the window open.",
    "The bus turns around at the foot of the hill.",
    "In winter the harbour is quiet for weeks.",
)


def draw_things(rng: random.Random, count: int) -> list[str]:
    """Things of different colour and kind, such as ``"green trunk"``."""
    pairs = zip(rng.sample(_COLOURS, count), rng.sample(_OBJECTS, count), strict=True)
    return [f"{colour} {kind}" for colour, kind in pairs]


def draw_codes(rng: random.Random, count: int, digits: int) -> list[str]:
    """Different numbers of so many digits, none with a zero in front."""
    low = 10 ** (digits - 1)
    return [str(number) for number in rng.sample(range(low, 10 * low), count)]


def _filler(rng: random.Random, count: int) -> list[str]:
    """Sentences; a second round of them begins when the first is used up."""
    found: list[str] = []
    while len(found) < count:
        found += rng.sample(FILLER, min(count - len(found), len(FILLER)))
    return found


THINGS_AT_MOST = min(len(_COLOURS), len(_OBJECTS))


def shuffled(rng: random.Random, sentences: Sequence[tuple[str, str]], filler: int) -> list[tuple[str, str]]:
    """(label, sentence) pairs in random order among ``filler`` sentences, whose label is empty."""
    mixed = [*sentences, *(("", sentence) for sentence in _filler(rng, filler))]
    rng.shuffle(mixed)
    return mixed
