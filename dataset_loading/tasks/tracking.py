"""Following what becomes of things: chains of assignments, and who has what at the end of a story."""

import random
import re
from itertools import product
from string import ascii_lowercase

from .base import GeneratedTask

_SYMBOLS = list(ascii_lowercase)
_LONG_SYMBOLS = ["".join(pair) for pair in product(ascii_lowercase, repeat=2)]
_USUAL_ASSIGNMENTS = 12
_PEOPLE = ("Anna", "Ben", "Clara", "David", "Emma", "Felix", "Grace", "Henry", "Ida", "Jonas", "Kate", "Leo")
_PLACES = ("garden", "kitchen", "park", "school", "library", "station", "market", "forest")
_OPENINGS = (
    "It is a sunny morning.",
    "It is a quiet evening.",
    "It rains outside.",
    "The wind is cold today.",
    "It is late.",
)
_THINGS = ("ball", "book", "key", "lamp", "apple", "letter", "cup", "hat", "coin", "map", "flower", "drum")
_COLOURS = ("red", "blue", "green", "yellow", "white", "black")
_GIVING = (
    "{giver} gives the {thing} to {taker}.",
    "{giver} hands the {thing} to {taker}.",
    "{taker} takes the {thing} from {giver}.",
)
_RESTING = ("{who} smiles.", "{who} sits down.", "{who} looks at the {thing}.", "{who} tells a story.", "{who} waits.")
_HAS = re.compile(r"(\w+) has a \w+ (\w+)\.")
_GIVES = re.compile(r"\w+ (?:gives|hands) the (\w+) to (\w+)\.")
_TAKES = re.compile(r"(\w+) takes the (\w+) from \w+\.")
_QUESTION = re.compile(r"Who has the (\w+)\?$")


class ChainedLookup(GeneratedTask):
    """Follow `difficulty` assignments from the symbol asked for to a digit.

    Up to difficulty 8 every prompt has 12 assignments (beyond, difficulty + 4). In some prompts the chain goes on past
    the symbol asked for, and the rest are chains of other lengths that end in other digits. So neither the length of
    the prompt nor being the end of a chain tells the number of hops.
    """

    name = "chained_lookup"
    default_difficulty = (1, 4)

    def sample(self, rng: random.Random, difficulty: int) -> dict[str, str]:
        count = max(_USUAL_ASSIGNMENTS, difficulty + 4)
        lengths = [difficulty + rng.randrange(3)]
        left = count - lengths[0]
        for _ in range(rng.randrange(3)):  # up to three chains besides the one asked for
            if left > 1:
                lengths.append(rng.randrange(1, left))
                left -= lengths[-1]
        lengths.append(left)
        symbols = rng.sample(_SYMBOLS if count <= len(_SYMBOLS) else _LONG_SYMBOLS, count)
        digits = rng.sample("0123456789", len(lengths))
        assignments, asked, first = [], symbols[difficulty - 1], 0
        for length, value in zip(lengths, digits, strict=True):
            for symbol in symbols[first : first + length]:
                assignments.append(f"{symbol}={value}")
                value = symbol
            first += length
        rng.shuffle(assignments)
        return {"prompt": f"{' '.join(assignments)} ? {asked}", "answer": digits[0]}

    def check(self, prompt: str, answer: str) -> bool:
        assignments, _, asked = prompt.partition(" ? ")
        values = dict(assignment.split("=") for assignment in assignments.split())
        while asked in values:
            asked = values[asked]
        return asked == answer

    def identity(self, prompt: str) -> str:
        """The order of the assignments does not matter."""
        assignments, _, asked = prompt.partition(" ? ")
        return f"{' '.join(sorted(assignments.split()))} ? {asked}"


class Stories(GeneratedTask):
    """Three people, two things, and `difficulty` sentences in which things change hands or nothing happens."""

    name = "stories"
    default_difficulty = (1, 6)

    def sample(self, rng: random.Random, difficulty: int) -> dict[str, str]:
        people, things = rng.sample(_PEOPLE, 3), rng.sample(_THINGS, 2)
        holder = {thing: rng.choice(people) for thing in things}
        story = [rng.choice(_OPENINGS), f"{people[0]}, {people[1]} and {people[2]} are in the {rng.choice(_PLACES)}."]
        story += [f"{holder[thing]} has a {rng.choice(_COLOURS)} {thing}." for thing in things]
        for _ in range(difficulty):
            thing = rng.choice(things)
            if rng.random() < 0.7:
                giver = holder[thing]
                holder[thing] = rng.choice([person for person in people if person != giver])
                story.append(rng.choice(_GIVING).format(giver=giver, taker=holder[thing], thing=thing))
            else:
                story.append(rng.choice(_RESTING).format(who=rng.choice(people), thing=thing))
        asked = rng.choice(things)
        return {"prompt": f"{' '.join(story)} Who has the {asked}?", "answer": holder[asked]}

    def check(self, prompt: str, answer: str) -> bool:
        asked = _QUESTION.search(prompt).group(1)
        last_place, owner = -1, None
        for pattern, thing_group, owner_group in ((_HAS, 2, 1), (_GIVES, 1, 2), (_TAKES, 2, 1)):
            for match in pattern.finditer(prompt):
                if match.group(thing_group) == asked and match.start() > last_place:
                    last_place, owner = match.start(), match.group(owner_group)
        return owner == answer
