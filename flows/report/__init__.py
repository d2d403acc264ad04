"""The report of a run, and the overlay of several, from their ledgers: reads only, neither computes nor launches."""
