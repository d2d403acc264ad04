"""The larger model that a model inherits from: finding it, and checking it against the configuration."""

from pathlib import Path

import pyarrow.parquet as pq

from data_scoring.config import padded_vocab_size
from data_scoring.tokenizer.tokenizer import name_token, open_tokenizer, read_tokenizer
from data_scoring.tokenizer.vocabulary import open_vocabulary
from flows.run.config import RunConfig
from flows.run.stored_model import MODEL, StoredModel, find_model
from trainer.checkpoint_folder import read_checkpoint_record
from trainer.checkpoint_shapes import find_difference, read_shapes, shapes_of
from trainer.config import InheritConfig, ModelConfig
from trainer.parallel_config import check_layout
from trainer.pruning import check_student


def find_teacher(inherit: InheritConfig) -> StoredModel:
    """Return the larger model that `inherit` names. Raises ValueError if there is none, or its round has not ended."""
    place = Path(inherit.teacher)
    if inherit.round is not None and (place / MODEL).is_file():
        raise ValueError(f"model.inherit.round: applies to run folders only, and {place} is none; leave it out")
    try:
        teacher = find_model(place, inherit.round)
    except ValueError as error:
        raise ValueError(f"model.inherit.from: {error}") from None
    record = read_checkpoint_record(teacher.checkpoint)
    step, last = record.get("step"), record.get("num_steps")
    if last is not None and step != last:
        raise ValueError(
            f"model.inherit.from: {teacher.checkpoint} is of step {step} of {last}; finish its round, or name a "
            "finished one (model.inherit.round)"
        )
    return teacher


def check_inheritance(config: RunConfig) -> None:
    """Raise ValueError if the configuration names a larger model from which its model cannot start."""
    model = config.model
    if model.inherit is None or not model.inherits:
        return
    teacher = find_teacher(model.inherit)
    depth = teacher.config.num_layers
    check_student(teacher.config, model)
    if model.inherit.layers != "auto" and max(model.inherit.layers) >= depth:
        raise ValueError(
            f"model.inherit.layers: {max(model.inherit.layers)} is no layer of the larger model, which has 0 to "
            f"{depth - 1}; choose from these"
        )
    if config.tokenizer.path is None:
        raise ValueError(
            "tokenizer.path: a model that inherits needs the tokenizer of the larger model, or one pruned from it; "
            f"give {teacher.tokenizer}"
        )
    check_vocabulary(config, teacher)
    if model.inherit.layers == "auto" and model.num_layers < depth:
        _check_ranks(config, teacher.config)
    elif model.inherit.method in ("taylor", "learned"):
        _check_ranks(config, teacher.config.model_copy(update={"num_layers": model.num_layers}))
    try:
        found = read_shapes(teacher.checkpoint)
    except ValueError as error:
        raise ValueError(f"model.inherit.from: {str(error).partition(';')[0]}; restore it, or use another") from None
    rows = padded_vocab_size(teacher.config.vocab_size or teacher.vocab_size)
    different = find_difference(found, shapes_of(teacher.config, rows))
    if different is not None:
        name, shape, wanted = different
        raise ValueError(
            f"model.inherit.from: in {teacher.checkpoint}, {name} has the shape {shape}, but its configuration needs "
            f"{wanted}; import it again, or use another"
        )


def check_vocabulary(config: RunConfig, teacher: StoredModel) -> list[int] | None:
    """Return the result of `kept_tokens`. Raises ValueError if vocabularies or end-of-document tokens do not match."""
    kept = kept_tokens(Path(str(config.tokenizer.path)), teacher)
    check_end(config, teacher, kept)
    num_tokens, wanted = teacher.vocab_size if kept is None else len(kept), config.model.vocab_size
    if wanted not in (None, num_tokens):
        raise ValueError(
            f"model.vocab_size: {wanted} differs from the {num_tokens} entries of the tokenizer, the only trained rows "
            "of the larger model; leave it out"
        )
    return kept


def check_end(config: RunConfig, teacher: StoredModel, kept: list[int] | None) -> None:
    """Raise ValueError if the default end-of-document token is not that of the larger model.

    kept: the larger model's tokens in the order of the configuration's tokenizer; None: all of them.
    """
    if config.tokenizer.end_of_document is not None:
        return
    ours = open_tokenizer(Path(str(config.tokenizer.path)), None).end_of_document
    theirs = open_tokenizer(teacher.tokenizer, teacher.end_of_document).end_of_document
    if (ours if kept is None else kept[ours]) != theirs:
        here, there = name_token(Path(str(config.tokenizer.path)), ours), name_token(teacher.tokenizer, theirs)
        raise ValueError(
            f"tokenizer.end_of_document: null stands for {here!r} here, and documents of the larger model end with "
            f"{there!r}; set it to one of them"
        )


def kept_tokens(tokenizer: Path, teacher: StoredModel) -> list[int] | None:
    """Return the teacher's tokens in the order of `tokenizer`, pruned from the teacher's; None if both are the same.

    Raises ValueError if it is an unrelated tokenizer.
    """
    if not tokenizer.is_file():
        raise ValueError(f"tokenizer.path: {tokenizer}: no such file; give {teacher.tokenizer}")
    if read_tokenizer(tokenizer) == teacher.tokenizer.read_bytes():
        return None
    table = tokenizer.parent / "vocabulary.parquet"
    if table.is_file():
        rows = pq.read_table(table, columns=["id", "piece", "new_id"]).to_pylist()
        pieces = [(token, piece) for token, piece in enumerate(open_vocabulary(teacher.tokenizer).pieces) if piece]
        if [(row["id"], row["piece"]) for row in rows] == pieces:
            kept = [(row["new_id"], row["id"]) for row in rows if row["new_id"] is not None]
            return [token for _, token in sorted(kept)]
    raise ValueError(
        f"tokenizer.path: {tokenizer} is neither the tokenizer of model.inherit.from ({teacher.tokenizer}) nor one "
        "that `reprise tokenizer compact` pruned from it; give one of these"
    )


def _check_ranks(config: RunConfig, shared: ModelConfig) -> None:
    try:
        check_layout(shared, config.resolved_train, config.parallel, config.corpus.seq_length)
    except ValueError as error:
        raise ValueError(f"model.inherit.from: the layout must also divide the larger model: {error}") from None
