"""`reprise import hf` and `reprise export hf`: models that come from Hugging Face and go there."""

import argparse
from pathlib import Path
from typing import Any


def add_hugging_face(commands: Any) -> None:
    """Add the commands to the parser's `commands`."""
    import_ = commands.add_parser("import", help="make a model of another library's one that runs can start from")
    formats = import_.add_subparsers(required=True, metavar="FORMAT")
    hf = formats.add_parser("hf", help="of a Hugging Face folder: Llama, Qwen2, Mistral, or one exported here")
    hf.add_argument("path", type=Path, metavar="PATH", help="folder with config.json, safetensors and a tokenizer")
    hf.add_argument(
        "--output", type=Path, metavar="FOLDER", help="model folder to make (default: models/ and the name of PATH)"
    )
    hf.add_argument("--end-of-document", metavar="TOKEN", help="token that ends a document (default: its eos_token)")
    hf.set_defaults(command=_import)
    export = commands.add_parser("export", help="make a folder of a trained model that another library opens")
    formats = export.add_subparsers(required=True, metavar="FORMAT")
    hf = formats.add_parser("hf", help="for Hugging Face transformers")
    hf.add_argument("place", type=Path, metavar="RUN", help="run folder, or a model folder")
    hf.add_argument("--round", type=int, help="round of the run whose model is meant (default: the last)")
    hf.add_argument(
        "--output", type=Path, metavar="FOLDER", help="folder to make (default: export/round-N in RUN, or export)"
    )
    hf.add_argument(
        "--dtype",
        default="keep",
        choices=("keep", "float32", "bfloat16"),
        help="what weights are stored in (default: what they are)",
    )
    hf.set_defaults(command=_export)


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
        print("open it with trust_remote_code=True: its modelling file is ours")
