"""How results are shown: HTML, Markdown, figures, terminal progress. It knows no run."""
