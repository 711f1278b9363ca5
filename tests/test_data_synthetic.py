"""Generated tasks: right answers, splits that share nothing, difficulty that counts what it says."""

import random
import re
from itertools import product

import pytest

from dataset_loading import TASKS, SourceConfig, get_task
from dataset_loading.tasks.base import split_of
from dataset_loading.tasks.cups import MOVES
from dataset_loading.tasks.registry import generate_row, generate_rows


def draw(name, role, count, difficulty, seed=0):
    return [generate_row(TASKS[name], difficulty, role, (seed, 0), index) for index in range(count)]


@pytest.mark.parametrize("name", sorted(TASKS))
def test_answers_pass_the_check_and_other_answers_do_not(name):
    rows = draw(name, "train", 300, (1, 9))
    answers = {row["answer"] for row in rows}
    for row in rows:
        assert TASKS[name].check(row["prompt"], row["answer"])
        assert not any(TASKS[name].check(row["prompt"], other) for other in answers - {row["answer"]})


def test_answers_computed_by_hand():
    assert TASKS["chained_lookup"].check("b=3 a=b c=a ? c", "3")
    assert TASKS["addition"].check("38+45=", "38") and not TASKS["addition"].check("38+45=", "83")
    assert TASKS["addition"].check("99+1=", "001")
    assert TASKS["subtraction"].check("83-45=", "83") and not TASKS["subtraction"].check("83-54=", "83")
    assert TASKS["subtraction"].check("50-40=", "01") and not TASKS["subtraction"].check("50-40=", "010")
    assert TASKS["reversal"].check("52817", "71825") and not TASKS["reversal"].check("52817", "7182")
    assert TASKS["sorting"].check("52811", "11258") and not TASKS["sorting"].check("52811", "1258")
    assert TASKS["calculator"].check("What is 2-3*4*5+7?", "-51") and not TASKS["calculator"].check("2-3*4", "-4")
    for prompt, answer in (("Add 9 and 8.", "17"), ("Take 8 away from 31.", "23"), ("Is 40 or 9 larger?", "40")):
        assert TASKS["instructions"].check(prompt, answer) and not TASKS["instructions"].check(prompt, f"0{answer}")
    assert TASKS["instructions"].check("Read 130 backwards.", "031")
    assert TASKS["instructions"].check("Put the digits of 130 in order.", "013")
    assert TASKS["cups"].check("bcbcbcVaa=", "3")  # 1 -> 2 -> 3
    assert TASKS["cups"].check("Zbd=", "5")  # 5 -> 3 -> 5
    assert TASKS["retold_cups"].check("bcbcbcVaa=", "Vaa=3") and TASKS["retold_cups"].check("Zbd=", "Zbd=5")
    assert not any(TASKS["retold_cups"].check("cZbd=", answer) for answer in ("5", "cZbd=5", "Zbd=4", "Zbb=5", ""))
    story = "It is late. Ben has a red cup. Ben gives the cup to Ida. Leo takes the cup from Ida. Ida smiles."
    assert TASKS["stories"].check(f"{story} Who has the cup?", "Leo")
    assert not TASKS["stories"].check(f"{story} Who has the cup?", "Ida")


def test_roles_share_no_instance():
    """Brute force over everything that one- and two-digit addition can ask, and over many draws of the other tasks."""
    task = TASKS["addition"]
    seen = {role: {task.identity(r["prompt"]) for r in draw("addition", role, 3000, (1, 2))} for role in ROLES}
    assert not any(seen[one] & seen[other] for one, other in [("train", "validation"), ("train", "test")])
    assert not seen["validation"] & seen["test"]
    for first, second in product(range(100), repeat=2):
        both = {split_of(task.identity(f"{first}+{second}=")), split_of(task.identity(f"{second}+{first}="))}
        assert len(both) == 1
    for name in ("chained_lookup", "cups", "retold_cups", "stories", "reversal", "instructions", "calculator"):
        sets = [{TASKS[name].identity(row["prompt"]) for row in draw(name, role, 500, (1, 2))} for role in ROLES]
        assert len(set.union(*sets)) == sum(map(len, sets))


ROLES = ("train", "validation", "test")


def test_four_fifths_of_the_instances_are_train():
    counts = [split_of(str(number)) for number in range(20_000)]
    shares = {role: counts.count(role) / 20_000 for role in ROLES}
    assert shares == pytest.approx({"train": 0.8, "validation": 0.1, "test": 0.1}, abs=0.01)


@pytest.mark.parametrize("hops", [1, 3, 8, 12, 30])
def test_lookup_takes_as_many_hops_as_its_difficulty(hops):
    for seed in range(50):
        row = TASKS["chained_lookup"].sample(random.Random(seed), hops)
        assignments, asked = row["prompt"].split(" ? ")
        values = dict(pair.split("=") for pair in assignments.split())
        assert len(values) == len(assignments.split())  # no symbol is assigned twice
        taken = 0
        while asked in values:
            asked, taken = values[asked], taken + 1
        assert (taken, asked) == (hops, row["answer"])


def test_lookup_depth_does_not_show_in_the_length_or_in_the_end_of_the_chain():
    """Prompts of all depths up to 8 are equally long, and a symbol at any depth may have others that depend on it."""
    lengths, has_follower = set(), {}
    for hops in range(1, 9):
        for seed in range(60):
            prompt = TASKS["chained_lookup"].sample(random.Random(seed), hops)["prompt"]
            lengths.add(len(prompt))
            has_follower.setdefault(hops, set()).add(f"={prompt[-1]} " in prompt)
    assert len(lengths) == 1
    assert all(seen == {True, False} for seen in has_follower.values())


def test_digits_of_an_addition_are_its_difficulty():
    for row in draw("addition", "train", 200, (1, 12)):
        first, second = row["prompt"].removesuffix("=").split("+")
        assert len(first) == len(second) == row["difficulty"]
        assert int(row["answer"][::-1]) == int(first) + int(second)


def test_difficulties_fill_their_range_and_no_more():
    difficulties = {row["difficulty"] for row in draw("stories", "test", 300, (4, 7))}
    assert difficulties == {4, 5, 6, 7}
    for row in draw("stories", "train", 50, (3, 3)):
        assert row["prompt"].count(".") == 4 + 3  # two sentences of scene, two of things, three of events


def test_rows_depend_on_seed_role_and_index_alone():
    """Any row can be drawn by itself, in any process."""
    task = TASKS["chained_lookup"]
    rows = generate_rows(task, (1, 4), "train", (5, 1), 40)
    assert list(rows) == [generate_row(task, (1, 4), "train", (5, 1), index) for index in range(40)]
    assert list(generate_rows(task, (1, 4), "train", (5, 1), 40, workers=2)) == list(rows)
    others = [generate_rows(task, (1, 4), role, seed, 40) for role, seed in [("test", (5, 1)), ("train", (5, 2))]]
    assert all(other["prompt"][0] != rows["prompt"][0] for other in others)


def test_unknown_task_lists_the_known_ones():
    message = r"'lookup' is unknown; choose one of a5_prefixes, a5_word, addition, calculator, chained_lookup, cup"
    with pytest.raises(ValueError, match=message):
        get_task("lookup")
    with pytest.raises(ValueError, match=message):
        SourceConfig("generated", task="lookup")


def test_moves_of_the_cups_reach_every_order_and_leave_no_ball_in_place():
    moves = [tuple(int(cup) - 1 for cup in places) for places in MOVES.values()]
    assert all(places[cup] != cup for places in moves for cup in range(5))
    reached, new = set(), {tuple(range(5))}
    while new:
        reached |= new
        new = {tuple(places[cup] for cup in order) for order in new for places in moves} - reached
    assert len(reached) == 120


def test_prompts_of_the_cups_are_equally_long_and_have_as_many_moves_after_the_letter_as_their_difficulty():
    for row in draw("cups", "train", 200, (1, 6)):
        before, after = re.split("[V-Z]", row["prompt"])
        assert len(row["prompt"]) == 8 and len(after) == row["difficulty"] + 1 and len(before) == 6 - row["difficulty"]
    assert re.fullmatch("[V-Z][abcd]{11}=", TASKS["cups"].sample(random.Random(0), 11)["prompt"])


def test_questions_of_the_cups_with_four_moves_or_more_belong_to_one_role():
    """Whatever moves are in front of the letter; those of three or less occur in all roles."""
    seen = {}
    for role in ROLES:
        rows = draw("cups", role, 4000 if role == "train" else 1000, (3, 5))
        seen[role] = {row["prompt"][re.search("[V-Z]", row["prompt"]).start() :] for row in rows}
    for one, other in (("train", "validation"), ("train", "test"), ("validation", "test")):
        shared = seen[one] & seen[other]
        assert {len(question) for question in shared} == {len("Xaaa=")}
    assert len({question for question in seen["train"] if len(question) == len("Xaaaa=")}) > 500


def test_no_cup_is_the_answer_more_often_than_others_after_three_moves():
    rows = draw("cups", "train", 3000, (3, 8))
    counts = [sum(row["answer"] == cup for row in rows) for cup in "12345"]
    assert min(counts) > 500


def test_results_of_the_calculator_are_those_of_python():
    """The expressions consist of digits and operators alone, so that Python's own reading of them can be asked."""
    for row in draw("calculator", "train", 300, (1, 5)):
        expression = re.search(r"[\d*+-]+", row["prompt"])[0]
        assert row["answer"] == str(eval(expression)) and len(re.findall(r"[*+-]", expression)) == row["difficulty"]


def test_the_calculator_is_called_before_it_answers():
    row = {"prompt": "Compute 12*3-4.", "answer": "32"}
    assert TASKS["calculator"].replies(row) == [
        {"role": "assistant", "content": "calculator(12*3-4)"},
        {"role": "tool", "content": "32"},
        {"role": "assistant", "content": "32"},
    ]


def test_instructions_ask_the_same_in_several_wordings_for_one_role():
    task = TASKS["instructions"]
    same = ["What is 31 plus 8?", "Add 31 and 8.", "How much are 31 and 8 together?"]
    assert len({task.identity(prompt) for prompt in same}) == 1
    assert len({task.identity(f"{verb} the digits of 31.") for verb in ("Sort", "Reverse")}) == 2
    verbs = "What Add How Subtract Take Which Is Name Reverse Read Sort Put"
    openings = {row["prompt"].split(" ")[0] for row in draw("instructions", "train", 300, (1, 2))}
    assert openings == set(verbs.split())
