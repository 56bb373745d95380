"""Epsilon, or the noise that it needs, from the shell: `python -m fl_jax.privacy epsilon | calibrate ...`.

    python -m fl_jax.privacy epsilon   --sampling poisson --rate 256/60000 --noise 1.1   --rounds 14062 --delta 1e-5
    python -m fl_jax.privacy calibrate --sampling fixed   --rate .05       --epsilon 3   --rounds 100   --delta 1e-5

poisson: each unit is in a round by an independent coin; accounted when one is added or removed. fixed: a sample of a fixed size, drawn
without replacement; accounted when one is replaced. all: everything in every round, without amplification; one added or removed. The
noise is its standard deviation over the sensitivity of the sum, which is the clip where one is added or removed, and twice the clip where
one is replaced. A round is one noised sum: with several local steps a round, give the number of steps.
"""

import argparse
import json
import math
import sys
import textwrap
from collections.abc import Callable, Sequence
from fractions import Fraction
from pathlib import Path
from typing import NoReturn

import dp_accounting
from dp_accounting import NeighboringRelation

from fl_jax.errors import FlJaxError
from fl_jax.files import disk_errors, jsonable
from fl_jax.privacy import curve
from fl_jax.privacy.accounting import CONVERSION, Accountant, natural_relation, sensitivity
from fl_jax.privacy.budget import Budget
from fl_jax.privacy.calibration import calibrate
from fl_jax.privacy.ledger import NOT_AMPLIFIED, Cost, PrivacyLedger, Unit, coverage, open_ledger
from fl_jax.shell import status_of

POINTS = 10


class _Parser(argparse.ArgumentParser):
    """One that lets main say what is wrong, in one line."""

    def error(self, message: str) -> NoReturn:
        raise FlJaxError(f"{message}; see --help.")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit status: 0, 2 after one line on stderr for bad input, 130 after Ctrl-C."""
    return status_of("fl_jax.privacy", lambda: _run(argv))


def _run(argv: Sequence[str] | None) -> None:
    options = _parser().parse_args(argv)
    _check(options)
    print(_answer(options))


def _parser() -> argparse.ArgumentParser:
    about, _, rest = (__doc__ or "").partition("\n\n")
    parser = _Parser("python -m fl_jax.privacy", description=about, epilog=rest, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True, metavar="epsilon | calibrate")
    asks = commands.add_parser("epsilon", help="what so many rounds with so much noise spend")
    asks.add_argument("--noise", type=float, required=True, metavar="Z", help="standard deviation over the relation's sensitivity")
    needs = commands.add_parser("calibrate", help="the least noise with which so many rounds stay within an epsilon")
    needs.add_argument("--epsilon", type=float, required=True, metavar="E", help="that must not be exceeded")
    for command in (asks, needs):
        command.add_argument("--sampling", choices=("poisson", "fixed", "all"), required=True, help="who or what is in a round")
        command.add_argument("--rate", type=_fraction, metavar="Q", help="share that is in a round, e.g. .01 or 256/60000; not with 'all'")
        command.add_argument("--rounds", type=int, required=True, metavar="T", help="how many noised sums are released")
        command.add_argument("--delta", type=float, required=True, metavar="D", help="well below 1 / (number of units)")
        command.add_argument("--accountant", choices=[*map(str, Accountant)], default="rdp", help="pld is tighter and slower")
        command.add_argument("--unit", choices=[*map(str, Unit)], default="record", help="what is sampled and hidden")
        command.add_argument("--json", action="store_true", help="print one JSON object and nothing else")
        command.add_argument("--plot", type=Path, metavar="FILE.png", help="save epsilon over rounds as a figure")
    return parser


def _fraction(text: str) -> Fraction:
    try:
        return Fraction(text)
    except (ValueError, ZeroDivisionError):
        raise argparse.ArgumentTypeError(f"must be a number such as .01 or 256/60000, and is {text!r}") from None


def _check(options: argparse.Namespace) -> None:
    """Raises FlJaxError for what makes no sense."""
    if options.sampling == "all" and options.rate not in (None, 1):
        raise FlJaxError("--rate is for a sample, and 'all' has everything in every round: leave it out, or choose poisson or fixed.")
    if options.sampling != "all" and options.rate is None:
        raise FlJaxError(f"--sampling {options.sampling} needs --rate, the share that is in a round.")
    if options.rate is not None and not 0 < options.rate <= 1:
        raise FlJaxError(f"--rate is a share above 0 and at most 1, and is {float(options.rate):g}.")
    if not 0 < options.delta < 1:
        raise FlJaxError(f"--delta must lie between 0 and 1, and is {options.delta:g}: choose it well below 1 / (number of units).")
    if options.rounds < 1:
        raise FlJaxError(f"--rounds must be 1 or more, and is {options.rounds}.")
    for name in ("noise", "epsilon"):
        value = getattr(options, name, 1.0)
        if not 0 < value < math.inf:
            raise FlJaxError(f"--{name} must be above 0 and finite, and is {value:g}" + (": without noise nothing is private." if value == 0 else "."))
    if options.plot is not None and options.plot.suffix != ".png":
        raise FlJaxError(f"--plot writes a PNG, so give it a name that ends in .png, and not {str(options.plot)!r}.")


def _sampled(options: argparse.Namespace, event: dp_accounting.DpEvent) -> dp_accounting.DpEvent:
    """The event of one round."""
    if options.sampling == "poisson":
        return dp_accounting.PoissonSampledDpEvent(float(options.rate), event)
    if options.sampling == "fixed":
        return dp_accounting.SampledWithoutReplacementDpEvent(options.rate.denominator, options.rate.numerator, event)
    return event


def _answer(options: argparse.Namespace) -> str:
    accountant = Accountant(options.accountant)
    relation = natural_relation(_sampled(options, dp_accounting.GaussianDpEvent(1.0)))
    if options.sampling == "fixed" and options.rate < 1 and accountant is Accountant.PLD:
        raise FlJaxError("Samples of a fixed size cannot be accounted for by pld: leave out --accountant, or choose --sampling poisson.")
    if options.command == "epsilon":
        noise = options.noise
    else:
        budget = Budget(options.epsilon, options.delta, accountant)
        noise = calibrate(budget, options.rounds, lambda event: _sampled(options, event), relation) / sensitivity(relation)
    event = _sampled(options, dp_accounting.GaussianDpEvent(noise * sensitivity(relation)))
    cost = Cost(event, Unit(options.unit), f"Gaussian noise, {NOT_AMPLIFIED}" if options.sampling == "all" else "")
    empty = open_ledger(cost, relation)

    def epsilon(rounds: int) -> float:
        return empty.spend(cost, rounds).epsilon(options.delta, accountant)

    total = epsilon(options.rounds)
    if options.plot is not None:
        rounds = curve.points(options.rounds, 4 * POINTS if accountant is Accountant.RDP else POINTS)
        title = f"{options.sampling}, noise {noise:.4g}, delta {options.delta:g}, {accountant.upper()}"
        with disk_errors(f"write {options.plot}"):
            curve.save_figure(options.plot, rounds, [epsilon(count) for count in rounds], title)
    if options.json:
        return json.dumps(jsonable({
            "epsilon": total, "noise": noise, "delta": options.delta, "rounds": options.rounds, "sampling": options.sampling,
            "rate": 1.0 if options.rate is None else float(options.rate), "accountant": accountant, "conversion": CONVERSION[accountant],
            "relation": relation.name, "sensitivity": sensitivity(relation), "unit": options.unit}), allow_nan=False)
    return _report(options, empty.spend(cost, options.rounds), noise, total, epsilon)


def _report(options: argparse.Namespace, ledger: PrivacyLedger, noise: float, total: float, epsilon: Callable[[int], float]) -> str:
    relation, by = ledger.relation, Accountant(options.accountant)
    clips = sensitivity(relation)
    of = "replacing one" if relation is NeighboringRelation.REPLACE_ONE else "adding or removing one"
    standard = f"{noise:.4g} x the sensitivity of {clips} clip{'s' * (clips > 1)} ({of}) = {noise * clips:.4g} clips"
    lines = [
        f"epsilon {total:.6g} at delta {options.delta:g} for each {options.unit} after {options.rounds:,} rounds",
        f"noise   {standard}",
        f"by      {CONVERSION[by]}",
    ]
    if options.command == "calibrate":
        lines = [lines[1], lines[0].replace(" at delta", f" (at most {options.epsilon:g}) at delta"), *lines[2:]]
    if math.isfinite(total):
        rounds = curve.points(options.rounds, POINTS if by is Accountant.RDP else POINTS // 2)
        lines += ["", "epsilon over rounds", curve.bars(rounds, [epsilon(count) for count in rounds])]
    return "\n".join([*lines, "", *(line for sentence in coverage(ledger) for line in textwrap.wrap(sentence, 110, subsequent_indent="  "))])


if __name__ == "__main__":
    sys.exit(main())
