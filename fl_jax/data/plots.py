"""How labels are distributed over the sites of a data set, as a figure."""

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from fl_jax.data.describe import site_class_counts
from fl_jax.data.federated import FederatedDataset
from fl_jax.errors import FlJaxError

# Okabe and Ito 2008: told apart with any colour vision; the two pale ones come late
_COLORS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#999999", "#F0E442")


def label_distribution(dataset: FederatedDataset, *, max_bars: int = 30) -> Figure:
    """The labels of every site over all its splits; unseen sites below the others.

    Up to max_bars sites: a stacked bar a site, as long as its number of labels, with the counts written in. More sites: a heat
    map of sites (by their most frequent class, largest first) against classes, coloured by the class's share at the site.
    Returns a matplotlib Figure that belongs to no global state: `figure.savefig(path)`. Raises FlJaxError where y is no class.
    """
    if not dataset.num_classes:
        raise FlJaxError(f"The labels of data set '{dataset.name}' are no classes, so there is no label distribution to draw.")
    seen, unseen = site_class_counts(dataset)
    names = [*dataset.site_names, *(f"{name} (unseen)" for name in dataset.unseen_names)]
    counts = np.concatenate([seen, unseen])
    if len(names) <= max_bars:
        return _bars(dataset, names, counts)
    return _heat_map(dataset, counts)


def _bars(dataset: FederatedDataset, names: list[str], counts: np.ndarray) -> Figure:
    num_sites, num_classes = counts.shape
    figure = Figure(figsize=(8.5, 1.6 + 0.34 * num_sites), layout="constrained")
    axes = figure.add_subplot()
    palette = _palette(num_classes)
    # unseen sites stand apart from those that train
    place = np.arange(num_sites) + 0.5 * (np.arange(num_sites) >= dataset.num_sites)
    left = np.zeros(num_sites)
    longest = counts.sum(1).max()
    for k, (class_name, color) in enumerate(zip(dataset.class_names, palette, strict=True)):
        axes.barh(place, counts[:, k], left=left, height=0.72, color=color, edgecolor="white", linewidth=0.8, label=class_name)
        for y, start, n in zip(place, left, counts[:, k], strict=True):
            if n >= 0.013 * longest * len(f"{n:,}"):  # only where the number fits into its piece
                axes.text(start + n / 2, y, f"{n:,}", ha="center", va="center", fontsize=8, color=_ink(color))
        left += counts[:, k]
    for y, total in zip(place, left, strict=True):
        axes.text(total + 0.008 * longest, y, f"{int(total):,}", ha="left", va="center", fontsize=8, color="0.35")
    axes.set_yticks(place, [_clip(f"site {name}" if name[0].isdecimal() else name) for name in names])
    axes.set_ylim(place[-1] + 0.6, -0.6)
    axes.set_xlim(0, 1.07 * longest)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=8))
    axes.set_xlabel("labels in all splits")
    _plain(axes, dataset)
    figure.legend(
        loc="outside lower center", ncols=min(num_classes, 10), frameon=False, handlelength=1.0, columnspacing=1.2, fontsize=9
    )
    return figure


def _heat_map(dataset: FederatedDataset, counts: np.ndarray) -> Figure:
    total = counts.sum(1)
    share = counts / np.maximum(total, 1)[:, None]
    held_out = np.arange(len(counts)) >= dataset.num_sites
    order = np.lexsort((-total, -share.max(1), share.argmax(1), held_out))
    figure = Figure(figsize=(8.5, 7.0), layout="constrained")
    axes, sizes = figure.subplots(1, 2, sharey=True, width_ratios=[4, 1])
    image = axes.imshow(share[order], aspect="auto", interpolation="nearest", cmap="Blues", vmin=0, vmax=1)
    num_classes = dataset.num_classes
    ticks = np.unique(np.linspace(0, num_classes - 1, min(num_classes, 20)).astype(int))
    named = [_clip(dataset.class_names[k], 16) for k in ticks]
    turned = max(map(len, named)) * len(named) > 60
    axes.set_xticks(ticks, named, rotation=45 if turned else 0, ha="right" if turned else "center")
    axes.set_yticks([])  # a row's place is no site's number
    axes.set_xlabel("class")
    axes.set_ylabel(f"{dataset.num_sites:,} sites, by most frequent class", y=1 - dataset.num_sites / len(counts) / 2)
    if held_out.any():
        for panel in (axes, sizes):
            panel.axhline(dataset.num_sites - 0.5, color="#D55E00", linewidth=1.5)
        middle = (dataset.num_sites + len(counts) - 1) / 2
        text = f"{len(dataset.unseen_names):,} unseen"
        sizes.text(1.02, middle, text, transform=sizes.get_yaxis_transform(), color="#D55E00", va="center", fontsize=9)
    _plain(axes, dataset)
    sizes.fill_betweenx(np.arange(len(counts)), total[order], step="mid", color="0.55", linewidth=0)
    sizes.set_xlim(0)
    sizes.set_xlabel("labels")
    sizes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=3))
    sizes.spines[["top", "right"]].set_visible(False)
    percent = PercentFormatter(1.0)
    figure.colorbar(image, ax=[axes, sizes], label="share of the site's labels", format=percent, pad=0.03, shrink=0.7)
    return figure


def _plain(axes: Axes, dataset: FederatedDataset) -> None:
    axes.set_title(f"{dataset.name}: labels by site", loc="left", fontsize=11)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(axis="y", length=0)


def _palette(n: int) -> list[str]:
    """n colours: distinct hues while there are enough, then steps of a map."""
    if n <= len(_COLORS):
        return list(_COLORS[:n])
    if n <= 10:
        return [matplotlib.colors.to_hex(c) for c in matplotlib.colormaps["tab10"].colors[:n]]  # type: ignore[attr-defined]
    return [matplotlib.colors.to_hex(c) for c in matplotlib.colormaps["turbo"](np.linspace(0.03, 0.97, n))]


def _ink(color: str) -> str:
    """Black or white, whichever reads better on the colour (relative luminance)."""
    return "black" if np.dot(matplotlib.colors.to_rgb(color), [0.2126, 0.7152, 0.0722]) > 0.4 else "white"


def _clip(name: str, width: int = 28) -> str:
    return name if len(name) <= width else name[: width - 1] + "…"
