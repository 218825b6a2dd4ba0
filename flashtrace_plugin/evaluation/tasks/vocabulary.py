"""The words of the synthetic tasks; in every text one word, split at spaces, is one token.

Keys, values and noise are disjoint, so that a word tells what it is and noise can never contradict a statement.
"""

import random
from itertools import chain

from flashtrace_plugin.errors import InputError

VARIABLES = tuple(f"v{i}" for i in range(100))
NUMBERS = tuple(str(i) for i in range(100))
_KEYS = """
anchor apple arrow badge basket bell bottle bridge button candle canvas castle chair clock compass cradle drum engine
feather fiddle flute guitar hammer helmet jacket kettle ladder lantern magnet marble mirror needle orange paddle parcel
pencil pepper piano pillow ribbon saddle shovel spoon statue table ticket trumpet violin wagon whistle
"""
NEEDLE_KEYS = tuple(_KEYS.split())

END_OF_STATEMENT = ";"
QUESTION = "?"
THINK = "think"
DIRECT = "direct"
THINK_OPEN = "<think>"
THINK_CLOSE = "</think>"
MARKS = (END_OF_STATEMENT, QUESTION, THINK, DIRECT, THINK_OPEN, THINK_CLOSE)

_NOUNS = ("grass", "sky", "sea", "sun", "moon", "wind", "river", "forest", "meadow", "valley")
_ADJECTIVES = ("green", "blue", "warm", "cold", "bright", "calm", "wide", "quiet")
_VERBS = ("grows", "shines", "waits", "moves", "sleeps")
_ADVERBS = ("slowly", "again", "today", "nearby")
_TEMPLATES = (  # one for each length from 3 to 7 words, so that any room of 3 words or more can be filled exactly
    ("{noun}", "{verb}", "."),
    ("the", "{noun}", "{verb}", "."),
    ("the", "{noun}", "is", "{adjective}", "."),
    ("the", "{adjective}", "{noun}", "{verb}", "{adverb}", "."),
    ("the", "{noun}", "{verb}", "near", "the", "{noun}", "."),
)
_SLOTS = {"{noun}": _NOUNS, "{adjective}": _ADJECTIVES, "{verb}": _VERBS, "{adverb}": _ADVERBS}
SHORTEST_SENTENCE = len(_TEMPLATES[0])


def noise_sentence(rng: random.Random, room: int) -> tuple[str, ...]:
    """One random sentence of at most ``room`` words (3 or more) that leaves either nothing or room for another."""
    if room < SHORTEST_SENTENCE:
        raise InputError(f"room is {room} words; a noise sentence needs at least {SHORTEST_SENTENCE}")
    fitting = [t for t in _TEMPLATES if len(t) == room or room - len(t) >= SHORTEST_SENTENCE]
    return tuple(rng.choice(_SLOTS.get(word, (word,))) for word in rng.choice(fitting))


def words() -> tuple[str, ...]:
    """Every word that a prompt, a reasoning or an answer can hold, in a fixed order without repeats."""
    fixed = (word for template in _TEMPLATES for word in template if word not in _SLOTS)
    return tuple(dict.fromkeys(chain(MARKS, VARIABLES, NUMBERS, NEEDLE_KEYS, *_SLOTS.values(), fixed)))
