"""Display of results: HTML, Markdown, figures, terminal progress. It knows no run."""
