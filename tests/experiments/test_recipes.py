"""Recipe cards: every arm has one, from its config and docstring, as docs/recipes.md has them."""

from pathlib import Path

import pytest

from moe_rl.config import ConfigError, RunConfig
from moe_rl.experiments.arms import ARMS, arm_config, check_arms, find_arm
from moe_rl.experiments.recipes import RECIPES, all_cards, as_markdown, card
from moe_rl.losses import find_algorithm
from moe_rl.losses.custom import choose_algorithm

PAGE = Path(__file__).resolve().parents[2] / "docs" / "recipes.md"
OWN = '''def halved(inputs, *, scale=0.5):
    """Half of it.

        l_it = -scale A_i log pi_it

    Source: this test. A no-op at scale 1.
    """
    return -scale * inputs.advantages * inputs.logprobs
'''


def test_every_arm_has_a_recipe_and_says_when_it_is_a_no_op() -> None:
    assert len(ARMS) >= 16 and set(ARMS) <= set(RECIPES)
    for one in all_cards():
        assert one.no_op != "not said", f"{one.arm.name}: neither its recipe nor its docstring says"
        assert one.formula and one.arm.paper and all(one.rows.values()), one.arm.name


def test_the_page_is_what_the_command_prints() -> None:
    assert PAGE.read_text() == as_markdown(), "run `moe-rl arms --markdown > docs/recipes.md`"


def test_a_card_says_what_the_config_and_the_signature_say() -> None:
    for name in ARMS:
        config, one = arm_config(name, RunConfig(), replay="R3", seed=0), card(name)
        options = choose_algorithm(config.algorithm, config.loss).options
        assert [float(pair.split()[1]) for pair in one.defaults.split(", ") if options] == [
            *options.values()
        ]
        assert ("engine" in one.denominator) == (config.old_logprobs == "rollout")
        assert one.aggregation == find_algorithm(config.algorithm).aggregation
    assert card("gspo").formula.startswith("l_it = -min(s_i A_i")
    assert card("gspo+replay").settings == "--algorithm gspo --routing-replay R3"
    assert card("frozen-router").settings == "--freeze-router"


def test_a_users_own_loss_has_a_card_and_an_arm(tmp_path: Path) -> None:
    (tmp_path / "own.py").write_text(OWN)
    name = f"{tmp_path}/own.py:halved"
    one = card(name)
    assert one.formula == "l_it = -scale A_i log pi_it" and one.defaults == "scale 0.5"
    assert one.no_op == "A no-op at scale 1."
    config = arm_config(name, RunConfig(algorithm="gspo"), replay="R2", seed=1)
    assert (config.arm, config.loss, config.algorithm) == ("halved", name, "grpo")
    label = find_arm("halved")
    assert find_arm(name).colour == label.colour and label.label == "halved"
    assert find_arm("grpo+dual-clip+rollout-old+R3").label == (
        "GRPO + dual clip over rollout log-probs + R3"
    )
    assert find_arm("halved+R3").label == "halved + R3"
    check_arms(["grpo", name])


@pytest.mark.parametrize("name", ["gsop", "own.py:2", "grpo-restart"])
def test_an_unknown_arm_is_refused_with_the_nearest(name: str) -> None:
    with pytest.raises(ConfigError, match=f"arms='{name}': .*nearest are (gspo|grpo)?"):
        check_arms(["grpo", name])
    with pytest.raises(ConfigError, match="nearest are gspo, "):
        check_arms(["gsop"])
    with pytest.raises(ConfigError, match=r"arms='own.py': .* give own.py:FUNCTION"):
        check_arms(["own.py"])


def test_a_loss_with_the_name_of_an_arm_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"own.py:gspo': gspo is an arm .*; rename the function"):
        check_arms(["own.py:gspo"])
