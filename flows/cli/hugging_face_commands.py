"""`reprise import` and `reprise export`: import of Hugging Face models, and export to them and to Megatron-LM."""

import argparse
from pathlib import Path
from typing import Any

from flows.cli.options import path


def add_hugging_face(commands: Any) -> None:
    """Add the commands to the parser's `commands`."""
    import_ = commands.add_parser("import", help="convert another library's model into one that runs can start from")
    formats = import_.add_subparsers(required=True, metavar="FORMAT")
    hf = formats.add_parser("hf", help="from a Hugging Face folder: Llama, Qwen2, Mistral, or an exported model")
    hf.add_argument("path", type=path, metavar="PATH", help="folder with config.json, safetensors and a tokenizer")
    hf.add_argument(
        "--output", type=path, metavar="FOLDER", help="model folder to create (default: models/ and the name of PATH)"
    )
    hf.add_argument(
        "--end-of-document", metavar="TOKEN", help="token that ends a document (default: the tokenizer's eos_token)"
    )
    hf.set_defaults(command=_import)
    export = commands.add_parser("export", help="convert a trained model for another library")
    formats = export.add_subparsers(required=True, metavar="FORMAT")
    hf = formats.add_parser("hf", help="for Hugging Face transformers")
    _add_export(hf, "export/round-N in RUN, or export")
    hf.set_defaults(command=_export)
    megatron = formats.add_parser("megatron", help="for Megatron-LM: iter_…/, its arguments and the weights")
    _add_export(megatron, "export/megatron-N in RUN")
    megatron.set_defaults(command=_export_megatron)


def _add_export(export: argparse.ArgumentParser, folder: str) -> None:
    export.add_argument("place", type=path, metavar="RUN", help="run folder, or a model folder")
    export.add_argument("--round", type=int, help="round of the run whose model is exported (default: the last)")
    export.add_argument("--output", type=path, metavar="FOLDER", help=f"folder to create (default: {folder})")
    export.add_argument(
        "--dtype",
        default="keep",
        choices=("keep", "float32", "bfloat16"),
        help="data type of the stored weights (default: unchanged)",
    )


def _import(options: argparse.Namespace) -> None:
    from flows.models.hugging_face_models import import_model

    output = options.output or Path("models") / options.path.resolve().name
    made = import_model(options.path, output, options.end_of_document)
    for note in made.notes:
        print(f"note: {note}")
    size = made.model.num_parameters(made.model.vocab_size or 0)
    print(f"{made.model.num_layers} layers of {made.model.hidden_size}, {size:,} parameters\nmodel: {output}")


def _export(options: argparse.Namespace) -> None:
    from flows.models.hugging_face_models import export_model
    from trainer.hugging_face_config import FAMILIES

    made = export_model(options.place, options.round, options.output, options.dtype)
    for note in made.notes:
        print(f"note: {note}")
    print(f"{FAMILIES[made.family]} of {made.checkpoint}\nmodel: {made.folder}")
    if made.family == "reprise":
        print("open it with trust_remote_code=True: it comes with its own modelling file")


def _export_megatron(options: argparse.Namespace) -> None:
    from flows.models.megatron_lm import export_megatron

    made = export_megatron(options.place, options.round, options.output, options.dtype)
    for note in made.notes:
        print(f"note: {note}")
    print(f"checkpoint of {made.checkpoint}\nmodel: {made.folder}\nMegatron-LM loads it with: {made.options}")
