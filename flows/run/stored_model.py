"""A model on disk to start from: a round of a run, or a folder created by `reprise import hf`."""

from dataclasses import dataclass
from pathlib import Path

from typing_extensions import TypedDict

from data_scoring.base.field_effects import INFERENCE, deciding
from data_scoring.base.files import checksum, fingerprint
from data_scoring.base.validation import read_record, validated
from data_scoring.base.yaml_text import read_yaml
from flows.run.folder import read_run
from trainer.checkpoint_folder import RECORD, list_checkpoints, read_checkpoint_record
from trainer.config import ModelConfig

MODEL, ORIGIN = "model.yaml", "import.json"


class _Origin(TypedDict, total=False):
    end_of_document: str | None


@dataclass(frozen=True)
class StoredModel:
    """A trained model: its configuration, its weights and its tokenizer.

    round_number: the round that the model was trained in; None if it was imported. vocab_size: the tokenizer's entries.
    end_of_document: the token that ends documents, if the tokenizer does not define one.
    """

    place: Path
    round_number: int | None
    config: ModelConfig
    checkpoint: Path
    tokenizer: Path
    vocab_size: int
    end_of_document: str | None

    @property
    def identity(self) -> str:
        """Return the model's fingerprint: of its weights, and of the fields that affect inference."""
        computed = deciding(self.config, INFERENCE, keep_neutral=True)
        return fingerprint("model", checksum(self.checkpoint / RECORD), computed)


def find_model(place: Path, round_number: int | None = None) -> StoredModel:
    """Return the final model of a round (default: the last) of the run in `place`, or the model in the folder `place`.

    Raises ValueError if there is none.
    """
    # Results record the model's path, and may be read from another working directory.
    place = place.absolute()
    if (place / MODEL).is_file():
        if round_number is not None:
            raise ValueError(f"--round: needs a run folder, which {place} is not; omit it")
        return _read_folder(place)
    if not (place / "run.yaml").is_file():
        raise ValueError(
            f"{place}: has no model; give a run folder, or a folder that `reprise import hf` created (with {MODEL})"
        )
    run = read_run(place)
    found, checkpoint = _find_round(place, round_number)
    corpus = run.corpus()
    vocab_size = read_checkpoint_record(checkpoint).get("vocab_size", corpus.vocab_size)
    tokenizer = {path: written for path, written in corpus.files().items() if path == corpus.tokenizer_path}
    for path, reason in run.verifier().find_damage(tokenizer).items():
        raise ValueError(f"{path}: damaged since it was written: {reason}; restore it from a copy")
    end = run.config.tokenizer.end_of_document
    # Where the model's own weights came from does not matter to models that start from it.
    config = run.config.model.model_copy(update={"inherit": None, "start_from": None})
    return StoredModel(place, found, config, checkpoint, corpus.tokenizer_path, vocab_size, end)


def _read_folder(place: Path) -> StoredModel:
    config = validated(ModelConfig, read_yaml(place / MODEL), place / MODEL)
    checkpoints = list_checkpoints(place / "checkpoint")
    tokenizers = [path for path in (place / "tokenizer.json", place / "tokenizer.model") if path.is_file()]
    if not checkpoints or not tokenizers:
        missing = "checkpoint" if not checkpoints else "tokenizer"
        raise ValueError(f"{place}: its {missing} is missing; import the model again")
    vocab_size = read_checkpoint_record(checkpoints[-1], "vocab_size")["vocab_size"]
    origin = read_record(place / ORIGIN, _Origin, "import the model again")
    end = None if origin is None else origin.get("end_of_document")
    return StoredModel(place, None, config, checkpoints[-1], tokenizers[0], vocab_size, end)


def find_checkpoint(place: Path, round_number: int | None) -> Path:
    """Return the last checkpoint of a round (default: the last) of the run in `place`, or that of the model in it.

    `place` itself if it is neither a run nor a model folder. Raises ValueError if there is none.
    """
    if not (place / "run.yaml").is_file():
        if round_number is not None:
            raise ValueError(f"--round: needs a run folder, which {place} is not; omit it")
        return find_model(place).checkpoint if (place / MODEL).is_file() else place
    return _find_round(place, round_number)[1]


def _find_round(place: Path, round_number: int | None) -> tuple[int, Path]:
    """Return a round of the run in `place` (default: the last that has a checkpoint), and its last checkpoint."""
    rounds = sorted(int(path.name) for path in (place / "rounds").glob("[0-9]*"))
    for number in reversed(rounds) if round_number is None else [round_number]:
        checkpoints = list_checkpoints(place / "rounds" / str(number) / "checkpoint")
        if checkpoints:
            return number, checkpoints[-1]
    which = "no round has" if round_number is None else f"round {round_number} does not have"
    raise ValueError(f"{place}: {which} a checkpoint; train the round first, or give a step-… folder")
