"""The report on a pruned vocabulary: tables, as text and HTML, and curves."""

import html
from pathlib import Path

import matplotlib.pyplot as plt
from matplotlib.figure import Figure

from flows.display.figures import render_figure
from flows.display.html import html_figure, html_page, html_table
from flows.display.markdown import markdown_table
from flows.models.parameter_split import draw_split
from flows.models.vocabulary_pruning_result import PAPER_COVERAGE, RULE, PrunedVocabulary, Request, dropped_tokens

_COLORS = {"coverage": "#0072b2", "share": "#d55e00", "length": "#009e73", "cost": "#cc79a7"}
_MOST_DROPPED = 60


def summarise(made: PrunedVocabulary) -> str:
    """Return a summary of the pruned vocabulary, as Markdown that is also readable as plain text."""
    head, rows = _sizes(made)
    length_head, length_rows = _lengths(made)
    return "\n\n".join(
        [
            made.reason,
            *made.warnings(),
            markdown_table(head, rows),
            markdown_table(length_head, length_rows),
            _measured_on(made),
            f"Dropped: {len(dropped_tokens(made)):,} tokens, listed in {made.folder / 'dropped.tsv'}.",
        ]
    )


def write_page(made: PrunedVocabulary, request: Request, folder: Path) -> None:
    """Write `report.html` and its pictures to `folder`."""
    png = render_figure(lambda: _draw(made))
    (folder / "curves.png").write_bytes(png)
    named = {f"{name}: {size:,}": (made.model, size) for name, size in _named_sizes(made).items()}
    split = render_figure(lambda: draw_split(named))
    (folder / "split.png").write_bytes(split)
    head, rows = _sizes(made)
    length_head, length_rows = _lengths(made)
    dropped = dropped_tokens(made)[:_MOST_DROPPED]
    reasons = list(made.choice.reasons.values())
    body = [
        f'<p class="lead">{html.escape(made.reason)}</p>',
        *(f"<p><strong>{html.escape(warning)}</strong></p>" for warning in made.warnings()),
        f"<p>Tokenizer {html.escape(str(request.tokenizer))}, counted over {html.escape(str(request.corpus))}: "
        f"{int(made.counts.sum()):,} tokens from {len(made.sources)} sources.</p>",
        html_table(head, [tuple(row) for row in rows]),
        f"<p>The paper's rule: {RULE}.</p>",
        html_figure(png, "Coverage, share of parameters, text length and training cost against vocabulary size."),
        html_figure(split, "Parameters of embedding and head, and of layers, at the sizes of the table."),
        "<h2>Sequence length by source</h2>",
        html_table(length_head, [tuple(row) for row in length_rows]),
        f"<p>{html.escape(_measured_on(made))}</p>",
        "<h2>Why tokens are kept</h2>",
        html_table(["Reason", "Tokens"], [(reason, reasons.count(reason)) for reason in dict.fromkeys(reasons)]),
        f"<h2>The {len(dropped)} most frequent dropped tokens</h2>",
        html_table(["Piece", "Id", "Occurrences"], [(repr(made.pieces[t]), t, int(made.counts[t])) for t in dropped]),
        "<p>dropped.tsv lists all of them; vocabulary.parquet has the decision for each token.</p>",
    ]
    (folder / "report.html").write_text(html_page(made.folder.name, "".join(body)), encoding="utf-8")


def _named_sizes(made: PrunedVocabulary) -> dict[str, int]:
    """Return the sizes of interest: before, after, the cheapest, and those of the paper."""
    whole, size = int(made.curve.sizes[-1]), len(made.choice.tokens)
    named = {
        "before": whole, "after": size, "cheapest to train": made.cheapest,
        f"for {PAPER_COVERAGE:.2%} (the paper)": made.paper_size,
    }  # fmt: skip
    if made.within_rule is not None:
        named |= dict(zip(("least within the rule", "most within the rule"), made.within_rule, strict=True))
    return named


def _sizes(made: PrunedVocabulary) -> tuple[list[str], list[list[str]]]:
    """Return a table of the sizes of interest."""
    total = made.model.num_parameters(int(made.curve.sizes[-1]))
    rows = []
    for name, tokens in _named_sizes(made).items():
        length = made.length(tokens)
        cost = length * made.model.num_parameters(tokens) / total
        broken = made.broken_rules(tokens)
        rows.append(
            [
                name, f"{tokens:,}", f"{made.coverage(tokens):.2%}", f"{made.share(tokens):.2%}",
                f"{made.model.num_parameters(tokens):,}", f"{length:.4f}", f"{cost:.4f}",
                f"not its {' and '.join(broken)}" if broken else "kept",
            ]
        )  # fmt: skip
    head = ["vocabulary", "tokens", "coverage", "share of parameters", "parameters", "length of the text", "cost"]
    head.append("the paper's rule")
    return head, rows


def _lengths(made: PrunedVocabulary) -> tuple[list[str], list[list[str]]]:
    rows = []
    for length in made.lengths:
        before, after = max(1, length.tokens_before), max(1, length.tokens_after)
        rows.append(
            [
                length.name, f"{length.num_bytes:,}{' (sample)' if length.is_sample else ''}",
                f"{length.num_bytes / before:.4f}", f"{length.num_bytes / after:.4f}", f"{after / before - 1:+.2%}",
            ]
        )  # fmt: skip
    return ["source", "bytes measured", "bytes per token before", "after", "longer by"], rows


def _measured_on(made: PrunedVocabulary) -> str:
    samples = sum(length.is_sample for length in made.lengths)
    measured = (
        "the whole text"
        if not samples
        else f"random samples of at most 16 MiB of {samples} of {len(made.lengths)} sources"
    )
    before = sum(length.tokens_before for length in made.lengths)
    after = sum(length.tokens_after for length in made.lengths)
    return (
        f"Bytes per token: {measured}, tokenised by both; both decode every text to the same string. In total "
        f"{before:,} tokens became {after:,} ({after / before:.4f}); the table of sizes has estimates of this."
    )


def _draw(made: PrunedVocabulary) -> Figure:
    curve = made.curve
    parameters = made.parameters()
    share = 1 - made.model.num_parameters(0) / parameters
    cost = curve.lengths * parameters / parameters[-1]
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.8), layout="constrained")
    left.plot(curve.sizes, 100 * curve.coverage, color=_COLORS["coverage"], label="coverage of the corpus")
    left.plot(curve.sizes, 100 * share, color=_COLORS["share"], label="share of parameters, embedding and head")
    left.set_ylabel("%")
    left.set_ylim(0, 102)
    right.plot(curve.sizes, curve.lengths, color=_COLORS["length"], label="length of the text (tokens)")
    right.plot(curve.sizes, cost, color=_COLORS["cost"], label="cost: length x parameters")
    right.set_ylim(min(0.95 * float(cost.min()), 0.95), 2)
    right.set_ylabel("relative to the whole vocabulary")
    for axes in (left, right):
        axes.axvline(len(made.choice.tokens), color="black", linewidth=0.8, label="chosen size")
        axes.axvline(made.paper_size, color="black", linewidth=0.8, linestyle=":", label=f"{PAPER_COVERAGE:.2%}")
        axes.set_xlabel("tokens in the vocabulary")
        axes.legend(fontsize=8)
    return figure
