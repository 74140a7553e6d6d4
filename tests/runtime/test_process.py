"""The processor's name, from what the system tells of it."""

from pathlib import Path

import pytest

from moe_rl.runtime.process import cpu_name

EPYC = """processor\t: 0
cpu family\t: 25
model\t\t: 17
model name\t: AMD EPYC
stepping\t: 1

processor\t: 1
model name\t: another
"""


@pytest.mark.parametrize(
    ("told", "name"),
    [
        (EPYC, "AMD EPYC (family 25, model 17, stepping 1)"),
        ("processor\t: 0\nmodel name\t: ARMv7 rev 4\n", "ARMv7 rev 4"),
    ],
)
def test_a_processor_has_its_build_where_the_system_tells_it(
    told: str, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Path, "read_text", lambda self, encoding: told)
    assert cpu_name() == name
