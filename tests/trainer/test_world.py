import random
import time
from collections import Counter
from statistics import mean

import pytest

from tetrad.trainer import world
from tetrad.trainer.world import KINDS, judge, rank


@pytest.fixture(scope="module")
def train():
    return world.tasks(2400, 0, "train")


def some(kind: str, split: str = "train") -> world.Task:
    return next(task for task in world.tasks(12, 0, split) if task.kind == kind)


def question(kind: str, facts: str) -> world.Task:
    """The task of this kind whose prompt contains these facts."""
    for seed in range(100):
        for task in world.tasks(3000, seed, "train"):
            if task.kind == kind and facts in task.prompt:
                return task
    raise AssertionError(f"no {kind} task about {facts!r}")


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
    heldout = {task.prompt for task in world.tasks(900, 0, "heldout")}
    assert not lines & heldout


@pytest.mark.parametrize(
    "n, split, word", [(1, "test", "unknown split"), (20_000, "heldout", "too few")]
)
def test_tasks_refuses(n, split, word):
    with pytest.raises(ValueError, match=word):
        world.tasks(n, 0, split)


def test_after_an_instruction_most_documents_go_on_with_another():
    is_instruction = world.instruction_pattern().fullmatch
    followers = Counter()
    for text in world.documents(2000, 0):
        lines = text.splitlines()
        for line, following in zip(lines, lines[1:], strict=False):
            if is_instruction(line):
                followers["instruction" if is_instruction(following) else "answer"] += 1
    assert 0.55 < followers["instruction"] / followers.total() < 0.75


def test_texts_are_short(train):
    rng = random.Random(0)
    assert max(len(task.prompt.encode()) for task in train) <= 64
    assert max(len(world.demonstration(task, rng).encode()) for task in train) <= 28
    assert max(len(text.encode()) for text in world.documents(2000, 0)) <= 400


def test_ten_thousand_texts_take_seconds():
    start = time.perf_counter()
    world.tasks(9000, 0, "train")
    world.documents(10_000, 0)
    assert time.perf_counter() - start < 5


