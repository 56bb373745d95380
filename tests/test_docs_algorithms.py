"""docs/algorithms.md says what the code does: every algorithm, its traffic and state, laws that are tests, studies that exist."""

import re
from pathlib import Path

import jax
import optax
import pytest
from test_algorithms import ALGORITHMS

from experiments.common.reproduction import STUDIES
from fl_jax import algorithms, batches, uplink
from fl_jax.core import ONE_LANE

TESTS = Path(__file__).parent
PAGE = (TESTS.parent / "docs" / "algorithms.md").read_text()
HELPERS = {"Options", "centralized", "in_turn", "layers", "matched_budget", "pooled_batches"}
FEDAVG = {"fedavg_tuned", "cyclic"}  # with FedAvg's state and traffic


def rows(columns: int) -> list[list[str]]:
    """The cells of the tables with so many columns, without their heads."""
    tables = [[cell.strip() for cell in line.strip("|").split("|")] for line in PAGE.splitlines() if line.startswith("| `")]
    return [row for row in tables if len(row) == columns]


def test_every_algorithm_and_every_uplink_has_a_row():
    assert [row[0].strip("`") for row in rows(9)] == list(dict.fromkeys(row[0].strip("`") for row in rows(9)))
    assert {row[0].strip("`") for row in rows(9)} == set(algorithms.__all__) - HELPERS
    assert {row[0].strip("`") for row in rows(4)} == {f"uplink.{name}" for name in uplink.__all__}
    assert HELPERS - {"Options", "in_turn", "layers"} <= set(re.findall(r"`(\w+)`", PAGE))


@pytest.mark.parametrize("row", rows(9), ids=lambda row: row[0])
def test_numbers_of_copies_are_those_of_the_code(row, plain_model):
    name, (state, down, up) = row[0].strip("`"), row[3:6]
    variables = plain_model.init(jax.random.key(0))
    if name in FEDAVG:
        algorithm = algorithms.fedavg(plain_model, optax.sgd(0.1), batches.epochs(1, 4))
    elif name == "moon":
        algorithm = algorithms.moon(plain_model, optax.sgd(0.1), batches.epochs(1, 4), "Dense_0", 1.0)
    else:
        algorithm = ALGORITHMS[name](plain_model, ONE_LANE)
    began = algorithm.init(variables, 1)
    copy = sum(leaf.size for leaf in jax.tree.leaves(variables))
    kept = sum(leaf.size for leaf in jax.tree.leaves(began.clients))
    found = {"state": kept, "down": algorithm.payload(began)[0] // 4, "up": algorithm.payload(began)[1] // 4}
    for what, told in (("state", state), ("down", down), ("up", up)):
        if told.isdecimal():  # a few numbers beside copies of the model are not worth telling
            assert abs(found[what] - int(told) * copy) <= 2, what


def test_laws_are_tests_and_numbers_are_studies():
    known = "\n".join(path.read_text() for path in TESTS.glob("test_*.py"))
    laws = [row[7] for row in rows(9)] + [row[3] for row in rows(4)]
    for law in laws:
        (name,) = re.findall(r"`([\w./]+)`", law)
        assert (TESTS.parent / name).is_file() if "/" in name else f"def {name}(" in known, name
    for row in rows(9):
        assert row[8] in ("none", "baseline of all") or set(re.findall(r"`(\w+)`", row[8])) <= set(STUDIES), row[0]
