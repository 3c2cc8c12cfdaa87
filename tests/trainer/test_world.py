import random
import re
import time
from collections import Counter
from statistics import mean

import pytest

from tetrad.trainer import world
from tetrad.trainer.world import KINDS, judge, rank

# What a reader finds in each kind of prompt, so that the tests below answer from the prompt alone.
PROMPTS = {
    "generation": r"tell of (?P<name>\w+) and a (?P<look>\w+) (?P<thing>\w+)\.",
    "brainstorm": r"name a (?P<one>\w+) for \w+ and a (?P<two>\w+) for \w+\.",
    "rewrite": r"in the past: (?P<name>\w+) (?P<verb>\w+) a (?P<thing>\w+)\.",
    "classify": r"(?P<one>\w+) or (?P<two>\w+)\? \w+ has a (?P<thing>\w+)\.",
    "closed_qa": r"(?P<name>\w+) has (?P<thing>a \w+ \w+)\. (?P<asked>who|what) .*\?",
    "extract": r"say the (?P<place>first|final): (?P<things>.*)\.",
}
MEMBERS = {
    "bird": "hen jay kea daw moa".split(),
    "food": "bun fig pie nut yam".split(),
    "tool": "saw cog tap rod wok".split(),
}
PAST = dict(wins="won", gets="got", eats="ate", hits="hit", cuts="cut", digs="dug")


@pytest.fixture(scope="module")
def train():
    return world.tasks(2400, 0, "train")


def some(kind: str, split: str = "train") -> world.Task:
    return next(task for task in world.tasks(12, 0, split) if task.kind == kind)


def test_everything_follows_from_the_seed():
    assert world.tasks(100, 1, "train") == world.tasks(100, 1, "train")
    assert world.tasks(100, 1, "train") != world.tasks(100, 2, "train")
    assert world.documents(50, 1) == world.documents(50, 1) != world.documents(50, 2)
    task = some("closed_qa")
    one, two = random.Random(3), random.Random(3)
    assert [world.demonstration(task, one) for _ in range(20)] == [
        world.demonstration(task, two) for _ in range(20)
    ]


def test_prompts_are_unique_and_the_kinds_have_equal_shares(train):
    assert len({task.prompt for task in train}) == 2400
    assert Counter(task.kind for task in train) == dict.fromkeys(KINDS, 400)


def test_no_prompt_is_in_both_splits_whatever_the_seed(train):
    heldout = {task.prompt for seed in (0, 1) for task in world.tasks(600, seed, "heldout")}
    assert not heldout & {task.prompt for task in train}
    assert {world.split_of(prompt) for prompt in heldout} == {"heldout"}


def test_documents_hold_no_heldout_prompt():
    lines = {f"{line}\n" for text in world.documents(2000, 0) for line in text.splitlines()}
    heldout = {task.prompt for task in world.tasks(600, 0, "heldout")}
    assert not lines & heldout


@pytest.mark.parametrize(
    "n, split, word", [(1, "test", "unknown split"), (20_000, "heldout", "too few")]
)
def test_tasks_refuses(n, split, word):
    with pytest.raises(ValueError, match=word):
        world.tasks(n, 0, split)


def test_after_an_instruction_most_documents_go_on_with_another():
    first, every = Counter(), Counter()
    for text in world.documents(2000, 0):
        lines = text.splitlines()
        asks = [any(re.fullmatch(form, line) for form in PROMPTS.values()) for line in lines]
        if asks[0]:  # a plain document has no instruction
            first[asks[1]] += 1
            every.update(after for ask, after in zip(asks, asks[1:], strict=False) if ask)
    assert 0.6 < first[True] / first.total() < 0.7  # where a lone prompt stands
    assert every[True] > every[False] > 0


def test_texts_are_short(train):
    rng = random.Random(0)
    assert max(len(task.prompt.encode()) for task in train) <= 40
    assert max(len(world.demonstration(task, rng).encode()) for task in train) <= 28
    assert max(len(text.encode()) for text in world.documents(2000, 0)) <= 512


def test_thousands_of_texts_take_seconds():
    start = time.process_time()
    world.tasks(4800, 0, "train")
    world.documents(10_000, 0)
    assert time.process_time() - start < 10


def right_and_wrong(task: world.Task) -> tuple[str, str]:
    """A right and a wrong response without their period, from the prompt alone."""
    facts = re.fullmatch(PROMPTS[task.kind] + "\n", task.prompt).groupdict()
    match task.kind:
        case "generation":
            return "{name} dug a {look} {thing}".format(**facts), "ned has a dog"
        case "brainstorm":
            one, two = MEMBERS[facts["one"]], MEMBERS[facts["two"]]
            return f"{one[3]} and {two[0]}", "dog and cat"
        case "rewrite":
            past = PAST[facts["verb"]]
            return "{name} {past} a {thing}".format(past=past, **facts), "ned slept"
        case "classify":
            one, two = facts["one"], facts["two"]
            right, wrong = (one, two) if facts["thing"] in MEMBERS[one] else (two, one)
            return f"a {right}", f"a {wrong}"
        case "closed_qa":
            if facts["asked"] == "who":
                return "{name} has it".format(**facts), "ned has it"
            return facts["thing"], "{name} has it".format(**facts)
        case "extract":
            first, _, final = facts["things"].split()
            right, wrong = (first, final) if facts["place"] == "first" else (final, first)
            return f"the {right}", f"the {wrong}"


@pytest.mark.parametrize("kind", KINDS)
def test_the_judge_scores_correctness_form_and_length(kind, train):
    for task in [task for task in train if task.kind == kind][:50]:
        right, wrong = right_and_wrong(task)
        assert judge(task, f"{right}.") == 1
        assert judge(task, f" {right}.\n") == 1  # white space around it is no fault
        assert judge(task, right) == 0.75  # no period
        assert judge(task, f"ok {right}.") == 0.875  # a word too many
        assert judge(task, f"i say {right}.") == 0.75
        assert judge(task, f"well i would say {right}") == 0.5
        assert judge(task, f"{right}.\nsay the first: tap hen fig") == 0.5  # answers, then goes on
        assert judge(task, f"{right}. yes.") == 0.625  # two sentences and a word too many
        assert judge(task, f"{wrong}.") == judge(task, wrong) == 0
        assert judge(task, "") == judge(task, ".") == judge(task, " \n ") == 0
        assert judge(task, task.answer) == 1
        assert judge(task, task.slip) < 0.5


def test_an_instruction_is_no_answer(train):
    for task, other in zip(train, train[1:], strict=False):
        assert judge(task, other.prompt) == judge(task, task.prompt) == 0


def test_half_an_answer_has_half_the_score(train):
    task = next(task for task in train if task.kind == "brainstorm")
    right, _ = right_and_wrong(task)
    one = right.split()[0]
    assert judge(task, f"{one} and {one}.") == 0.5
    assert judge(task, f"{one} and one.") == 0.5


def test_naming_everything_is_no_answer(train):
    for task in train:
        if task.kind in ("classify", "extract"):
            right, wrong = right_and_wrong(task)
            assert judge(task, f"{right} and {wrong}.") == 0


def test_words_in_the_wrong_order_do_not_count(train):
    task = next(task for task in train if task.kind == "rewrite")
    name, past, _, thing = right_and_wrong(task)[0].split()
    assert judge(task, f"a {thing} {past} {name}.") == pytest.approx(1 / 3)


def test_demonstrations_are_of_mixed_quality(train):
    rng = random.Random(0)
    gold = [judge(task, world.demonstration(task, rng)) for task in train]
    assert 0.7 < mean(gold) < 0.85
    assert 0.2 < mean(score == 1 for score in gold) < 0.5
    assert 0.02 < mean(score == 0 for score in gold) < 0.15


def test_ranks_follow_the_gold_score_and_near_equals_tie(train):
    task = next(task for task in train if task.kind == "extract")
    right, wrong = right_and_wrong(task)
    responses = [wrong, f"{right}.", right, f"i say {right}.", f"{right}."]
    assert rank(task, responses, random.Random(0), noise=0) == [3, 1, 2, 2, 1]
    assert rank(task, [], random.Random(0)) == []


def test_noise_changes_some_ranks_and_never_parts_equal_texts(train):
    task = next(task for task in train if task.kind == "extract")
    right, _ = right_and_wrong(task)
    responses = [f"{right}.", f"ok {right}.", right, right]  # 1, 0.875, 0.75
    seen = [rank(task, responses, random.Random(seed)) for seed in range(200)]
    assert all(ranks[2] == ranks[3] for ranks in seen)
    assert all(sorted(set(ranks)) == list(range(1, max(ranks) + 1)) for ranks in seen)  # dense
    assert len({tuple(ranks) for ranks in seen}) > 2
    loud = [rank(task, responses, random.Random(seed), noise=0.3) for seed in range(200)]
    assert 0.4 < mean(ranks[0] == 1 for ranks in loud) < 0.9
