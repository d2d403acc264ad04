"""The data side: text to shards, losses to the ledger, losses to the next mix. It builds no model."""
