"""The report of one run, from its ledger. It only reads: it neither computes nor launches."""
