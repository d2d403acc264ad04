"""The stage `prepare`: checks of the machine and the configuration, then text to a corpus of shards."""

from pathlib import Path
from typing import Any

from data_scoring.base.field_effects import deciding
from data_scoring.base.progress import Progress
from data_scoring.corpus.corpus import read_manifest
from data_scoring.corpus.prepare_corpus import prepare_corpus
from data_scoring.ledger import refresh_ledger
from data_scoring.refine.policies import REFERENCE_LOSS
from data_scoring.tokenizer.tokenizer import open_tokenizer
from flows.cluster.engines import check_engine
from flows.evaluation.questions import check_items
from flows.launch import launcher
from flows.launch.job_fields import device_kind
from flows.run.config import RunConfig
from flows.run.folder import Run, forget_start
from flows.stages.refine import check_reference
from flows.stages.stage import Stage, Stages


class Prepare(Stage):
    """Tokenise the text, hold out the validation set, pack shards. The corpus' manifest is the completion record."""

    name = "prepare"
    help = "prepare the corpus"

    def round_number(self, config: RunConfig, place: int) -> int | None:
        """Return 0, before the first round."""
        return 0 if place == 0 else None

    def inputs(self, stages: Stages, round_number: int) -> list[Any]:
        """Return the configuration of corpus and tokenizer, and the seed."""
        config = stages.run.config
        return [deciding(config.corpus, self.name), deciding(config.tokenizer, self.name), config.seed]

    def files(self, run: Run, round_number: int) -> list[Path]:
        """Return the files of the corpus."""
        return list(run.corpus().files())

    def is_complete(self, stages: Stages, round_number: int) -> bool:
        """Return whether the corpus was prepared with the current inputs.

        Raises ValueError if it was prepared with others: training on it may have begun.
        """
        path = stages.run.record_path(self.name, 0)
        manifest = read_manifest(path.parent)
        if manifest is not None and manifest["stage_fingerprint"] != stages.fingerprint(self.name, 0):
            raise ValueError(
                f"{path}: the corpus was prepared with another configuration; set another name, restore the "
                "configuration of corpus and tokenizer, or delete the run folder"
            )
        return manifest is not None

    def how_to_repeat(self, run: Run, round_number: int, record: Path) -> str:
        """Return how to prepare the corpus again; if rounds were trained on it, from the same text only."""
        if not _has_trained(run):
            return f"delete {record.parent} to prepare the corpus again"
        rounds = run.folder / "rounds"
        return (
            f"if the sources' text is the same, move {rounds} away, delete {record.parent}, prepare, and move it back"
        )

    def check(self, stages: Stages, round_number: int) -> None:
        """Raise ValueError if rounds were trained on the corpus: another one must not replace it unnoticed."""
        if _has_trained(stages.run):
            record = stages.run.record_path(self.name, 0)
            raise ValueError(
                f"{record}: missing, but rounds were trained on this corpus; restore it from a copy, or, "
                f"{self.how_to_repeat(stages.run, 0, record)}"
            )

    def do(self, stages: Stages, round_number: int, progress: Progress) -> bool:
        """Prepare the corpus, unless it exists; in either case, first check the requirements of the later stages.

        A run folder in which nothing was made is deleted if this fails.
        """
        is_done = False
        try:
            # Fail before hours of tokenising.
            check_machine(stages.run.config)
            if self.is_complete(stages, round_number):
                return False
            self.check(stages, round_number)
            # Later on, the configured tokenizer may be gone: the corpus has a copy.
            check_vocabulary(stages.run.config)
            self.work(stages, round_number, progress)
            is_done = True
        finally:
            if not is_done:
                forget_start(stages.run.folder)
        refresh_ledger(stages.run.folder)
        return True

    def work(self, stages: Stages, round_number: int, progress: Progress) -> None:
        """Prepare the corpus."""
        config = stages.run.config
        # The modules of these checks take two seconds to import.
        if config.model.inherits:
            from flows.inheritance.teacher import check_inheritance

            check_inheritance(config)
        if config.eval.asked:
            check_items(config.eval)
        if config.model.start_from is not None:
            from trainer.checkpoint_shapes import check_start

            # The vocabulary of a tokenizer that is not trained yet is unknown: it depends on the text.
            vocab_size = None if config.tokenizer.path is None else _tokenizer_size(config)
            check_start(Path(config.model.start_from), config.model, vocab_size)
        identity = stages.fingerprint(self.name, 0)
        prepare_corpus(config.corpus, config.tokenizer, config.seed, stages.run.corpus_folder, identity, progress)


def _has_trained(run: Run) -> bool:
    return any(run.has_trained(int(folder.name)) for folder in run.folder.glob("rounds/[0-9]*"))


def check_machine(config: RunConfig) -> None:
    """Raise ValueError if devices, tools, kernels or reference losses are missing for a run."""
    from trainer.devices import check_layers

    launcher.check(config)
    check_engine(config.engine)
    check_layers(config.model.layers)
    check_kernels(config)
    if REFERENCE_LOSS in config.refine.columns:
        check_reference(config.refine)


def check_kernels(config: RunConfig) -> None:
    """Raise ValueError if training or scoring uses a kernel that is not installed or does not support the device."""
    from trainer.devices import resolve_kernels

    resolve_kernels(config.train, config.score, device_kind(config))


def check_vocabulary(config: RunConfig) -> None:
    """Raise ValueError if the tokenizer cannot be opened, or has more entries than the model's vocabulary."""
    if config.model.vocab_size is None:
        return
    vocab_size = _tokenizer_size(config)
    if config.model.vocab_size < vocab_size:
        raise ValueError(
            f"model.vocab_size: {config.model.vocab_size} is smaller than the tokenizer's vocabulary of {vocab_size}; "
            "raise it, or remove it"
        )


def vocabulary_size(config: RunConfig) -> int:
    """Return the size of the model's vocabulary before there is a corpus.

    For a tokenizer that is not trained yet, this is an upper bound.
    """
    return config.model.vocab_size or _tokenizer_size(config)


def _tokenizer_size(config: RunConfig) -> int:
    if config.tokenizer.path is None:
        return config.tokenizer.vocab_size
    return open_tokenizer(Path(config.tokenizer.path), config.tokenizer.end_of_document).vocab_size
