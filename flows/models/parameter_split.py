"""The split of a model's parameters between the vocabulary (embedding and head) and the layers, as bars."""

from collections.abc import Mapping

import matplotlib.pyplot as plt
from matplotlib.figure import Figure

from flows.display.figures import COLORS, legend_label
from trainer.config import ModelConfig

_LAYERS, _VOCABULARY = COLORS[0], COLORS[1]


def draw_split(models: Mapping[str, tuple[ModelConfig, int]]) -> Figure:
    """Draw a bar for each of `models`, by label: a model and its vocabulary size (the poster of arXiv 2402.02791)."""
    labels = [legend_label(label) for label in models]
    totals = [model.num_parameters(size) / 1e6 for model, size in models.values()]
    shares = [model.embedding_share(size) for model, size in models.values()]
    vocabularies = [total * share for total, share in zip(totals, shares, strict=True)]
    figure, axes = plt.subplots(figsize=(9, 1.2 + 0.4 * len(models)))
    places = range(len(models))
    axes.barh(places, vocabularies, color=_VOCABULARY, label="embedding and head")
    layers = [total - part for total, part in zip(totals, vocabularies, strict=True)]
    axes.barh(places, layers, left=vocabularies, color=_LAYERS, label="layers")
    for place, total, share in zip(places, totals, shares, strict=True):
        axes.text(total + 0.01 * max(totals), place, f"{share:.1%} of {_millions(total)}", va="center", fontsize=9)
    axes.set_yticks(places, labels)
    axes.set_xlim(0, 1.2 * max(totals))
    axes.invert_yaxis()
    axes.set_xlabel("parameters (millions); the share is that of embedding and head")
    axes.grid(axis="y", visible=False)
    axes.set_axisbelow(True)
    axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=2)
    return figure


def _millions(number: float) -> str:
    return f"{number:,.1f} M" if number >= 1 else f"{number:.3f} M"
