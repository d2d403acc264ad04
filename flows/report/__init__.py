"""The page of one run, from its ledger. It reads; it neither computes nor launches."""
