"""What a run needs and how long it takes. Rule: reads configurations, and measures; writes to no run folder."""
