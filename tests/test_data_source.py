"""Records dealt to sites with official test and validation sets in common."""

import numpy as np
import pytest

from fl_jax.data.source import Source, from_sources
from fl_jax.errors import FlJaxError


def source(name, n, start=0, classes=3, width=2):
    ident = np.arange(start, start + n)
    return Source(
        name,
        np.repeat(ident[:, None], width, 1).astype(np.float32),
        (ident % classes).astype(np.int32),
        tuple("abc"[:classes]),
        (),
        (f"{n} of {name}.",),
    )


def test_official_sets_are_dealt_evenly_and_every_record_is_somewhere_once():
    train, validation, test = source("train", 90), source("validation", 20, 100), source("test", 31, 200)
    site = np.array(["s10", "s2", "s1"])[np.random.default_rng(0).integers(3, size=90)]
    dataset = from_sources(train, site, test=test, validation=validation, seed=3, notes=["Sites are simulated."])
    assert dataset.site_names == ("s1", "s2", "s10") and dataset.class_names == ("a", "b", "c")
    for i, name in enumerate(dataset.site_names):
        own = dataset.train.x[dataset.train.offsets[i] : dataset.train.offsets[i + 1], 0].astype(int)
        np.testing.assert_array_equal(own, np.flatnonzero(site == name))
    for records, of in ((dataset.train, train), (dataset.validation, validation), (dataset.test, test)):
        order = np.argsort(records.x[:, 0])
        np.testing.assert_array_equal(records.x[order], of.x)
        np.testing.assert_array_equal(records.y[order], of.y)
    assert np.ptp(dataset.test.sizes) == 1 and np.ptp(dataset.validation.sizes) == 1
    assert dataset.notes == (
        "90 of train.",
        "Sites are simulated.",
        "The official test and validation sets are dealt to the sites by chance.",
    )
    np.testing.assert_array_equal(from_sources(train, site, test=test, validation=validation, seed=3).test.x, dataset.test.x)
    assert not np.array_equal(from_sources(train, site, test=test, validation=validation, seed=4).test.x, dataset.test.x)


def test_validation_is_carved_from_training_records_where_it_is_a_fraction():
    train, test = source("train", 90), source("test", 30, 200)
    dataset = from_sources(train, np.arange(90) % 9, test=test, validation=0.2)
    np.testing.assert_array_equal(dataset.validation.sizes, np.full(9, 2))
    np.testing.assert_array_equal(np.sort([*dataset.train.x[:, 0], *dataset.validation.x[:, 0]]), np.arange(90))
    assert dataset.test.sizes.sum() == 30


def test_sources_that_differ_in_kind_are_refused():
    train = source("train", 9)
    for other in (source("other", 9, width=3), source("other", 9, classes=2)):
        with pytest.raises(FlJaxError, match="'other' cannot validate or test what 'train' trains"):
            from_sources(train, np.arange(9) % 3, test=other)
