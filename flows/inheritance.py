"""Inheritance: round 1 starts from layers and neurons of a larger model (the paper, section 4).

Everything lies in rounds/1/inherit: what was measured (skips.parquet, masks.json), what stays (part.json and, for the
ledger, lineage.parquet), and the checkpoint itself.
"""

import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from data_scoring.files import read_json, write_json
from data_scoring.progress import Progress
from data_scoring.scoring import write_parquet
from data_scoring.tokenizer import read_tokenizer
from data_scoring.vocabulary import open_vocabulary
from flows.jobs import job_fields
from flows.launch import launch
from flows.layer_importance import keep_layers, measure_importance
from flows.run_folder import Run
from flows.stored_model import StoredModel, find_model
from trainer.checkpoint_folder import list_checkpoints
from trainer.config import InheritConfig, ModelConfig, check_layout
from trainer.inheritance import Part, check_student, cut_depth, slice_checkpoint
from trainer.jobs import MaskJob, TaylorJob
from trainer.neuron_scores import choose
from trainer.weights import Weights

# A row a layer: which of the teacher's it was, and which of its structures stay, by their numbers there.
LINEAGE = pa.schema(
    [
        ("layer", pa.int32()),
        ("teacher_layer", pa.int32()),
        ("teacher", pa.string()),
        ("checkpoint", pa.string()),
        ("method", pa.string()),
        ("channels", pa.list_(pa.int32())),
        ("ffn", pa.list_(pa.int32())),
        ("groups", pa.list_(pa.int32())),
        ("heads", pa.list_(pa.int32())),
    ]
)


def inheritance_folder(run: Run) -> Path:
    """Return the folder of what round 1 inherits."""
    return run.round_folder(1) / "inherit"


def inherited_checkpoint(run: Run) -> Path:
    """Return the checkpoint that round 1 starts from. Raises ValueError where it is gone."""
    checkpoints = list_checkpoints(inheritance_folder(run) / "checkpoint")
    if not checkpoints:
        raise ValueError(
            f"{inheritance_folder(run)}: what the model inherited is gone; restore it, or delete "
            f"{run.round_folder(1) / 'inherit.json'} to make it again"
        )
    return checkpoints[-1]


def check_inheritance(model: ModelConfig, tokenizer: Path | None) -> None:
    """Raise ValueError where `model`, reading with `tokenizer`, cannot start from the one that it names."""
    if model.inherit is None or not model.inherits:
        return
    teacher = find_model(Path(model.inherit.teacher), model.inherit.round)
    check_student(teacher.config, model)
    if tokenizer is None:
        raise ValueError(
            "tokenizer.path: a model that inherits reads with the tokenizer of the larger one, or with one cut from "
            f"it; give {teacher.tokenizer}"
        )
    kept_tokens(tokenizer, teacher)


def make_start(run: Run, progress: Progress) -> None:
    """Leave in the round's folder the checkpoint that round 1 starts from, and where each of its parts is from.

    Raises ValueError for what cannot be inherited. The larger model's weights are read, never changed.
    """
    model = run.config.model
    assert model.inherit is not None
    teacher = find_model(Path(model.inherit.teacher), model.inherit.round)
    check_student(teacher.config, model)
    _check_ranks(run, teacher)
    folder = inheritance_folder(run)
    shutil.rmtree(folder / "checkpoint", ignore_errors=True)
    with_tokens = _with_tokens(run, teacher, folder / "work")
    layers = _choose_layers(run, with_tokens, folder, progress)
    is_shallower = len(layers) < teacher.config.num_layers
    shallow = _cut(with_tokens, layers, folder / "work" / "layers") if is_shallower else with_tokens
    part = _choose_neurons(run, shallow, folder, progress)
    progress("cutting the larger model (checkpoints)", 0, 1)
    target = folder / "checkpoint" / "step-00000000"
    slice_checkpoint(shallow.checkpoint, shallow.config, model, part, target, seed=run.config.seed)
    progress("cutting the larger model (checkpoints)", 1, 1)
    _write_lineage(folder, teacher, model.inherit, part.model_copy(update={"layers": tuple(layers)}))
    shutil.rmtree(folder / "work", ignore_errors=True)


def layers_of(run: Run, progress: Progress) -> list[int]:
    """Return the layers that a run inherits, measured over its corpus where the configuration names none."""
    model, folder = run.config.model, inheritance_folder(run)
    assert model.inherit is not None
    teacher = find_model(Path(model.inherit.teacher), model.inherit.round)
    _check_ranks(run, teacher)
    layers = _choose_layers(run, _with_tokens(run, teacher, folder / "work"), folder, progress)
    shutil.rmtree(folder / "work", ignore_errors=True)
    return list(layers)


def _choose_layers(run: Run, teacher: StoredModel, folder: Path, progress: Progress) -> Sequence[int]:
    """Return the layers of `teacher` that stay: those that the configuration names, or those whose absence costs most.

    What was measured for that is left in `folder`.
    """
    model = run.config.model
    assert model.inherit is not None
    if model.inherit.layers != "auto":
        return model.inherit.layers
    if model.num_layers == teacher.config.num_layers:
        return range(model.num_layers)
    samples = model.inherit.calibration_samples
    skips = measure_importance(run, teacher, teacher.checkpoint, folder, samples, progress)
    return keep_layers(skips, model.num_layers)


def kept_tokens(tokenizer: Path, teacher: StoredModel) -> list[int] | None:
    """Return the teacher's tokens in the order of `tokenizer`, which was cut from the teacher's; None: all as they are.

    Raises ValueError where it is another tokenizer.
    """
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
        "that `reprise tokenizer compact` has cut from it; give one of these"
    )


def _check_ranks(run: Run, teacher: StoredModel) -> None:
    config = run.config
    try:
        check_layout(teacher.config, config.resolved_train, config.parallel, config.corpus.seq_length)
    except ValueError as error:
        raise ValueError(f"model.inherit.from: ranks share the larger model as well: {error}") from None


def _with_tokens(run: Run, teacher: StoredModel, work: Path) -> StoredModel:
    """Return the larger model with the run's vocabulary."""
    # Not its copy in the corpus: a tokenizer that was cut from another has its table beside it.
    kept = kept_tokens(Path(str(run.config.tokenizer.path)), teacher)
    num_tokens, wanted = teacher.vocab_size if kept is None else len(kept), run.config.model.vocab_size
    if wanted not in (None, num_tokens):
        raise ValueError(
            f"model.vocab_size: {wanted} is not what the larger model has for this tokenizer ({num_tokens}); leave it "
            "out"
        )
    if kept is None:
        return teacher
    return _cut(teacher, range(teacher.config.num_layers), work / "tokens", kept)


def _cut(teacher: StoredModel, layers: Sequence[int], folder: Path, tokens: Sequence[int] | None = None) -> StoredModel:
    """Return the larger model with some of its layers and tokens alone."""
    shutil.rmtree(folder, ignore_errors=True)
    target = folder / "step-00000000"
    whole = teacher.config.model_copy(update={"vocab_size": None, "preset": None})
    config = cut_depth(teacher.checkpoint, whole, layers, target, tokens)
    vocab_size = teacher.vocab_size if tokens is None else len(tokens)
    return replace(teacher, config=config, checkpoint=target, vocab_size=vocab_size)


def _choose_neurons(run: Run, teacher: StoredModel, folder: Path, progress: Progress) -> Part:
    """Return which neurons of `teacher`, all of whose layers stay, the run's model has."""
    model = run.config.model
    assert model.inherit is not None
    inherit = model.inherit
    if inherit.method in ("l1", "l2"):
        return choose(Weights(teacher.checkpoint), teacher.config, model, 1 if inherit.method == "l1" else 2)
    fields = {
        **job_fields(run, 1, run.fingerprint("inherit", 1)),
        "round_folder": folder,
        "model": teacher.config,
        "weights": teacher.checkpoint,
        "micro_batch_size": run.config.train.micro_batch_size,
    }
    if inherit.method == "taylor":
        shutil.rmtree(folder / "taylor", ignore_errors=True)
        job = TaylorJob(**fields, num_samples=inherit.calibration_samples)
        launch(job, run.folder, "inherit-taylor", progress, run.config.launch)
        [values] = list_checkpoints(folder / "taylor")
        part = choose(Weights(values), teacher.config, model)
        shutil.rmtree(folder / "taylor")
        return part
    masks = MaskJob(
        **fields,
        num_samples=inherit.calibration_samples,
        student=model,
        steps=inherit.mask_steps,
        lr=inherit.mask_lr,
    )
    launch(masks, run.folder, "inherit-masks", progress, run.config.launch)
    return Part.model_validate(read_json(folder / "masks.json")["part"])


def _write_lineage(folder: Path, teacher: StoredModel, inherit: InheritConfig, part: Part) -> None:
    """Write which of the teacher's structures the model is made of."""
    common = {
        "teacher": str(teacher.place),
        "checkpoint": str(teacher.checkpoint),
        "method": inherit.method,
        "channels": list(part.channels),
    }
    rows = [
        {
            **common,
            "layer": layer,
            "teacher_layer": teacher_layer,
            "ffn": list(part.ffn[layer]),
            "groups": list(part.groups[layer]),
            "heads": list(part.heads[layer]),
        }
        for layer, teacher_layer in enumerate(part.layers)
    ]
    write_parquet(folder / "lineage.parquet", pa.Table.from_pylist(rows, LINEAGE), "")
    write_json(folder / "part.json", part.model_dump(mode="json"))
