"""The regimes and the arms of the study, as registered in docs/study.md before the first run."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from benchmarks.study.texts import NOISE, Documents, share_of, skewed, with_noise

# 0.09 M parameters: 2 layers of width 32, 1,024 entries.
SMALL = {"num_layers": 2, "hidden_size": 32, "num_attention_heads": 2}
# 0.28 M parameters: 3 layers of width 64, 1,024 entries.
LARGER = {"num_layers": 3, "hidden_size": 64, "num_attention_heads": 4}
CONSTANT = {"lr": 5e-3, "min_lr": 5e-3, "global_batch_size": 16, "micro_batch_size": 16}


@dataclass(frozen=True)
class Regime:
    """A regime: its text, made from all documents, and what its configuration sets, by section.

    reference: what the configuration of the run that policy excess refers to sets instead; None: no such arm.
    """

    name: str
    text: Callable[[Documents], Documents]
    values: dict[str, dict[str, Any]]
    reference: dict[str, dict[str, Any]] | None = None
    corpus: dict[str, Any] = field(default_factory=dict)


REGIMES = {
    regime.name: regime
    for regime in (
        Regime(
            "one_pass",
            lambda documents: share_of(documents, 0.14),
            {"model": LARGER, "train": {"lr": 5e-3, "global_batch_size": 16, "micro_batch_size": 16}},
        ),
        Regime(
            "saturated",
            lambda documents: share_of(documents, 0.65),
            {"model": SMALL, "train": CONSTANT},
            reference={"model": LARGER},
        ),
        Regime(
            "sequence",
            lambda documents: share_of(documents, 0.5),
            {"model": SMALL, "train": CONSTANT, "rounds": {"first_order": "sources"}},
        ),
        Regime(
            "noise",
            lambda documents: with_noise(share_of(documents, 0.4), 0.2),
            {"model": SMALL, "train": CONSTANT},
            reference={
                "refine": {
                    "sources": [
                        {"name": NOISE + kind, "from_round": 2}
                        for kind in ("shuffled", "boilerplate", "base64", "duplicates")
                    ]
                }
            },
        ),
        Regime(
            "rare",
            lambda documents: skewed(documents, rare=3, rare_share=0.01),
            {"model": SMALL, "train": CONSTANT},
            corpus={"validation_fraction": 0.2},
        ),
    )
}


def arms_of(regime: Regime, sources: list[str], reference: str | None) -> dict[str, dict[str, Any]]:
    """Return the arms of a regime, whose corpus has `sources`; `reference` is the round folder for policy excess."""
    rate = 0.5
    arms: dict[str, dict[str, Any]] = {
        "random": {"policy": "random"},
        "all": {"policy": "all"},
        # A random draw that pays for losses: what the draws by loss are compared with at equal tokens.
        "random_paid": {"policy": "sql", "sql": "0 * loss", "outlier_z": None},
        "loss": {"policy": "loss"},
        "loss_batch": {"policy": "loss_batch"},
        "loss_part": {"policy": "loss", "within": "part"},
        "top": {"policy": "top"},
        "band": {"policy": "band"},
        "forgetting": {"policy": "forgetting"},
        "inverse": {"policy": "loss", "weights": "inverse"},
        # The same share of every source: the draw moves no weight from easy sources to hard ones.
        "loss_by_source": {
            "policy": "loss",
            "sources": [{"name": name, "at_least": rate, "at_most": rate} for name in sources],
        },
    }
    if reference is not None:
        arms["excess"] = {"policy": "excess", "reference": reference}
    return arms
