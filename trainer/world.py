"""A world in miniature for `tetrad demo`: InstructGPT's problem, small enough for a laptop.

The paper starts from a model that *continues* an instruction where its user wanted an *answer*.
Here that model is made on purpose. Most pretraining documents are sheets of instructions, one a
line; a few sheets have the answers below the instructions. A model of such text has seen how
instructions are answered, and still writes another instruction when it is given one:

    prompt      say the first: fig saw hen.⏎
    it writes   in the past: ida hits a kea.
    wanted      the fig.

Demonstrations come from simulated labelers with habits, most of them not quite good ones;
comparisons from a simulated labeler who sees the gold score through noise; `judge` is the gold
score. Everything follows from a seed and is short enough for a model that reads bytes: a prompt
has at most 40, its final newline included, which marks the place of the answer; a demonstration
has at most 28.
"""

import random
import re
import zlib
from collections.abc import Callable
from dataclasses import dataclass

# Six of the ten kinds of use in the paper's table 1: those that have short answers.
KINDS = ("generation", "brainstorm", "rewrite", "classify", "closed_qa", "extract")
SPLITS = ("train", "heldout")
HELDOUT_ONE_IN = 8  # about one prompt in eight is held out

# A small model learns from few bytes to copy when the words are easy to find and to tell apart:
# words of a class have one length, so that what a prompt names stands at one distance from where
# the answer repeats it, and different first letters, so that one byte decides which word it is.
# Nouns start with a consonant, so that "a" always fits.
_MEMBERS = {
    "bird": ("hen", "jay", "kea", "daw", "moa"),
    "food": ("bun", "fig", "pie", "nut", "yam"),
    "tool": ("saw", "cog", "tap", "rod", "wok"),
}
_CATEGORIES = list(_MEMBERS)
_CATEGORY_OF = {thing: category for category, members in _MEMBERS.items() for thing in members}
_PAST = {"wins": "won", "gets": "got", "eats": "ate", "hits": "hit", "cuts": "cut", "digs": "dug"}
_VERBS = frozenset(_PAST) | frozenset(_PAST.values())

Slot = frozenset[str]


@dataclass(frozen=True)
class _Words:
    """What tasks and sentences are made of: the whole world, or what one document is about."""

    names: tuple[str, ...]
    looks: tuple[str, ...]
    things: tuple[str, ...]


_WORLD = _Words(
    names=tuple("tom ann bob eva sam lea max ida zoe jon kim ray pat dan fay gus".split()),
    looks=("big", "red", "new", "wet", "dry", "tan"),
    things=tuple(_CATEGORY_OF),
)


@dataclass(frozen=True)
class Task:
    kind: str
    prompt: str  # ends with a newline; the response starts right after it
    answer: str  # one ideal response, for the careful labeler and for the length that is right
    slip: str  # a wrong response of the same form, for the careless labeler
    wanted: tuple[Slot, ...]  # a right response has a different word of each slot, in this order
    unwanted: Slot = frozenset()  # words that contradict the answer, e.g. the other category


def tasks(n: int, seed: int, split: str) -> list[Task]:
    """n tasks with n different prompts, the kinds in equal shares and shuffled.

    A prompt belongs to the split that its own checksum names (`split_of`), so no prompt can be in
    both, whatever the seeds. Raises ValueError for an unknown split, and when a kind has too few
    prompts for n (4,800 tasks are there in "train", 600 in "heldout").
    """
    if split not in SPLITS:
        raise ValueError(f"unknown split {split!r}: one of {', '.join(SPLITS)}")
    rng = random.Random(f"tasks {seed} {split}")
    drawn: dict[str, Task] = {}
    for i in range(n):
        kind = KINDS[i % len(KINDS)]
        for _ in range(1000):
            task = _draw(kind, split, _WORLD, rng)
            if task.prompt not in drawn:
                drawn[task.prompt] = task
                break
        else:
            raise ValueError(f"{n} tasks: {kind} has too few different prompts in {split!r}")
    shuffled = list(drawn.values())
    rng.shuffle(shuffled)
    return shuffled


def split_of(prompt: str) -> str:
    return "heldout" if zlib.crc32(prompt.encode()) % HELDOUT_ONE_IN == 0 else "train"


def documents(n: int, seed: int) -> list[str]:
    """n pretraining documents of three to ten lines, without a held-out prompt among them.

    Of 20 documents 11 are sheets of instructions alone, 6 are sheets with the answer under each
    instruction, and 3 are plain sentences. Each is about a few people and things, as texts
    are: what was named comes back, which is what teaches a small model to copy.
    """
    rng = random.Random(f"documents {seed}")
    written = []
    for _ in range(n):
        about = _Words(
            names=tuple(rng.sample(_WORLD.names, 3)),
            looks=tuple(rng.sample(_WORLD.looks, 3)),
            things=tuple(rng.choice(members) for members in _MEMBERS.values()),
        )
        (write,) = rng.choices((_sheet, _answered_sheet, _sentences), (11, 6, 3))
        written.append(write(about, rng))
    return written


def demonstration(task: Task, rng: random.Random) -> str:
    """A response by one of the simulated labelers, drawn by how much each of them writes."""
    (habit,) = rng.choices(list(_LABELERS), list(_LABELERS.values()))
    return habit(task, rng)


def judge(task: Task, response: str) -> float:
    """The gold score in [0, 1]: correctness * (1/2 + 1/4 form + 1/4 length).

    correctness: the share of wanted slots that the first line fills, in their order, less one slot
        for each unwanted word. An instruction or a question in place of an answer has none.
    form: 1 for a single line that is one sentence and ends with its period, else 0.
    length: 1 for as many words as the ideal answer; each word more or less takes one half.

    So a wrong answer is worth nothing, however well it is put, a right one at least 1/2, and one
    that is partly right (a brainstorm with one of its two ideas) a part of that.
    """
    text = response.strip()
    first_line = text.split("\n")[0]
    if _INSTRUCTION.match(first_line):
        return 0.0
    words = re.findall("[a-z]+", first_line)
    contradictions = len(task.unwanted.intersection(words))
    correctness = max(0, _slots_filled(task.wanted, words) - contradictions) / len(task.wanted)
    form = "\n" not in text and text.find(".") == len(text) - 1
    difference = abs(len(text.split()) - len(task.answer.split()))
    length = max(0.0, 1 - difference / 2)
    return correctness * (0.5 + 0.25 * form + 0.25 * length)


def rank(
    task: Task, responses: list[str], rng: random.Random, noise: float = 0.05, tie: float = 0.1
) -> list[int]:
    """A labeler's ranks, 1 = best, dense: responses that tie share a rank, the next has the next.

    The labeler sees the gold score plus Gaussian noise of the given standard deviation, the same
    for two equal texts, and ties a response with the best of its group when they look less than
    `tie` apart.
    """
    seen = {text: judge(task, text) + rng.gauss(0, noise) for text in dict.fromkeys(responses)}
    ranks: dict[str, int] = {}
    current, best_of_group = 0, float("inf")
    for text in sorted(seen, key=seen.__getitem__, reverse=True):
        if best_of_group - seen[text] >= tie:
            current, best_of_group = current + 1, seen[text]
        ranks[text] = current
    return [ranks[text] for text in responses]


_INSTRUCTION = re.compile(r"tell |name |.*[?:]")


def _slots_filled(wanted: tuple[Slot, ...], words: list[str]) -> int:
    """How many slots the words fill from left to right; a word counts once."""
    used, position = set(), 0
    for word in words:
        for i in range(position, len(wanted)):
            if word in wanted[i] and word not in used:
                used.add(word)
                position = i + 1
                break
    return len(used)


def _draw(kind: str, split: str, words: _Words, rng: random.Random) -> Task:
    while True:
        task = _MAKERS[kind](words, rng)
        if split_of(task.prompt) == split:
            return task


def _generation(words: _Words, rng: random.Random) -> Task:
    name, look = rng.choice(words.names), rng.choice(words.looks)
    thing, other = rng.sample(words.things, 2)
    verb = rng.choice(list(_PAST.values()))
    return Task(
        "generation",
        prompt=f"tell of {name} and a {look} {thing}.\n",
        answer=f"{name} {verb} a {look} {thing}.",
        slip=f"{name} {verb} a {other}.",
        wanted=_slots(name, _VERBS, look, thing),
        unwanted=frozenset(_WORLD.things) - {thing},
    )


def _brainstorm(words: _Words, rng: random.Random) -> Task:
    one, other, neither = rng.sample(_CATEGORIES, 3)
    name, friend = rng.sample(words.names, 2)
    return Task(
        "brainstorm",
        prompt=f"name a {one} for {name} and a {other} for {friend}.\n",
        answer=f"{rng.choice(_MEMBERS[one])} and {rng.choice(_MEMBERS[other])}.",
        slip=" and ".join(rng.sample(_MEMBERS[neither], 2)) + ".",
        wanted=_slots(frozenset(_MEMBERS[one]), frozenset(_MEMBERS[other])),
        unwanted=frozenset(_MEMBERS[neither]),
    )


def _rewrite(words: _Words, rng: random.Random) -> Task:
    name, thing = rng.choice(words.names), rng.choice(words.things)
    verb, past = rng.choice(list(_PAST.items()))
    return Task(
        "rewrite",
        prompt=f"in the past: {name} {verb} a {thing}.\n",
        answer=f"{name} {past} a {thing}.",
        slip=f"{name} {verb} a {thing}.",
        wanted=_slots(name, past, thing),
        unwanted=(_VERBS | frozenset(_WORLD.things)) - {past, thing},
    )


def _classify(words: _Words, rng: random.Random) -> Task:
    thing = rng.choice(words.things)
    category = _CATEGORY_OF[thing]
    other = rng.choice([c for c in _CATEGORIES if c != category])
    this, that = rng.sample((category, other), 2)
    return Task(
        "classify",
        prompt=f"{this} or {that}? {rng.choice(words.names)} has a {thing}.\n",
        answer=f"a {category}.",
        slip=f"a {other}.",
        wanted=_slots(category),
        unwanted=frozenset(_CATEGORIES) - {category},
    )


def _closed_qa(words: _Words, rng: random.Random) -> Task:
    name, stranger = rng.sample(words.names, 2)
    look, thing = rng.choice(words.looks), rng.choice(words.things)
    if rng.random() < 0.5:
        question, unwanted = "who has it", frozenset(_WORLD.names) - {name}
        wanted: tuple[str, ...] = (name,)
        answer, slip = f"{name} has it.", f"{stranger} has it."
    else:
        question, wanted, unwanted = "what is it", (look, thing), frozenset(_WORLD.names)
        answer, slip = f"a {look} {thing}.", f"{stranger} has it."
    return Task(
        "closed_qa",
        prompt=f"{name} has a {look} {thing}. {question}?\n",
        answer=answer,
        slip=slip,
        wanted=_slots(*wanted),
        unwanted=unwanted,
    )


def _extract(words: _Words, rng: random.Random) -> Task:
    things = rng.sample(words.things, 3)
    place, found, missed = rng.choice((("first", *things[:2]), ("final", *things[:0:-1])))
    return Task(
        "extract",
        prompt=f"say the {place}: {' '.join(things)}.\n",
        answer=f"the {found}.",
        slip=f"the {missed}.",
        wanted=_slots(found),
        unwanted=frozenset(_WORLD.things) - {found},
    )


def _slots(*alternatives: str | Slot) -> tuple[Slot, ...]:
    return tuple(frozenset({a}) if isinstance(a, str) else a for a in alternatives)


_MAKERS: dict[str, Callable[[_Words, random.Random], Task]] = {
    "generation": _generation,
    "brainstorm": _brainstorm,
    "rewrite": _rewrite,
    "classify": _classify,
    "closed_qa": _closed_qa,
    "extract": _extract,
}


def _sheet(words: _Words, rng: random.Random) -> str:
    return "".join(_instruction(words, rng).prompt for _ in range(rng.randint(3, 5)))


def _answered_sheet(words: _Words, rng: random.Random) -> str:
    sheet = [_instruction(words, rng) for _ in range(rng.randint(3, 5))]
    return "".join(f"{task.prompt}{task.answer}\n" for task in sheet)


def _sentences(words: _Words, rng: random.Random) -> str:
    return "".join(f"{_sentence(words, rng)}\n" for _ in range(rng.randint(3, 6)))


def _instruction(words: _Words, rng: random.Random) -> Task:
    return _draw(rng.choice(KINDS), "train", words, rng)


def _sentence(words: _Words, rng: random.Random) -> str:
    name, look, thing = (
        rng.choice(choices) for choices in (words.names, words.looks, words.things)
    )
    verb, past = rng.choice(list(_PAST.items()))
    return rng.choice(
        (
            f"a {thing} is a {_CATEGORY_OF[thing]}.",
            f"{name} {verb} a {thing}. {name} {past} a {thing}.",
            f"{name} has a {look} {thing}. the {thing} is {look}.",
        )
    )


def _careful(task: Task, rng: random.Random) -> str:
    return task.answer


def _hasty(task: Task, rng: random.Random) -> str:
    return task.answer.removesuffix(".")


def _terse(task: Task, rng: random.Random) -> str:
    words = task.answer.removesuffix(".").split()
    return " ".join(word for word in words if word not in ("a", "the", "and"))


def _wordy(task: Task, rng: random.Random) -> str:
    return task.answer.removesuffix(".") + rng.choice((", i think.", ", you see.", ", or so."))


def _careless(task: Task, rng: random.Random) -> str:
    return rng.choice((task.answer, task.slip))


_LABELERS = {_careful: 5, _hasty: 5, _terse: 2, _wordy: 5, _careless: 3}  # share of what they write
