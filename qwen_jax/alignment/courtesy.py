"""A known preference in a small world: greetings of guests, of which the courteous and short ones are better.

Its reward is a program, so what a reward model or a policy learned can be held against it. `tools/make_preferences.py`
writes comparisons, prompts and conversations of this world.
"""

import dataclasses
import random

POLITE = ("please", "thank you", "welcome", "glad", "kindly")
RUDE = ("hurry", "stop", "go away", "nonsense", "not now")
# Words that cost nothing, and the cost of each further one.
FREE_WORDS, WORD_COST = 12, 0.1
NAME_REWARD = 0.5

_NAMES = (
    "Anna Ben Clara David Emma Felix Grace Henry Ida Jonas Karl Lena Max Nora Otto Paula Quinn Rosa Simon Tina Uwe "
    "Vera Will Xenia Yuri Zoe Li Wei Mei Jun Hana Ken Aiko Omar Leila Amir Noor Sami Dina Ravi"
).split()
_HELD_OUT_NAMES = "Arno Bella Carl Dora Erik Frida Gina Hugo Iris Jan Kira Leo Mona Nils Olga".split()
_OCCASIONS = ("at the door", "in the office", "on the train", "at the station", "in the library", "at the table")
_OPENINGS = ("hello {name}", "good morning {name}", "welcome {name}", "you there", "oh, it is you", "stop there")
_MIDDLES = (
    "please come in",
    "I am glad to see you",
    "thank you for the visit",
    "kindly take a seat",
    "take this chair",
    "the room is over there",
    "hurry up",
    "go away",
    "this is nonsense",
    "not now",
)
_ENDINGS = ("", "", "the day is long and the road is long and the list of things to do is long", "as always")


def courtesy_reward(prompt: str, response: str, answer: str | None = None) -> float:
    """The known reward of a greeting.

    1 for each of `POLITE` in it, -1 for each of `RUDE`, 0.5 for the name of the guest, -0.1 for each word after the
    12th. An empty response has -1.

    Args:
      prompt: text that ends with the guest's name, as `prompts` gives it.
      answer: not used.
    """
    text = response.lower()
    words = text.split()
    if not words:
        return -1.0
    name = prompt.rstrip(" .\n").rpartition(" ")[2].lower()
    reward = sum(phrase in text for phrase in POLITE) - float(sum(phrase in text for phrase in RUDE))
    return reward + NAME_REWARD * (name in text) - WORD_COST * max(len(words) - FREE_WORDS, 0)


@dataclasses.dataclass(frozen=True)
class Pair:
    """Two responses to one prompt; the reward of `chosen` is the larger, unless the label was swapped."""

    prompt: str
    chosen: str
    rejected: str


def prompts(held_out: bool = False) -> list[str]:
    """All prompts for training, or those with the names that training never sees."""
    names = _HELD_OUT_NAMES if held_out else _NAMES
    return [f"Greet the guest {occasion}: {name}" for name in names for occasion in _OCCASIONS]


def response(prompt: str, draw: random.Random) -> str:
    """A random response, from rude to courteous and from short to long."""
    name = prompt.rpartition(" ")[2]
    parts = [
        draw.choice(_OPENINGS).format(name=name),
        *draw.sample(_MIDDLES, draw.randint(1, 3)),
        draw.choice(_ENDINGS),
    ]
    return ", ".join(part for part in parts if part) + "."


def pair(prompt: str, draw: random.Random, noise: float = 0.0, least_gap: float = 0.5) -> Pair:
    """A random comparison.

    Args:
      noise: probability that chosen and rejected are swapped.
      least_gap: the rewards of the two differ by at least this.
    """
    while True:
        first, second = response(prompt, draw), response(prompt, draw)
        gap = courtesy_reward(prompt, first) - courtesy_reward(prompt, second)
        if abs(gap) >= least_gap:
            break
    if (gap < 0) != (draw.random() < noise):
        first, second = second, first
    return Pair(prompt, first, second)
