"""A policy from outside the package: long samples have to be the harder."""

from data_scoring.refine.policies import Policy

LOSS_PER_ROOT_TOKEN = Policy(
    name="loss_per_root_token",
    description="draws by loss per square root of tokens",
    reason="drawn by loss per root token",
    score="loss / sqrt(num_tokens)",
    temperature=0.1,
)
