"""The initial checkpoint of round 1, from layers and neurons of a larger model.

All files are in rounds/1/inherit: the measurements (skips.parquet, masks.json), the pruning plan (part.json and, for
the ledger, lineage.parquet), and the checkpoint itself.
"""

import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
from typing_extensions import TypedDict

from data_scoring.base.files import fingerprint, write_record
from data_scoring.base.parquet import parquet_fingerprint, write_parquet
from data_scoring.base.progress import Progress
from data_scoring.base.validation import REPEAT, read_record, required_record, validated
from flows.inheritance.layer_importance import keep_layers, measure_importance
from flows.inheritance.teacher import check_inheritance, check_vocabulary, find_teacher
from flows.launch import launcher
from flows.launch.job_fields import job_fields
from flows.run.folder import Run
from flows.run.stored_model import StoredModel
from trainer.checkpoint_folder import list_checkpoints, read_checkpoint_record
from trainer.config import InheritConfig, ModelConfig
from trainer.jobs import MaskJob, TaylorJob
from trainer.neuron_scores import choose
from trainer.pruning import PruningPlan, cut_depth, is_as_wide, slice_checkpoint
from trainer.weights import Weights


class _Learned(TypedDict):
    fingerprint: str
    part: dict[str, Any]


# One row per layer: the teacher's layer, and the structures kept of it, by their index in the teacher.
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
    """Return the folder of round 1's inheritance."""
    return run.round_folder(1) / "inherit"


def inherited_checkpoint(run: Run) -> Path:
    """Return the checkpoint that round 1 starts from. Raises ValueError if it is gone."""
    checkpoints = list_checkpoints(inheritance_folder(run) / "checkpoint")
    if not checkpoints:
        raise ValueError(
            f"{inheritance_folder(run)}: the inherited checkpoint is missing; restore it, or delete "
            f"{run.round_folder(1) / 'inherit.json'} to make it again"
        )
    return checkpoints[-1]


def is_current(run: Run) -> bool:
    """Return whether the initial checkpoint was cut from the larger model that exists now.

    It also counts as current if the larger model is gone, because it cannot be cut again.
    """
    assert run.config.model.inherit is not None
    try:
        teacher = find_teacher(run.config.model.inherit)
    except ValueError:
        return True
    return parquet_fingerprint(inheritance_folder(run) / "lineage.parquet") == teacher.identity


def make_start(run: Run, identity: str, progress: Progress) -> None:
    """Write the initial checkpoint of round 1, and its lineage, to the round's folder.

    identity: the fingerprint of the stage, which is stored with learned masks. Raises ValueError if the model cannot
    inherit. The larger model's weights are only read.
    """
    model = run.config.model
    assert model.inherit is not None
    check_inheritance(run.config)
    teacher = find_teacher(model.inherit)
    folder = inheritance_folder(run)
    shutil.rmtree(folder / "checkpoint", ignore_errors=True)
    with _working(folder) as work:
        with_tokens = _with_tokens(run, teacher, work)
        layers = _choose_layers(run, with_tokens, folder, progress)
        is_shallower = len(layers) < teacher.config.num_layers
        shallow = _cut(with_tokens, layers, work / "layers") if is_shallower else with_tokens
        part = _choose_neurons(run, shallow, folder, identity, progress)
        progress("cutting the larger model (checkpoints)", 0, 1)
        origin = {"checkpoint": str(teacher.checkpoint), "layers": list(layers), "method": model.inherit.method}
        target = folder / "checkpoint" / "step-00000000"
        slice_checkpoint(
            shallow.checkpoint, shallow.config, model, part, target, None, run.config.seed, {"inherited_from": origin}
        )
        progress("cutting the larger model (checkpoints)", 1, 1)
    _write_lineage(folder, teacher, model.inherit, part.model_copy(update={"layers": tuple(layers)}))


def layers_of(run: Run, progress: Progress) -> list[int]:
    """Return the layers that a run inherits, measured on its corpus if the configuration names none."""
    assert run.config.model.inherit is not None
    teacher, folder = find_teacher(run.config.model.inherit), inheritance_folder(run)
    with _working(folder) as work:
        is_measured = _needs_measuring(run.config.model, teacher)
        return list(_choose_layers(run, _with_tokens(run, teacher, work) if is_measured else teacher, folder, progress))


@contextmanager
def _working(folder: Path) -> Iterator[Path]:
    """Yield a folder for intermediate files, deleted afterwards."""
    work = folder / "work"
    shutil.rmtree(work, ignore_errors=True)
    try:
        yield work
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _needs_measuring(model: ModelConfig, teacher: StoredModel) -> bool:
    return model.inherit is not None and model.inherit.layers == "auto" and model.num_layers < teacher.config.num_layers


def _choose_layers(run: Run, teacher: StoredModel, folder: Path, progress: Progress) -> Sequence[int]:
    """Return the layers of `teacher` to keep: those that the configuration names, or those whose removal costs most.

    The measurements for that are left in `folder`.
    """
    model = run.config.model
    assert model.inherit is not None
    if not _needs_measuring(model, teacher):
        return range(model.num_layers) if model.inherit.layers == "auto" else model.inherit.layers
    samples = model.inherit.calibration_samples
    skips = measure_importance(run, teacher, folder, samples, progress)
    return keep_layers(skips, model.num_layers)


def _with_tokens(run: Run, teacher: StoredModel, work: Path) -> StoredModel:
    """Return the larger model with the run's vocabulary."""
    # Uses the original tokenizer file, not its copy in the corpus: a pruned tokenizer needs the table beside it.
    kept = check_vocabulary(run.config, teacher)
    if kept is None and "vocab_size" not in read_checkpoint_record(teacher.checkpoint):
        # Checkpoints of earlier versions do not record how many of their rows are tokens.
        kept = list(range(teacher.vocab_size))
    if kept is None:
        return teacher
    return _cut(teacher, range(teacher.config.num_layers), work / "tokens", kept)


def _cut(teacher: StoredModel, layers: Sequence[int], folder: Path, tokens: Sequence[int] | None = None) -> StoredModel:
    """Return the larger model reduced to some of its layers and tokens."""
    target = folder / "step-00000000"
    whole = teacher.config.model_copy(update={"vocab_size": None, "preset": None})
    config = cut_depth(teacher.checkpoint, whole, layers, target, tokens)
    vocab_size = teacher.vocab_size if tokens is None else len(tokens)
    return replace(teacher, config=config, checkpoint=target, vocab_size=vocab_size)


def _choose_neurons(
    run: Run, teacher: StoredModel, folder: Path, stage_identity: str, progress: Progress
) -> PruningPlan:
    """Return which neurons of `teacher` the run's model keeps; all layers of `teacher` are kept."""
    model = run.config.model
    assert model.inherit is not None
    inherit = model.inherit
    # If all neurons are kept, there is nothing to choose by any method.
    if inherit.method in ("l1", "l2") or is_as_wide(teacher.config, model):
        return choose(Weights(teacher.checkpoint), teacher.config, model, 1 if inherit.method == "l1" else 2)
    identity = fingerprint("neurons", stage_identity, teacher.identity)
    fields = {
        **job_fields(run, 1, identity),
        "round_folder": folder,
        "model": teacher.config,
        "weights": teacher.checkpoint,
        "micro_batch_size": run.config.train.micro_batch_size,
    }
    if inherit.method == "taylor":
        shutil.rmtree(folder / "taylor", ignore_errors=True)
        job = TaylorJob(**fields, num_samples=inherit.calibration_samples)
        launcher.launch(job, run.folder, "inherit-taylor", progress, run.config.launch)
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
    learned = read_record(folder / "masks.json", _Learned)
    if learned is None or learned["fingerprint"] != identity:
        launcher.launch(masks, run.folder, "inherit-masks", progress, run.config.launch)
        learned = required_record(folder / "masks.json", _Learned)
    return validated(PruningPlan, learned["part"], folder / "masks.json", REPEAT)


def _write_lineage(folder: Path, teacher: StoredModel, inherit: InheritConfig, part: PruningPlan) -> None:
    """Write which structures of the teacher the model consists of."""
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
    write_parquet(folder / "lineage.parquet", pa.Table.from_pylist(rows, LINEAGE), teacher.identity)
    write_record(folder / "part.json", part.model_dump(mode="json"))
