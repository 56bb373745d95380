"""What `experiments.reproduce` knows of a study before it runs: its claims, its data, and the code that decides its numbers."""

import ast
import hashlib
import importlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple, TypeVar, cast

import numpy.typing as npt

import fl_jax
from experiments.common.config import Common
from fl_jax.errors import FlJaxError
from fl_jax.results.claims import Claim, Verdict, judge

STUDIES: tuple[str, ...] = (
    "fed_heart_disease", "fed_tcga_brca", "dp_fed_heart_disease", "fedprox_synthetic", "adaptive_clipping", "dp_chest_xray", "dp_sgd_mnist",
    "fedprox_recovers", "fedbn_feature_shift", "niid_bench", "pfl_fashion_mnist", "which_gap", "fedavg_mnist", "server_optimizers")
"""The studies, modules of experiments, in the order in which they run: the short ones first."""


class Reproduction(NamedTuple):
    """The attribute REPRODUCTION of a study's module, beside its `Config` and `run`.

    claims: (config) -> what the study is to show, in its full or its quick form; `run` judges exactly these and writes the verdicts to its
    run folder (RunFolder.write_claims). datasets: the published data sets that it needs. gpu: its full form takes too long on a CPU.
    on_gpu: arguments, such as ("--rounds", "2000"), that make of the full form, a short one that suits a CPU, the one that runs
    where there is a GPU; the short one states the claims of the long one too, as not run.
    """

    claims: Callable[[Any], Sequence[Claim]]
    datasets: tuple[str, ...] = ()
    gpu: bool = False
    on_gpu: tuple[str, ...] = ()


FoundT = TypeVar("FoundT")
Stated = Iterable[tuple[Claim, Callable[[FoundT], npt.ArrayLike]]]
"""Claims, each with the function that measures it on what a study found: float[n], one value a seed."""


def judged(name: str, stated: Stated[FoundT], found: FoundT) -> list[Verdict]:
    """The verdict on each claim of a study."""
    pairs = list(stated)
    return judge(name, [claim for claim, _ in pairs], {claim.claim: law(found) for claim, law in pairs})


class Study(NamedTuple):
    """A study by its name: `python -m experiments.NAME`."""

    name: str
    reproduction: Reproduction
    config: type[Common]


def study(name: str) -> Study:
    """Raises FlJaxError for a name that is none of STUDIES."""
    if name not in STUDIES:
        raise FlJaxError(f"{name!r} is no study that reproduces a published result: choose from {', '.join(STUDIES)}.")
    module = cast(Any, importlib.import_module(f"experiments.{name}"))
    return Study(name, module.REPRODUCTION, module.Config)


def code_of(name: str) -> str:
    """A digest, hex, of the code that decides a study's numbers: all of fl_jax, and what the study imports of experiments.

    Comments, docstrings and layout do not count: a better sentence costs no run of hours.
    """
    library, root = Path(fl_jax.__file__).parent, Path(__file__).parents[2]
    files = {file.relative_to(library.parent).as_posix(): file for file in library.rglob("*.py")}
    files |= {file.relative_to(root).as_posix(): file for file in _imported(f"experiments.{name}", root)}
    digest = hashlib.sha256()
    for path, file in sorted(files.items()):
        digest.update(f"{path}\0{_meaning(file.read_text())}\0".encode())
    return digest.hexdigest()


def _imported(name: str, root: Path) -> set[Path]:
    """The files of the modules of experiments that one of them imports, itself and what these import included."""
    found, waiting = set[Path](), [name]
    while waiting:
        file = root / f"{waiting.pop().replace('.', '/')}.py"
        if file not in found and file.is_file():
            found.add(file)
            waiting += _imports(ast.parse(file.read_text()))
    return found


def _imports(tree: ast.Module) -> Iterator[str]:
    """The dotted names of experiments that may be modules: what is imported from, and what is imported."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "experiments":
            yield node.module or ""
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.startswith("experiments."))


@cache
def _meaning(source: str) -> str:
    """A module's code without comments, layout and docstrings; kept, since all studies share fl_jax."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            node.body = [part for part in node.body if not _is_text(part)]
    return ast.dump(tree)


def _is_text(part: ast.stmt) -> bool:
    return isinstance(part, ast.Expr) and isinstance(part.value, ast.Constant) and isinstance(part.value.value, str)
