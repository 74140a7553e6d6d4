"""Judges of responses: what each takes for right, and what a program can and cannot do."""

import json
import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moe_rl.config import ConfigError
from moe_rl.tasks.judges import accepts_itself, exact, final_answer, last_number, math_verify
from moe_rl.tasks.programs import Case, isolation, matches, pass_all, program_of, read_cases
from moe_rl.tasks.sandbox import landlock_version

PUBLISHED = Path(__file__).parent / "published"


def test_exact_sees_characters_and_not_their_forms() -> None:
    assert exact("cafe\u0301 ", " caf\u00e9")
    assert not exact("cafe", "caf\u00e9") and not exact("\u0662", "2") and not exact("2.0", "2")


@given(st.decimals(allow_nan=False, allow_infinity=False, places=3, min_value=0, max_value=10**9))
def test_a_number_is_itself_however_it_is_written(value: object) -> None:
    plain = f"{value:f}"
    for text in (plain, f"{value:,}", f"so it is ${value:,}.", f"{plain}.0 #### {plain}"):
        assert last_number(text, plain), text
    assert last_number(f"x=-{plain}", f"-{plain}") and last_number(f"9-{plain}", plain)
    assert not last_number(f"{plain} and 1", f"{plain}1")


@pytest.mark.parametrize(
    ("response", "answer", "right"),
    [
        ("1,2,3", "3", True),
        ("1,2,3", "123", False),
        ("2.50", "2.5", True),
        ("5 - 3", "-3", False),
        ("no number", "3", False),
        ("3", "no number", False),
        ("\u0663", "3", False),
        ("40 #### 4", "it is 36 + 4.\n#### 4", True),
        ("4 #### 40", "4", False),
    ],
)
def test_the_last_number_decides(response: str, answer: str, right: bool) -> None:
    assert last_number(response, answer) == right


@pytest.mark.parametrize(
    ("response", "answer", "right"),
    [
        (r"so \boxed{\frac{1}{2}}", "0.5", True),
        (r"so \boxed{\frac{1}{2}}", r"\frac{2}{4}", True),
        ("The answer is 1/2.", r"$\frac12$", True),
        (r"\boxed{7}", "007", True),
        ("1250 cars\n#### 1250", "It carries 1,250 cars.\n#### 1,250", True),
        (r"\boxed{12}", "...12 jars, of those 10 are left.\n#### 10", False),
        ("", "204", False),
        (r"\boxed{\frac{", "204", False),
        (r"first 3, no: \boxed{204}", "204", True),
    ],
)
def test_equal_expressions_are_right_for_math_verify(
    response: str, answer: str, right: bool
) -> None:
    pytest.importorskip("math_verify", reason="pip install 'moe-rl[math]'")
    assert math_verify(response, answer) == right


# In the style of MATH-500's answers.
FORMULAS = [
    r"\left( 3, \frac{\pi}{2} \right)", r"3\sqrt{13}", r"\pi", "6 - 5i", "(1,2)", "p - q",
    r"\frac{\sqrt{3}}{2}", r"\dfrac{3}{4}", r"\text{Evelyn}", r"\$18.90", "x^3 + 3x - 6", "11,111",
    r"\{1, 2\}", "[0, 1)", r"5\%", r"10^\circ", r"\frac43", "y = 2x + 3", "0.45", "-50", "13.5",
]  # fmt: skip


@pytest.mark.parametrize("answer", FORMULAS)
def test_a_formula_is_right_in_a_box_between_dollars_and_behind_a_mark(answer: str) -> None:
    pytest.importorskip("math_verify", reason="pip install 'moe-rl[math]'")
    assert accepts_itself("math_verify", answer)
    for right in (
        rf"so \boxed{{{answer}}}.",
        f"so\n#### {answer}",
        rf"\boxed{{{answer}}}\n#### Done",
    ):
        assert math_verify(right, answer), right
    assert not math_verify("#### 987654", answer) and not math_verify(r"\boxed{q}", answer)


def test_the_answer_stands_behind_the_last_mark() -> None:
    assert final_answer("a #### b #### 3 ") == "3" and final_answer(" 3 ") == "3"


ECHO = "print(input())"
TRAPS = {
    "the network": "import socket; socket.create_connection(('127.0.0.1', PORT), 1)",
    "a file of ours": f"open({str(Path(__file__).resolve())!r}).read()",
    "a file elsewhere": "open('FOLDER/x', 'w').write('x')",
    "much memory": "x = bytearray(2**31)",
    "much output": "print('x' * 2**25)",
    "a large file": "open('x', 'wb').write(bytes(2**25))",
    "many files": "x = [open(str(i), 'w') for i in range(200)]",
    "our environment": "import os; os.environ['MOE_RL_TEST_KEY']",
    "other processes": "import os; os.kill(PID, 0)",
    "an error": "1 / 0",
    "an exit": "import sys; sys.exit(3)",
}


def test_a_program_is_kept_within_its_limits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each trap ends by printing the right answer, so that only what stops it makes it wrong."""
    import socket

    monkeypatch.setenv("MOE_RL_TEST_KEY", "secret")
    with socket.create_server(("127.0.0.1", 0)) as server:
        ours = {"PORT": str(server.getsockname()[1]), "PID": str(os.getpid())}
        ours["FOLDER"] = str(tmp_path)
        traps = {}
        for name, line in TRAPS.items():
            for word, value in ours.items():
                line = line.replace(word, value)
            traps[name] = f"{line}\n{ECHO}"
        allowed = f"open('mine', 'w').write('1')\nassert open('mine').read() == '1'\n{ECHO}"
        programs = [*traps.values(), allowed]
        rewards = pass_all(programs, [[Case("5", "5")]] * len(programs), seconds=20, megabytes=512)
    stopped = {name for name, reward in zip(traps, rewards, strict=False) if reward == 0.0}
    open_to = set() if landlock_version() else {"a file of ours", "a file elsewhere"}
    if isolation().name == "limits":
        open_to |= {"other processes"} | ({"the network"} if landlock_version() < 4 else set())
    assert stopped >= traps.keys() - open_to and rewards[-1] == 1.0
    assert landlock_version() == 0 or not [*tmp_path.iterdir()]


def test_a_program_that_does_not_end_is_ended() -> None:
    endless = ["while True: pass", "import time; time.sleep(600)"]
    assert pass_all(endless, [[Case("", "")]] * 2, seconds=1) == [0.0, 0.0]


def test_the_last_block_is_the_program() -> None:
    text = "First:\n```python\nprint(1)\n```\nBetter:\n```py\nprint(2)\n```\nDone."
    assert program_of(text) == "print(2)\n" and program_of("print(3)") == "print(3)"
    assert program_of(text + "\nOutput:\n```\n2\n```") == "print(2)\n"
    assert program_of("```\nprint(1)\n```\n```\nprint(2)\n```") == "print(2)\n"


@pytest.mark.parametrize(
    ("printed", "expected", "right"),
    [
        ("2\n8\n", "2\n8", True),
        ("2  \n8", "2\n8\n", True),
        ("2 8", "2\n8", False),
        ("1.0 a", "1 a", True),
        ("1e0", "1", True),
        ("a", "A", False),
        ("", "", True),
        (None, "", False),
    ],
)
def test_lines_are_compared_and_numbers_by_value(
    printed: str | None, expected: str, right: bool
) -> None:
    assert matches(Case("", expected), printed) == right


SOLVED = [
    "```python\nfor _ in range(int(input())):\n    print(2 * int(input()))\n```",
    "```python\nclass Solution:\n"
    "    def equalNeighbours(self, values: List[int], least: int) -> List[List[int]]:\n"
    "        pairs = zip(values, values[1:])\n"
    "        return [[a, b] for a, b in pairs if a == b and a > least]\n```",
]


def test_rows_of_livecodebench_are_judged_by_public_and_private_tests() -> None:
    rows = [json.loads(line) for line in (PUBLISHED / "livecodebench.jsonl").open()]
    tests = [read_cases(row, None, "here") for row in rows]
    assert [len(cases) for cases in tests] == [3, 2]
    assert [case.function for cases in tests for case in cases[:1]] == [None, "equalNeighbours"]
    only_public = [  # right for the public tests alone
        SOLVED[0].replace("int(input()))", "abs(int(input())))"),
        SOLVED[1].replace("a > least", "a == 1"),
    ]
    assert pass_all(SOLVED + only_public, tests * 2, seconds=20) == [1.0, 1.0, 0.0, 0.0]


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (None, "no tests in tests; name their column as answer_column"),
        ("[]", "no tests in tests"),
        ("{", "tests: no tests of a program .JSONDecodeError"),
        ("abc", "tests: no tests of a program .*give a list of"),
        ([{"input": "1"}], "tests: no tests of a program .KeyError: 'output'"),
        ({"inputs": ["1"], "outputs": []}, "tests: no tests of a program .ValueError"),
    ],
)
def test_tests_of_another_form_are_refused(value: object, words: str) -> None:
    with pytest.raises(ConfigError, match=rf"rows, line 4: {words}"):
        read_cases({"tests": value}, "tests", "rows, line 4")


def test_apps_calls_a_function_or_gives_lines() -> None:
    called = {"fn_name": "add", "inputs": [[1, [1, 2]], [0, []]], "outputs": [[2, 3], [[]]]}
    lines = {"inputs": [["2", "1 2"], "1\n7"], "outputs": [["3"], "7"]}
    tests = [
        read_cases({"input_output": json.dumps(said)}, None, "here") for said in (called, lines)
    ]
    assert tests[1] == [Case("2\n1 2", "3"), Case("1\n7", "7")]
    add = "def add(one, many):\n    return [one + each for each in many]"
    method = (
        "class Solution:\n    def add(self, one, many):\n        return [one + e for e in many]"
    )
    total = "input()\nprint(sum(map(int, input().split())))"
    programs = [add, method, add.replace("+", "-"), total, total.replace("sum", "max")]
    given = [tests[0]] * 3 + [tests[1]] * 2
    assert pass_all(programs, given, seconds=20) == [1.0, 1.0, 0.0, 1.0, 0.0]


def test_a_functional_test_names_its_function() -> None:
    row = {"test_cases": [{"input": "1", "output": "2", "testtype": "functional"}]}
    with pytest.raises(
        ConfigError, match=r"here: test_cases: .* no func_name in the row's metadata"
    ):
        read_cases(row, None, "here")


@pytest.mark.parametrize("metadata", ["LeetCode 2023", ["a"], '{"difficulty": 1}', None])
def test_metadata_of_other_datasets_are_passed_over(metadata: object) -> None:
    row = {"test_cases": [{"input": "1", "output": "2"}], "metadata": metadata}
    assert read_cases(row, None, "here") == [Case("1", "2")]
    with pytest.raises(ConfigError, match="here: metadata: no tests"):
        read_cases(row | {"metadata": "{"}, None, "here")


def test_tests_may_be_lists_of_inputs_and_outputs() -> None:
    tests = {"inputs": ["1", "2"], "outputs": ["a", "b"]}
    for value in (tests, json.dumps(tests)):
        found = read_cases({"tests": value}, "tests", "here")
        assert found == [Case("1", "a"), Case("2", "b")]
