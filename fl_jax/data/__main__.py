"""Published data on this machine: `python -m fl_jax.data list | describe NAME | prepare NAME [--from FOLDER] [--data-dir DIR]`.

Prepared data are kept in --data-dir, else in the environment's TFDS_DATA_DIR, else in ~/tensorflow_datasets. Raw files come from
--from, else from the environment's FL_JAX_RAW (a folder with one sub-folder for each data set), else, for `prepare` only, from the
address that `describe` shows. Nothing else downloads anything.
"""

import argparse
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path

from fl_jax.data import prepared
from fl_jax.data.catalog import CATALOG, published
from fl_jax.data.describe import describe
from fl_jax.data.prepared import DataMissing, raw_folder, resolve_data_dir
from fl_jax.data.published import Published
from fl_jax.data.tfds_source import find_prepared, prepared_names
from fl_jax.errors import FlJaxError
from fl_jax.shell import status_of


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit status: 0, 2 after one line on stderr for a FlJaxError, 130 after Ctrl-C."""
    options = _parser().parse_args(argv)
    return status_of("fl_jax.data", lambda: _run(options), "interrupted; what was not whole has been removed.")


def _run(options: argparse.Namespace) -> None:
    if options.command == "list":
        print(_list(options.data_dir))
    elif options.command == "describe":
        print(_describe(options.name, options.data_dir))
    else:
        for name in options.name:
            _prepare(published(name), options)


def _parser() -> argparse.ArgumentParser:
    rest = (__doc__ or "").partition("\n\n")[2]
    parser = argparse.ArgumentParser("python -m fl_jax.data", description="Published data on this machine.", epilog=rest)
    commands = parser.add_subparsers(dest="command", required=True, metavar="list | describe | prepare")
    lister = commands.add_parser("list", help="what is prepared, and what could be")
    describer = commands.add_parser("describe", help="source, licence and citation, and the sites of what is prepared")
    describer.add_argument("name", metavar="NAME")
    preparer = commands.add_parser("prepare", help="verify raw files, or download them, and write them as a TFDS data set")
    preparer.add_argument("name", metavar="NAME", nargs="+")
    preparer.add_argument(
        "--from", dest="folder", metavar="FOLDER", type=Path, help="of the raw files, or of one folder for each data set"
    )
    preparer.add_argument("--mirror", metavar="URL", help="download from here, where the files have their published names")
    for command in (lister, describer, preparer):
        command.add_argument(
            "--data-dir", metavar="DIR", type=Path, help="of prepared data; default TFDS_DATA_DIR or ~/tensorflow_datasets"
        )
    return parser


def _prepare(data: Published, options: argparse.Namespace) -> None:
    if prepared.is_prepared(data, options.data_dir):
        print(f"'{data.name}' is prepared already, in '{prepared.place_of(data, options.data_dir)}'.")
        return
    if options.folder is not None and options.mirror is not None:
        raise FlJaxError("--from takes files that are here and --mirror downloads them: leave one of them out.")
    folder = raw_folder(data, options.folder) if options.mirror is None else None
    if folder is None and options.folder is not None:
        files = ", ".join(file.name for file in data.files)
        raise FlJaxError(
            f"'{options.folder}' holds no raw file of '{data.name}': put {files} there, or into a folder '{data.name}' in it."
        )
    print(f"Preparing '{data.name}' from {folder or options.mirror or data.files[0].url.rpartition('/')[0]}", flush=True)
    place = prepared.prepare(data, folder=folder, data_dir=options.data_dir, mirror=options.mirror)
    print(f"'{data.name}' is prepared, in '{place}'.")


def _list(data_dir: Path | None) -> str:
    """A line for each data set that is known, and for each other one that TFDS has prepared."""
    rows = []
    for name, entry in CATALOG.items():
        if prepared.is_prepared(entry.published, data_dir):
            state = "prepared"
        elif (folder := raw_folder(entry.published)) is not None:
            state = f"raw files in '{folder}'"
        else:
            state = "to be downloaded"
        rows.append((name, state, entry.published.about.partition(":")[0]))
    others = [
        (name, "prepared by TFDS", ", ".join(versions))
        for name, versions in prepared_names(data_dir).items()
        if name not in CATALOG
    ]
    widths = [max(len(row[k]) for row in [*rows, *others]) for k in (0, 1)]
    lines = [f"{name:<{widths[0]}}  {state:<{widths[1]}}  {about}" for name, state, about in [*rows, *others]]
    return "\n".join([f"Data sets in '{resolve_data_dir(data_dir)}':", "", *lines])


def _describe(name: str, data_dir: Path | None) -> str:
    if name not in CATALOG and name.partition(":")[0] not in prepared_names(data_dir):
        published(name)  # says which names there are
    if name not in CATALOG:
        return _describe_other(name, data_dir)
    data = CATALOG[name].published
    facts = [
        ("licence", data.licence),
        ("source", data.homepage),
        ("files", ", ".join(file.url for file in data.files)),
        ("cite", data.citation),
    ]
    about = [*textwrap.wrap(data.about, 110), ""]
    for key, value in facts:
        about += textwrap.wrap(
            value, 110, initial_indent=f"{key:<9}", subsequent_indent=" " * 9, break_long_words=False, break_on_hyphens=False
        )
    try:
        place = prepared.ensure(data, data_dir)
    except DataMissing as missing:
        return "\n".join([*about, "", str(missing)])
    return "\n".join([*about, f"{'here':<9}{place}", "", describe(CATALOG[name].federation(data_dir))])


def _describe_other(name: str, data_dir: Path | None) -> str:
    import tensorflow_datasets as tfds

    folder = find_prepared(name, data_dir)
    info = tfds.builder_from_directory(str(folder)).info
    features = [f"  {feature}: {kind}" for feature, kind in info.features.items()]
    splits = [f"  {split}: {of.num_examples:,} records" for split, of in info.splits.items()]
    about = [*textwrap.wrap(info.description or "", 110), "", *textwrap.wrap(f"cite     {info.citation or 'not said'}", 110)]
    return "\n".join([*about, f"here     {folder}", "", "splits", *splits, "features", *features])


if __name__ == "__main__":
    sys.exit(main())
