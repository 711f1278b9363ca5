"""Short stories in plain English with a question: who has the ball in the end?"""

import random
import re

from .synthetic_task import GeneratedTask

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
