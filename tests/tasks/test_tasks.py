"""Tasks: determinism, rewards of right, wrong and garbage text, accuracy of demonstrations."""

import itertools
import math
import re
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_rl.policy.tokenizer import tokenizer_of
from moe_rl.tasks import TASKS, Countdown, Problem, RunningSum, Task, make_task
from moe_rl.tasks.countdown import possible_steps, reachable_targets

ALL = [
    RunningSum(),
    RunningSum(digits=1),
    RunningSum(digits=6, digits_per_token=2),
    Countdown(),
    Countdown(numbers=2, max_number=9),
    Countdown(numbers=4, max_number=9),
]


def columns_of(problems: Sequence[Problem]) -> dict[str, list[Any]]:
    return {key: [p.columns[key] for p in problems] for key in problems[0].columns}


def rewards(task: Task, problems: Sequence[Problem], completions: Sequence[str]) -> list[float]:
    return task.reward([p.prompt for p in problems], completions, **columns_of(problems))


def countdown_reward(completion: str, numbers: Sequence[int], target: int, **options: int) -> float:
    task = Countdown(numbers=len(numbers), **options)
    return task.reward(["?"], [completion], numbers=[numbers], target=[target])[0]


@pytest.mark.parametrize("task", ALL, ids=repr)
def test_equal_generators_give_equal_problems_and_demonstrations(task: Task) -> None:
    first, again = (task.prompts(np.random.default_rng(7), 20) for _ in range(2))
    assert first == again
    assert first != task.prompts(np.random.default_rng(8), 20)
    one, two = (task.demonstrations(np.random.default_rng(7), 20, 0.3) for _ in range(2))
    assert one == two
    assert [prompt for prompt, _ in one] == [problem.prompt for problem in first]


@pytest.mark.parametrize("task", ALL, ids=repr)
def test_demonstrations_without_slips_are_all_right(task: Task) -> None:
    problems = task.prompts(np.random.default_rng(0), 300)
    demonstrations = task.demonstrations(np.random.default_rng(0), 300, 0.0)
    assert rewards(task, problems, [text for _, text in demonstrations]) == [1.0] * 300


@pytest.mark.parametrize("task", ALL, ids=repr)
def test_texts_fit_the_declared_tokens_and_lengths(task: Task) -> None:
    assert len(set(task.alphabet)) == len(task.alphabet)
    tokenizer = tokenizer_of(task.alphabet)
    demonstrations = task.demonstrations(np.random.default_rng(3), 500, 0.5)
    prompts, texts = (list(column) for column in zip(*demonstrations, strict=True))
    for column in (prompts, texts):
        ids = tokenizer(column)["input_ids"]
        assert tokenizer.batch_decode(ids) == column
        assert tokenizer.pad_token_id not in set(itertools.chain.from_iterable(ids))
        longest = max(map(len, ids))
        if column is prompts:
            assert longest == task.max_prompt_tokens
        else:
            assert longest + 1 <= task.max_response_tokens


def test_two_digits_a_token_are_the_same_problems_in_half_the_tokens() -> None:
    one, two = RunningSum(digits=6), RunningSum(digits=6, digits_per_token=2)
    assert one.prompts(np.random.default_rng(1), 9) == two.prompts(np.random.default_rng(1), 9)
    assert len(tokenizer_of(two.alphabet)("314159=")["input_ids"]) == 4
    with pytest.raises(ValueError, match="digits=5 with digits_per_token=2: a digit would be left"):
        RunningSum(digits=5, digits_per_token=2)


@pytest.mark.parametrize("task", ALL, ids=repr)
def test_a_response_cut_off_at_the_longest_length_is_never_right(task: Task) -> None:
    problems = task.prompts(np.random.default_rng(1), 200)
    texts = [t for _, t in task.demonstrations(np.random.default_rng(1), 200, 0.0)]
    filler = task.max_response_tokens
    cut = [(text + text[-1] * filler)[:filler] for text in texts]
    assert rewards(task, problems, cut) == [0.0] * 200


@settings(deadline=None, max_examples=100)
@given(
    text=st.one_of(
        st.text(max_size=20),
        st.text(alphabet="0123456789+-*=,:", max_size=20),
        st.builds("{}+{}={},{}*{}={}".format, *[st.integers(-1, 120)] * 6),
    ),
    task=st.sampled_from(ALL),
)
def test_garbage_gets_zero_or_one_and_never_raises(text: str, task: Task) -> None:
    problems = task.prompts(np.random.default_rng(2), 1)
    assert rewards(task, problems, [text])[0] in (0.0, 1.0)


@pytest.mark.parametrize("task", ALL, ids=repr)
def test_garbage_of_other_alphabets_is_wrong(task: Task) -> None:
    problems = task.prompts(np.random.default_rng(2), 6)
    texts = ["", ",", "9" * 5000, "1+1=" + "9" * 5000, "\u0661+\u0662=\u0663", "\n"]
    assert rewards(task, problems, texts) == [0.0] * 6


@pytest.mark.parametrize("task", ALL, ids=repr)
def test_rewards_take_columns_as_trl_passes_them(task: Task) -> None:
    problems = task.prompts(np.random.default_rng(4), 3)
    texts = [t for _, t in task.demonstrations(np.random.default_rng(4), 3, 0.0)]
    found = task.reward(
        prompts=[p.prompt for p in problems],
        completions=texts,
        completion_ids=[[1]] * 3,
        trainer_state=[None] * 3,
        **columns_of(problems),
    )
    assert found == [1.0] * 3 and all(type(value) is float for value in found)


def test_running_sum_of_an_example_by_hand() -> None:
    task = RunningSum(digits=4)
    answers = ["3489", "3489 ", "348", "34890", "3488", ""]
    found = task.reward(["3141="] * 6, answers, answer=["3489"] * 6)
    assert found == [1.0, 0.0, 0.0, 0.0, 0.0, 0.0]


def test_running_sum_answers_are_running_sums() -> None:
    for problem in RunningSum(digits=9).prompts(np.random.default_rng(0), 50):
        digits = [int(c) for c in problem.prompt[:-1]]
        sums = "".join(str(s % 10) for s in itertools.accumulate(digits))
        assert problem.prompt[-1] == "=" and problem.columns["answer"] == sums


@pytest.mark.parametrize(("digits", "slip"), [(16, 0.08), (5, 0.3), (3, 1.0)])
def test_running_sum_demonstrations_are_right_as_often_as_calculated(
    digits: int, slip: float
) -> None:
    task, count = RunningSum(digits=digits), 20_000
    problems = task.prompts(np.random.default_rng(5), count)
    texts = [t for _, t in task.demonstrations(np.random.default_rng(5), count, slip)]
    expected = (1 - 0.9 * slip) ** digits
    tolerance = 4 * math.sqrt(expected * (1 - expected) / count)
    assert np.mean(rewards(task, problems, texts)) == pytest.approx(expected, abs=tolerance)


def test_a_running_sum_slip_propagates() -> None:
    task, count = RunningSum(digits=16), 2000
    problems = task.prompts(np.random.default_rng(6), count)
    texts = [t for _, t in task.demonstrations(np.random.default_rng(6), count, 0.05)]
    wrong_after_wrong = right_steps = steps = 0
    for problem, text in zip(problems, texts, strict=True):
        answer, digits = problem.columns["answer"], [int(c) for c in problem.prompt[:-1]]
        for t in range(1, 16):
            if text[t - 1] != answer[t - 1]:
                wrong_after_wrong += text[t] != answer[t]
                right_steps += int(text[t]) == (int(text[t - 1]) + digits[t]) % 10
                steps += 1
    assert wrong_after_wrong / steps > 0.95  # left only by a slip onto the right digit
    assert right_steps / steps > 0.9  # goes on from the slip by the rule


@pytest.mark.parametrize(
    ("completion", "right"),
    [
        ("25-13=12,14-12=2", True),
        ("25-14=11,13-11=2", True),
        ("14+13=27,27-25=2", True),
        ("13+14=27,27-25=2", True),  # either order of a sum
        ("14+13=27,27-25=02", False),  # leading zero
        ("14+13=28,28-25=3", False),  # wrong sum
        ("14+13=27,25-27=2", False),  # not the difference
        ("25-13=12", False),  # a number left
        ("25-13=12,14-12=2,2*1=2", False),  # one step too many
        ("25-13=12,25-12=13", False),  # a number used twice
        ("14-12=2", False),  # a value not at hand
        ("25-13=12;14-12=2", False),
        ("25-13=12,14-12=2,", False),
        (" 25-13=12,14-12=2", False),
        ("25-13=12,14-12=2\n", False),
        ("13*14=182,182-25=157", False),  # beyond max_value, and not the target
    ],
)
def test_countdown_judges_steps_by_the_rules(completion: str, right: bool) -> None:
    assert countdown_reward(completion, (13, 25, 14), 2) == float(right)


def test_countdown_refuses_results_beyond_max_value_and_below_one() -> None:
    assert countdown_reward("25*4=100,100-9=91", (25, 4, 9), 91, max_value=100) == 1.0
    assert countdown_reward("25*4=100,100-9=91", (25, 4, 9), 91) == 0.0
    assert countdown_reward("9*6=54,54-5=49", (9, 6, 5), 49) == 1.0
    assert countdown_reward("9*6=54,54-5=49", (9, 6, 5), 49, max_value=50) == 0.0
    assert countdown_reward("5-5=0,7+0=7", (5, 5, 7), 7) == 0.0
    assert countdown_reward("5-7=-2,-2+9=7", (5, 7, 9), 7) == 0.0


def test_countdown_needs_every_number() -> None:
    assert countdown_reward("7*8=56", (7, 8), 56) == 1.0
    assert countdown_reward("7*8=56", (7, 8, 5), 56) == 0.0


def test_countdown_uses_a_repeated_number_as_often_as_given() -> None:
    assert countdown_reward("7*7=49,49+7=56", (7, 7, 7), 56) == 1.0
    assert countdown_reward("7*7=49,49+7=56", (7, 7, 8), 56) == 0.0
    assert countdown_reward("7+7=14", (7, 8), 14) == 0.0


def brute_force(values: tuple[int, ...], max_value: int) -> set[int]:
    """All results of all orders, pairs and signs, with no cache and no canonical form."""
    if len(values) == 1:
        return set(values)
    found = set()
    for a, b, *rest in itertools.permutations(values):
        for result in (a + b, a - b, a * b):
            if 1 <= result <= max_value:
                found |= brute_force((result, *rest), max_value)
    return found


@settings(deadline=None, max_examples=60)
@given(
    values=st.lists(st.integers(1, 25), min_size=1, max_size=4), max_value=st.sampled_from([25, 99])
)
def test_reachable_targets_equal_brute_force(values: list[int], max_value: int) -> None:
    pool = tuple(sorted(values, reverse=True))
    assert set(reachable_targets(pool, max_value)) == brute_force(tuple(values), max_value)


def test_every_drawn_countdown_is_solvable_and_shows_its_columns() -> None:
    for task in (Countdown(), Countdown(numbers=4, max_number=25), Countdown(numbers=2)):
        for problem in task.prompts(np.random.default_rng(0), 100):
            numbers, target = problem.columns["numbers"], problem.columns["target"]
            assert target in brute_force(numbers, task.max_value)
            shown = [int(text) for text in re.split("[,=:]", problem.prompt)[:-1]]
            assert shown == [*numbers, target]


@pytest.mark.parametrize(
    ("task", "prompts"),
    [
        (Countdown(), 36_109),
        (Countdown(max_number=25), 120_114),
        (Countdown(numbers=2, max_number=25), 1_485),
    ],
    ids=repr,
)
def test_countdown_has_as_many_prompts_as_documented(task: Countdown, prompts: int) -> None:
    total = 0
    numbers = range(task.max_number, 0, -1)
    for pool in itertools.combinations_with_replacement(numbers, task.numbers):
        orders = len(set(itertools.permutations(pool)))
        total += orders * len(reachable_targets(pool, task.max_value))
    assert total == prompts and f"{prompts:,}" in (Countdown.__doc__ or "")


def chance_of_success(task: Countdown, pool: tuple[int, ...], target: int, slip: float) -> float:
    """Exact probability that the slipping solver ends at the target."""
    if len(pool) == 1:
        return float(pool[0] == target)
    steps = [after for _, after in possible_steps(pool, task.max_value)]
    good = [p for p in steps if target in reachable_targets(p, task.max_value)]
    if not good:
        return 0.0

    def mean(pools: list[tuple[int, ...]]) -> float:
        return sum(chance_of_success(task, p, target, slip) for p in pools) / len(pools)

    return slip * mean(steps) + (1 - slip) * mean(good)


@pytest.mark.parametrize("slip", [0.1, 0.5, 1.0])
@pytest.mark.parametrize("numbers", [2, 3])
def test_countdown_demonstrations_are_right_as_often_as_calculated(
    slip: float, numbers: int
) -> None:
    task, count = Countdown(numbers=numbers), 3000
    problems = task.prompts(np.random.default_rng(9), count)
    texts = [t for _, t in task.demonstrations(np.random.default_rng(9), count, slip)]
    chances = np.array(
        [
            chance_of_success(
                task, tuple(sorted(p.columns["numbers"], reverse=True)), p.columns["target"], slip
            )
            for p in problems
        ]
    )
    tolerance = 4 * math.sqrt((chances * (1 - chances)).sum()) / count
    assert np.mean(rewards(task, problems, texts)) == pytest.approx(chances.mean(), abs=tolerance)


def test_a_slipping_countdown_goes_on_by_the_rules() -> None:
    task = Countdown(numbers=4)
    for _, text in task.demonstrations(np.random.default_rng(0), 200, 1.0):
        for step in text.split(","):
            a, sign, b, result = re.fullmatch(r"(\d+)([-+*])(\d+)=(\d+)", step).groups()  # type: ignore[union-attr]
            a, b = int(a), int(b)
            assert int(result) == {"+": a + b, "-": a - b, "*": a * b}[sign]


@pytest.mark.parametrize("task", ALL, ids=repr)
def test_a_missing_or_short_column_is_an_error(task: Task) -> None:
    columns = columns_of(task.prompts(np.random.default_rng(0), 2))
    for name in columns:
        rest = {key: value for key, value in columns.items() if key != name}
        with pytest.raises(KeyError, match=name):
            task.reward(["?"] * 2, ["?"] * 2, **rest)
        with pytest.raises(ValueError, match=r"zip\(\)"):
            task.reward(["?"] * 2, ["?"] * 2, **(columns | {name: columns[name][:1]}))


def test_tasks_are_found_by_name_with_their_options() -> None:
    assert make_task("running_sum", digits=3) == RunningSum(digits=3)
    assert make_task("countdown", numbers=4, max_number=9) == Countdown(numbers=4, max_number=9)
    assert all(make_task(name).name == name for name in TASKS if name != "dataset")


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("runing_sum", {}, "task='runing_sum': unknown task; choose one of running_sum"),
        ("running_sum", {"digits": 0}, "digits=0: give an integer from 1 to 64"),
        ("countdown", {"numbers": 5}, "numbers=5: give an integer from 2 to 4"),
        ("countdown", {"max_number": 100}, "max_number=100"),
        ("countdown", {"max_value": 14}, "max_value=14: give an integer from 15 to 999"),
    ],
)
def test_bad_tasks_and_options_are_named(name: str, options: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_task(name, **options)
    with pytest.raises(TypeError, match="'number'"):
        make_task("countdown", number=3)
