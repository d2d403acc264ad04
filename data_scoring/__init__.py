"""Text to shards, losses to a ledger, a ledger to a mix; builds no model."""
