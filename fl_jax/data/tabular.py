"""Tables with missing values and categories as federated data sets: parsed once, then split, imputed and standardised per seed.

Which features there are (columns, levels, flags) is read from the whole file; every number that enters a feature (medians,
modes, means, standard deviations) is computed from training records only, of the sites that train.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Unpack

import numpy as np

from fl_jax.data.arrays import from_arrays
from fl_jax.data.csv_table import CsvOptions, ParsedCsv, parse_csv
from fl_jax.data.federated import FederatedDataset
from fl_jax.data.records import Records
from fl_jax.data.standardize import Statistics, pooled_statistics, standardize_features
from fl_jax.errors import FlJaxError


@dataclass(frozen=True)
class Table:
    """A parsed file, of which each seed draws a data set."""

    name: str
    parsed: ParsedCsv

    def dataset(
        self,
        seed: int | np.random.Generator,
        *,
        validation: float = 0.2,
        test: float = 0.2,
        unseen: Sequence[str] = (),
        statistics: Statistics = pooled_statistics,
    ) -> FederatedDataset:
        """Draw a split and compute features: float32[R, F], labels int32[R].

        The split is stratified by label within every site, and no group is in two splits. Numeric columns: a missing value
        becomes the median of the training records of all sites, then the column is standardised by `statistics`
        (pooled_statistics, site_statistics or as_measured; a constant column is only centred). Categories: one 0/1 column
        "NAME = LEVEL" each, a missing value becomes the most frequent level. Either kind has a 0/1 column "NAME (missing)" if
        the file lacks any of its values. unseen: sites held out whole; no statistic sees them.
        Raises FlJaxError where a column has no value in any training record.
        """
        parsed = self.parsed
        raw = np.stack([column.values for column in parsed.columns], 1)
        absent = np.isnan(raw)
        codes, names = parsed.site, parsed.site_names
        by_column = [f"{c.name} {n}" for c, n in zip(parsed.columns, absent.sum(0), strict=True) if n]
        draft = from_arrays(
            np.where(absent, 0.0, raw),
            {"label": parsed.label.astype(np.int32), "row": np.arange(len(raw))},
            codes,
            name=self.name,
            seed=seed,
            validation=validation,
            test=test,
            group=parsed.group,
            unseen=unseen,
            site_names=names,
            label=parsed.label,
            missing={name: int(n) for name, n in zip(names, np.bincount(codes, absent.sum(1), len(names)), strict=True) if n},
        )
        features, feature_names, numeric = self._features(draft, raw, absent)

        def finish(records: Records, x: np.ndarray) -> Records:
            return records._replace(x=x, y=records.y["label"])

        notes = [f"Records, sites and labels are those of the file '{self.name}'; nothing was simulated."]
        if by_column:
            notes.append(
                f"Missing values by column: {', '.join(by_column)}; imputed by the training median or mode over all sites, with "
                "a 0/1 flag column each."
            )
        notes.append(f"Numeric features are standardised by {statistics.__name__.replace('_', ' ')} of the training records.")
        dataset = replace(
            draft,
            train=finish(draft.train, features[0]),
            validation=finish(draft.validation, features[1]),
            test=finish(draft.test, features[2]),
            unseen=finish(draft.unseen, features[3]),
            num_classes=len(parsed.class_names),
            class_names=parsed.class_names,
            feature_names=feature_names,
            notes=tuple(notes),
        )
        return standardize_features(dataset, statistics, columns=numeric)

    def _features(
        self, draft: FederatedDataset, raw: np.ndarray, absent: np.ndarray
    ) -> tuple[list[np.ndarray], tuple[str, ...], list[int]]:
        """Imputed features of the four tables of a drawn split, their names, and which of them are numeric."""
        rows = [table.y["row"] for table in (draft.train, draft.validation, draft.test, draft.unseen)]
        blocks: list[np.ndarray] = []
        names: list[str] = []
        numeric: list[int] = []
        for k, column in enumerate(self.parsed.columns):
            known = raw[rows[0], k][~absent[rows[0], k]]
            if not len(known):
                raise FlJaxError(
                    f"Column '{column.name}' of '{self.name}' has no value in any training record of this split: name it in drop."
                )
            if column.levels:
                value = np.where(absent[:, k], np.bincount(known.astype(np.int64)).argmax(), raw[:, k])
                blocks.append(value[:, None] == np.arange(len(column.levels)))
                names += [f"{column.name} = {level}" for level in column.levels]
            else:
                blocks.append(np.where(absent[:, k], np.median(known), raw[:, k])[:, None])
                numeric.append(len(names))
                names.append(column.name)
            if absent[:, k].any():
                blocks.append(absent[:, k, None])
                names.append(f"{column.name} (missing)")
        features = np.hstack(blocks).astype(np.float64)
        return [features[r] for r in rows], tuple(names), numeric


def read_table(path: str | Path, site: str, label: str, **options: Unpack[CsvOptions]) -> Table:
    """Parse a CSV file once for many seeds: `read_table(...).dataset(seed)`. Arguments and errors are those of `parse_csv`."""
    return Table(Path(path).name, parse_csv(path, site, label, **options))


def read_csv(
    path: str | Path,
    site: str,
    label: str,
    *,
    seed: int | np.random.Generator = 0,
    validation: float = 0.2,
    test: float = 0.2,
    unseen: Sequence[str] = (),
    statistics: Statistics = pooled_statistics,
    **options: Unpack[CsvOptions],
) -> FederatedDataset:
    """One data set from a CSV file: `read_table` and `Table.dataset` in one call.

    site, label, group: names of columns; with group (a patient's number) no group is in two splits.
    """
    table = read_table(path, site, label, **options)
    return table.dataset(seed, validation=validation, test=test, unseen=unseen, statistics=statistics)
