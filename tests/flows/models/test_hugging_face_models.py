"""Import and export: bit-exact in both directions, equal logits, and refusals that leave nothing behind."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
import yaml
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from sentencepiece import SentencePieceTrainer
from torch import Tensor
from torch.distributed.checkpoint.filesystem import FileSystem

from benchmarks.plain_model import PlainModel, load_megatron_weights, read_checkpoint
from data_scoring.base.files import read_json, write_json
from data_scoring.corpus.corpus import Corpus
from flows.cli.main import main
from flows.models.hugging_face_models import export_model, import_model
from flows.run.config import parse_config
from flows.run.folder import open_run
from flows.run.stored_model import find_model
from tests.conftest import TINY_MODEL, Ranks, make_documents
from tests.hugging_face_models import MODELS, make_folder
from trainer.checkpoint_folder import list_checkpoints, read_checkpoint_record
from trainer.checkpoint_shapes import EMBEDDING, HEAD
from trainer.config import ModelConfig


def read_all(folder: Path) -> dict[str, Tensor]:
    """Return the tensors of a folder's safetensors files."""
    return {name: each for path in folder.glob("*.safetensors") for name, each in load_file(path).items()}


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        assert tensor.dtype == expected[name].dtype, name
        assert torch.equal(tensor, expected[name]), name


@pytest.mark.parametrize("name", MODELS)
def test_what_was_imported_is_exported_bit_for_bit(name: str, hugging_face: Path, tmp_path: Path) -> None:
    # Several files, with an index, of which transformers' one file knows nothing.
    made = export_model(hugging_face / f"{name}-imported", None, tmp_path / "out", shard_bytes=20_000)
    files = list((tmp_path / "out").glob("*.safetensors"))
    assert len(files) > 3
    assert all(file.stat().st_mode & 0o044 == 0o044 for file in files)
    assert_same(read_all(tmp_path / "out"), read_all(hugging_face / name))
    assert made.family == MODELS[name]["model_type"]
    # And the way back: the same checkpoint.
    import_model(tmp_path / "out", tmp_path / "in")
    before, after = find_model(hugging_face / f"{name}-imported"), find_model(tmp_path / "in")
    assert_same(read_checkpoint(after.checkpoint), read_checkpoint(before.checkpoint))
    assert (after.config, after.vocab_size, after.end_of_document) == (before.config, 300, "<|endoftext|>")


@pytest.mark.parametrize("name", MODELS)
def test_what_describes_a_model_survives_the_way_there_and_back(name: str, hugging_face: Path, tmp_path: Path) -> None:
    from transformers import AutoConfig, AutoTokenizer

    export_model(hugging_face / f"{name}-imported", None, tmp_path / "out", "bfloat16")
    before, after = (AutoConfig.from_pretrained(folder).to_dict() for folder in (hugging_face / name, tmp_path / "out"))
    # transformers has had them as words and as torch's types.
    dtypes = [str(each.pop("dtype")).removeprefix("torch.") for each in (before, after)]
    assert dtypes == ["bfloat16" if name == "mistral" else "float32", "bfloat16"]
    # Written in full.
    assert after.pop("head_dim") == before.pop("head_dim", 8)
    different = {field for field in before | after if before.get(field) != after.get(field)}
    assert different <= {"_name_or_path", "transformers_version"}
    assert {tensor.dtype for tensor in read_all(tmp_path / "out").values()} == {torch.bfloat16}
    assert AutoTokenizer.from_pretrained(tmp_path / "out").eos_token == "<|endoftext|>"


class TestImported:
    def test_a_window_is_told_of(self, hugging_face: Path) -> None:
        [note] = read_json(hugging_face / "mistral-imported" / "import.json")["notes"]
        assert note.startswith("sliding_window is 64: beyond that many tokens, this model attends to the whole sequ")

    def test_rows_that_pad_the_vocabulary_are_zeros(self, hugging_face: Path) -> None:
        embedding = read_checkpoint(find_model(hugging_face / "llama-imported").checkpoint)[EMBEDDING]
        assert embedding.shape == (384, 32)
        assert torch.equal(embedding[:301], read_all(hugging_face / "llama")["model.embed_tokens.weight"])
        assert not embedding[301:].any()


@pytest.fixture(scope="module")
def run(ranks: Ranks, trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder with the trained tiny model as its first round."""
    parent = tmp_path_factory.mktemp("runs")
    config = parse_config(
        {
            "name": "tiny",
            "output": str(parent),
            "corpus": {"sources": [{"name": "one", "path": "x"}], "seq_length": 32, "num_shards": 3},
            "model": TINY_MODEL.model_dump(),
        },
        "test",
    )
    folder = open_run(config).folder
    (folder / "corpus").symlink_to(ranks.corpus.folder)
    (folder / "rounds" / "1").mkdir(parents=True)
    (folder / "rounds" / "1" / "checkpoint").symlink_to(trained / "checkpoint")
    return folder


@pytest.fixture
def modules(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Keep code that comes with models out of the user's folder."""
    import transformers.dynamic_module_utils

    monkeypatch.setattr(transformers.dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))


@pytest.mark.usefixtures("modules")
def test_a_pangu_model_opens_with_the_modelling_file_and_gives_our_logits(
    run: Path, tmp_path: Path, tiny_corpus: Corpus, capsys: pytest.CaptureFixture[str]
) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    assert main(["export", "hf", str(run), "--round", "1", "--output", str(tmp_path / "out")]) == 0
    assert "open it with trust_remote_code=True" in capsys.readouterr().out
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", trust_remote_code=True)
    assert (type(model).__name__, model.config.max_position_embeddings) == ("RepriseForCausalLM", 32)
    checkpoint = list_checkpoints(run / "rounds" / "1" / "checkpoint")[-1]
    plain = PlainModel(TINY_MODEL, 300).eval()
    load_megatron_weights(plain, read_checkpoint(checkpoint))
    tokens = torch.randint(0, 300, (2, 32), generator=torch.Generator().manual_seed(4))
    with torch.no_grad():
        expected = plain.logits(tokens)
        torch.testing.assert_close(model(tokens).logits, expected, atol=1e-4, rtol=0)
        # With its cache, and the most probable token each time.
        generated = model.generate(tokens[:, :20], max_new_tokens=6, do_sample=False, eos_token_id=None)
        following = plain.logits(generated[:, :-1])[:, 19:].argmax(dim=-1)
    assert torch.equal(generated[:, 20:], following)
    # Made anew, its activation is silu, as Reprise's is before training.
    assert type(model)(model.config).model.layers[0].mlp.act_fn.scale[:, 5].tolist() == [1, 0, 0]
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out", trust_remote_code=True)
    assert (tokenizer.eos_token, tokenizer.model_max_length) == ("<|endoftext|>", 32)
    # Our own import takes it back.
    import_model(tmp_path / "out", tmp_path / "in")
    back = find_model(tmp_path / "in")
    assert back.config.model_dump(exclude={"init", "vocab_size"}) == TINY_MODEL.model_dump(
        exclude={"init", "vocab_size"}
    )
    before, after = read_checkpoint(checkpoint), read_checkpoint(back.checkpoint)
    for tensors in (before, after):
        tensors |= {name: tensors[name][:300] for name in (EMBEDDING, HEAD)}
    assert_same(after, before)


# Fields, and the family that they are written as.
SHAPES: list[tuple[dict[str, Any], str]] = [
    ({}, "llama"),
    ({"attention_bias": "qkv"}, "llama"),
    ({"attention_bias": "all", "ffn_bias": True}, "llama"),
    ({"attention_bias": "qkv", "ffn_bias": True, "tied_embeddings": True}, "llama"),
    ({"num_attention_heads": 6, "num_query_groups": 3, "head_size": 8}, "mistral"),
    ({"num_attention_heads": 6, "num_query_groups": 3, "head_size": 8, "attention_bias": "all"}, "reprise"),
    (
        {
            "activation_terms": 2, "activation_scales": "layer", "shortcut_reduction": 8, "shortcut_input": "residual",
            "attention_bias": "qkv", "ffn_bias": True,
        },
        "reprise",
    ),
]  # fmt: skip


@pytest.mark.usefixtures("modules")
@pytest.mark.parametrize(("fields", "family"), SHAPES)
def test_every_shape_is_written_as_what_transformers_has(
    fields: dict[str, Any], family: str, tiny_corpus: Corpus, tmp_path: Path
) -> None:
    """Opened, no tensor is missing and none is left over; imported again, all are what they were."""
    from transformers import AutoModelForCausalLM

    sizes = {"num_layers": 2, "hidden_size": 32, "num_attention_heads": 4, "num_query_groups": 2, "ffn_hidden_size": 64}
    model = ModelConfig(**{**sizes, **fields})
    weights = make_folder(model, tmp_path / "made", tiny_corpus.tokenizer_path)
    assert export_model(tmp_path / "made", None, tmp_path / "out").family == family
    opened, report = AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", trust_remote_code=family == "reprise", output_loading_info=True
    )
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert opened.config.architectures == [type(opened).__name__]
    import_model(tmp_path / "out", tmp_path / "in")
    back = find_model(tmp_path / "in")
    assert (back.config.attention_bias, back.config.ffn_bias) == (model.attention_bias, model.ffn_bias)
    tensors = read_checkpoint(back.checkpoint)
    for name, tensor in weights.items():
        rows = 300 if name in (EMBEDDING, HEAD) else None
        assert torch.equal(tensors[name][:rows], tensor[:rows]), name
    assert tensors.keys() == weights.keys()


def change_config(**fields: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        path = folder / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))

    return change


def change_tensors(change: Callable[[dict[str, Tensor]], None]) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        path = folder / "model.safetensors"
        tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}
        change(tensors)
        save_file(tensors, path)

    return write


def change_bytes(change: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        path = folder / "model.safetensors"
        path.write_bytes(change(path.read_bytes()))

    return write


def drop(tensors: dict[str, Tensor]) -> None:
    del tensors["model.layers.1.mlp.up_proj.weight"]


def cut(tensors: dict[str, Tensor]) -> None:
    tensors["model.layers.0.self_attn.k_proj.weight"] = tensors["model.layers.0.self_attn.k_proj.weight"][:8].clone()


def spoil(tensors: dict[str, Tensor]) -> None:
    tensors["model.layers.1.mlp.down_proj.weight"][3, 4] = float("nan")


def overflow(tensors: dict[str, Tensor]) -> None:
    tensors["lm_head.weight"][0, 0] = float("-inf")


def mix_types(tensors: dict[str, Tensor]) -> None:
    tensors["model.layers.1.self_attn.v_proj.weight"] = tensors["model.layers.1.self_attn.v_proj.weight"].bfloat16()


def use_integers(tensors: dict[str, Tensor]) -> None:
    tensors["model.norm.weight"] = tensors["model.norm.weight"].int()


def leave_a_pickle(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def point_elsewhere(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "other.safetensors")
    places = {"lm_head.weight": "../other.safetensors"}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))


def point_very_far(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    places = {"lm_head.weight": "x" * 5000}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))


def name_over_lines(tensors: dict[str, Tensor]) -> None:
    tensors["a\nb"] = torch.ones(2)


def add_float8_head(tensors: dict[str, Tensor]) -> None:
    tensors["lm_head.weight"] = tensors["lm_head.weight"].to(torch.float8_e4m3fn)


def point_wrongly(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "other.safetensors")
    places = {"model.norm.weight": "other.safetensors", "model.norm.bias": "other.safetensors"}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))


def take_another_tokenizer(folder: Path) -> None:
    content = json.loads((folder / "tokenizer.json").read_text())
    content["added_tokens"].append({**content["added_tokens"][0], "id": 300, "content": "<a>"})
    content["added_tokens"].append({**content["added_tokens"][0], "id": 301, "content": "<b>"})
    (folder / "tokenizer.json").write_text(json.dumps(content))


LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
REFUSED: list[tuple[Callable[[Path], Any], str]] = [
    (change_config(model_type="gpt2"), "config.json: model_type is 'gpt2'; only llama, qwen2, mistral, reprise can be"),
    (change_config(hidden_act="gelu"), "config.json: hidden_act is 'gelu'; only silu can be imported"),
    (change_config(quantization_config={"bits": 4}), "config.json: quantization_config is {'bits': 4}; only unqu"),
    (change_config(rope_parameters={"rope_type": "yarn", "rope_theta": 1e4}), "config.json: rope_parameters is of typ"),
    (change_config(rope_parameters=None, rope_scaling={"type": "linear", "factor": 2}), "config.json: rope_scaling is"),
    (change_config(rope_parameters={"rope_theta": 10000.5}), "config.json: rope_theta is 10000.5; only whole numbers "),
    (change_config(partial_rotary_factor=0.5), "config.json: partial_rotary_factor is 0.5; only 1, rotating all chann"),
    (
        change_config(rope_parameters={"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 2}),
        "config.json: low_freq_factor is 2; only 1 can be imported",
    ),
    (change_config(num_hidden_layers="2"), "config.json: num_hidden_layers is '2'; give a whole number"),
    (change_config(num_attention_heads=5, head_dim=None), "config.json: num_attention_heads: 5 does not divide hidden"),
    (change_config(num_hidden_layers=3), ": model.layers.2.self_attn.q_proj.weight is missing; config.json requir"),
    (change_config(num_hidden_layers=1), "model.safetensors: model.layers.1.input_layernorm.weight is not part of "),
    (change_config(intermediate_size=128), "mlp.gate_proj.weight is 64 x 32, but 128 x 32 according to config.json;"),
    (change_config(attention_bias=False), "model.layers.0.self_attn.k_proj.bias is not part of the model that config."),
    (change_config(tie_word_embeddings=True), "lm_head.weight differs from model.embed_tokens.weight, but config.js"),
    (change_config(attention_output_bias=False), "model.layers.0.self_attn.o_proj.bias is not zero; leave attention_o"),
    (change_config(model_type=["llama"]), "config.json: model_type is ['llama']; only llama, qwen2, mistral"),
    (change_config(rope_parameters={"rope_type": "llama3", **LLAMA3}), "config.json: factor is None; give llama3's sc"),
    (change_config(rope_parameters={"rope_theta": float("inf")}), "config.json: rope_theta is inf; only whole numbers"),
    (change_config(rope_parameters={"rope_theta": float("nan")}), "config.json: rope_theta is nan; only whole numbers"),
    (change_config(num_hidden_layers=0), "config.json: num_hidden_layers is 0; give one that is greater than"),
    (change_config(rms_norm_eps=2.5), "config.json: rms_norm_eps is 2.5; give one that is less than 1"),
    (change_config(num_key_value_heads=3), "config.json: num_key_value_heads: 3 does not divide num_attention_heads 4"),
    (change_config(eos_token_id=[5, 6]), "config.json: eos_token_id is 5, 6, but the end-of-sequence token of tokeniz"),
    (lambda folder: (folder / "config.json").write_text("{"), "config.json: not valid JSON"),
    (lambda folder: (folder / "config.json").write_text("[" * 99_999), "config.json: not valid JSON"),
    (lambda folder: (folder / "config.json").unlink(), "config.json: no such file; give a folder of a Hugging Face mo"),
    (change_tensors(drop), ": model.layers.1.mlp.up_proj.weight is missing; config.json requires it; download"),
    (change_tensors(cut), "model.safetensors: model.layers.0.self_attn.k_proj.weight is 8 x 32, but 16 x 32 accord"),
    (change_tensors(spoil), "model.safetensors: model.layers.1.mlp.down_proj.weight has values that are not finite; d"),
    (change_tensors(overflow), "model.safetensors: lm_head.weight has values that are not finite; download it again"),
    (change_tensors(mix_types), "self_attn.v_proj.weight is of type BF16 and model.layers.0.self_attn.q_proj.weight o"),
    (change_tensors(use_integers), "model.safetensors: model.norm.weight is of type I32; give one of F32, F16, BF16"),
    (change_bytes(lambda content: content[:-100]), "model.safetensors: not an intact safetensors file (Error while "),
    (change_bytes(lambda content: content + b"more"), "model.safetensors: not an intact safetensors file (Error while"),
    (change_bytes(lambda content: content.replace(b'"F32"', b'"F64"', 1)), "not an intact safetensors file (Error whi"),
    (change_bytes(lambda content: b""), "model.safetensors: not an intact safetensors file ("),
    (leave_a_pickle, "pytorch_model.bin: a pickle, which may run code when loaded, so it is refused; if you trust it"),
    (point_elsewhere, "index.json: lm_head.weight is in '../other.safetensors', which is not in the folder; download "),
    (point_wrongly, "other.safetensors: model.norm.bias is missing, though model.safetensors.index.json lists it;"),
    (lambda folder: (folder / "model.safetensors").unlink(), ": has neither model.safetensors nor model.safetensors.i"),
    (lambda folder: (folder / "tokenizer.json").unlink(), ": has neither tokenizer.json nor tokenizer.model; save one"),
    (change_config(vocab_size=10**30), "config.json: vocab_size is 1000000000000000000000000000000; give one that"),
    (change_config(intermediate_size=10**20), "config.json: intermediate_size is 100000000000000000000; give one that"),
    (change_config(rope_parameters={"full_attention": {"rope_type": "yarn"}}), "config.json: rope_parameters is {"),
    (change_tensors(name_over_lines), "model.safetensors: 'a\\nb' is not a valid tensor name; it was truncated"),
    (change_tensors(add_float8_head), "model.safetensors: lm_head.weight is of type F8_E4M3; give one of F32, F16, BF"),
    (point_very_far, "index.json: lm_head.weight is in 'xxxxxxxxxxxx"),
    (take_another_tokenizer, "tokenizer.json: has 302 entries, but model.embed_tokens.weight has 301 rows; it be"),
]  # fmt: skip


@pytest.mark.parametrize(("change", "message"), REFUSED, ids=[message for _, message in REFUSED])
def test_what_cannot_be_imported_is_named_in_a_line_and_leaves_nothing(
    change: Callable[[Path], Any], message: str, hugging_face: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = Path(shutil.copytree(hugging_face / "llama", tmp_path / "source"))
    change(source)
    (tmp_path / "made").mkdir()
    assert main(["import", "hf", str(source), "--output", str(tmp_path / "made" / "deeper" / "model")]) == 1
    error = capsys.readouterr().err
    assert error.startswith(f"error: {source}")
    assert message in error
    assert error.count("\n") == 1
    assert list((tmp_path / "made").iterdir()) == []


def test_what_cannot_be_exported_is_named_in_a_line_and_leaves_nothing(
    hugging_face: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = Path(shutil.copytree(hugging_face / "llama-imported", tmp_path / "source"))
    target = tmp_path / "made" / "out"
    (tmp_path / "made").mkdir()

    def export() -> str:
        assert main(["export", "hf", str(folder), "--output", str(target)]) == 1
        error = capsys.readouterr().err
        assert error.count("\n") == 1
        assert list((tmp_path / "made").iterdir()) == []
        return error

    fields = yaml.safe_load((folder / "model.yaml").read_text())
    (folder / "model.yaml").write_text(yaml.safe_dump({**fields, "ffn_hidden_size": 128}))
    assert "decoder.layers.mlp.linear_fc1.weight is 2 x 128 x 32, but 2 x 256 x 32 according to" in export()
    (folder / "model.yaml").write_text(yaml.safe_dump(fields))
    [part] = (folder / "checkpoint" / "step-00000000").glob("*.distcp")
    part.write_bytes(part.read_bytes()[:-1])
    assert "not an intact checkpoint" in export()
    shutil.rmtree(folder)
    shutil.copytree(hugging_face / "llama-imported", folder)
    take_another_tokenizer(folder)
    assert "tokenizer.json: has 302 entries, but the model's embedding has 301 rows; restore the tokenizer" in export()
    target.mkdir(parents=True)
    assert main(["export", "hf", str(folder), "--output", str(target)]) == 1
    assert "out: already exists; delete it, or name another folder with --output" in capsys.readouterr().err


@pytest.mark.usefixtures("modules")
def test_an_export_goes_into_the_run_and_says_that_its_round_has_not_ended(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = Path(shutil.copytree(run, tmp_path / "run"))
    record = list_checkpoints(copy / "rounds" / "1" / "checkpoint")[-1] / "reprise.json"
    content = read_json(record)
    write_json(record, {**content, "num_steps": content["step"] + 1000})
    assert main(["export", "hf", str(copy)]) == 0
    assert (copy / "export" / "round-1" / "model.safetensors").is_file()
    assert (
        f"note: this is step {content['step']} of {content['step'] + 1000:,}: its round has" in capsys.readouterr().out
    )


def test_code_that_comes_with_a_model_is_left_where_it_is(
    hugging_face: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = Path(shutil.copytree(hugging_face / "llama", tmp_path / "source"))
    (source / "evil.py").write_text("raise SystemExit('run')")
    for name in ("config.json", "tokenizer_config.json"):
        content = json.loads((source / name).read_text())
        code = {"auto_map": {"AutoConfig": "evil.Config"}, "tokenizer_class": "Evil"}
        (source / name).write_text(json.dumps({**content, **code}))
    assert main(["import", "hf", str(source), "--output", str(tmp_path / "in")]) == 0
    output = capsys.readouterr().out
    assert "note: auto_map is ignored: code that comes with a model is never run" in output
    assert "note: the code that tokenizer_config.json names is not used: the tokenizer is read from tokeni" in output
    export_model(tmp_path / "in", None, tmp_path / "out")
    assert not any("auto_map" in path.read_text() for path in (tmp_path / "out").glob("*.json"))
    assert not list((tmp_path / "out").glob("*.py"))
    config = read_json(tmp_path / "out" / "tokenizer_config.json")
    assert config == {"eos_token": "<|endoftext|>", "tokenizer_class": "PreTrainedTokenizerFast"}


def test_the_end_of_documents_is_the_one_asked_for(hugging_face: Path, tmp_path: Path) -> None:
    source = hugging_face / "llama"
    with pytest.raises(
        ValueError, match=rf"--end-of-document: '<end>' is not a token of {source}/tokenizer.json; name"
    ):
        import_model(source, tmp_path / "in", "<end>")
    # What a killed import left is in nobody's way.
    (tmp_path / ".in.tmp" / "checkpoint" / ".step-00000000.tmp").mkdir(parents=True)
    [note] = import_model(source, tmp_path / "in", "x").notes
    assert note == "'x' ends documents, but is not among config.json's eos_token_id [0]"
    assert not list(tmp_path.glob(".*"))
    stored = find_model(tmp_path / "in")
    assert stored.end_of_document == "x"
    assert read_checkpoint_record(stored.checkpoint)["vocab_size"] == stored.vocab_size == 300


@pytest.mark.parametrize("name", ["mistral", "qwen2"])
def test_a_model_stays_of_its_family_whatever_its_tokenizer(name: str, hugging_face: Path, tmp_path: Path) -> None:
    """Nor are fields added that it did not have, by which transformers would make another model of it."""
    source = Path(shutil.copytree(hugging_face / name, tmp_path / "source"))
    (source / "tokenizer_config.json").unlink()
    fields = read_json(source / "config.json")
    for field in ("sliding_window", "dtype"):
        fields.pop(field, None)
    (source / "config.json").write_text(json.dumps({**fields, "rms_norm_eps": None}))

    def widen(tensors: dict[str, Tensor]) -> None:
        tensors["model.norm.weight"] = tensors["model.norm.weight"].float()

    change_tensors(widen)(source)
    notes = import_model(source, tmp_path / "in").notes
    assert [note[:23] for note in notes] == (["sliding_window is 4096:"] if name == "mistral" else [])
    stored = find_model(tmp_path / "in")
    # By its id in config.json.
    assert (stored.end_of_document, stored.config.norm_epsilon) == ("<|endoftext|>", 1e-6)
    assert export_model(tmp_path / "in", None, tmp_path / "out").family == name
    assert_same(read_all(tmp_path / "out"), read_all(source))
    exported = read_json(tmp_path / "out" / "config.json")
    assert "sliding_window" not in exported
    # The embedding's would be bfloat16.
    assert exported["torch_dtype"] == "float32"


def test_a_sentencepiece_model_comes_back_as_it_came(hugging_face: Path, tmp_path: Path) -> None:
    source = Path(shutil.copytree(hugging_face / "llama", tmp_path / "source"))
    (source / "tokenizer.json").unlink()
    SentencePieceTrainer.train(
        sentence_iterator=iter(make_documents(50)), model_prefix=str(source / "tokenizer"), vocab_size=100,
        minloglevel=2, hard_vocab_limit=False,
    )  # fmt: skip
    change_config(eos_token_id=2)(source)
    decoder = {"2": {"content": "</s>"}}
    content = {"eos_token": {"content": "</s>"}, "chat_template": "{{ 1 }}", "added_tokens_decoder": decoder}
    (source / "tokenizer_config.json").write_text(json.dumps(content))
    [note] = import_model(source, tmp_path / "in").notes
    assert "entries, but the embedding has 301 rows: make sure" in note
    export_model(tmp_path / "in", None, tmp_path / "out")
    for name in ("tokenizer.model", "tokenizer_config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (source / name).read_bytes()
    assert not (tmp_path / "out" / "tokenizer.json").exists()
    # With code, it is written as any tokenizer of ours.
    (tmp_path / "in" / "original" / "tokenizer_config.json").write_text(json.dumps({**content, "auto_map": {"a": "b"}}))
    export_model(tmp_path / "in", None, tmp_path / "other")
    assert read_json(tmp_path / "other" / "tokenizer_config.json")["eos_token"] == "</s>"
    # What is added is not in the file.
    (source / "added_tokens.json").write_text(json.dumps({"<pad>": 300}))
    with pytest.raises(
        ValueError, match=r"tokenizer.model: lacks tokens that other files add to its .* entries, such as '<pad>'; open"
    ):
        import_model(source, tmp_path / "again")


def test_an_imported_model_is_pruned_with_its_vocabulary(
    hugging_face: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = hugging_face / "llama-imported"
    (tmp_path / "text.txt").write_text("\n".join(make_documents(20)))
    command = ["tokenizer", "compact", "--tokenizer", str(model / "tokenizer.json"), "--vocab-size", "280"]
    paths = ["--corpus", str(tmp_path / "text.txt"), "--checkpoint", str(model), "--output", str(tmp_path / "out")]
    assert main([*command, *paths]) == 0
    [checkpoint] = list_checkpoints(tmp_path / "out" / "checkpoint")
    assert f"checkpoint: {checkpoint}" in capsys.readouterr().out
    kept = pq.read_table(tmp_path / "out" / "vocabulary.parquet", filters=[("kept", "=", True)])
    kept = kept.sort_by("new_id")["id"].to_pylist()
    before, after = read_checkpoint(find_model(model).checkpoint), read_checkpoint(checkpoint)
    assert torch.equal(after[EMBEDDING][:280], before[EMBEDDING][kept])
    assert torch.equal(after[HEAD][:280], before[HEAD][kept])


@pytest.mark.parametrize("has_config", [True, False])
def test_a_sentencepiece_model_beside_a_tokenizer_comes_back(
    has_config: bool, hugging_face: Path, tmp_path: Path
) -> None:
    source = Path(shutil.copytree(hugging_face / "llama", tmp_path / "source"))
    (source / "tokenizer.model").write_bytes(b"the model that tokenizer.json was made of")
    if not has_config:
        (source / "tokenizer_config.json").unlink(missing_ok=True)
    import_model(source, tmp_path / "in", "<|endoftext|>")
    assert find_model(tmp_path / "in").tokenizer.name == "tokenizer.json"
    export_model(tmp_path / "in", None, tmp_path / "out")
    assert (tmp_path / "out" / "tokenizer.model").read_bytes() == (source / "tokenizer.model").read_bytes()
    assert (tmp_path / "out" / "tokenizer.json").is_file()


def test_a_full_disk_is_told_in_a_line(
    hugging_face: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    @contextmanager
    def full(_: object, path: str, mode: str) -> Iterator[Any]:
        with Path("/dev/full" if mode == "wb" else path).open(mode) as stream:
            yield stream

    monkeypatch.setattr(FileSystem, "create_stream", full)

    # What safetensors raises then; it must not be given that device, for it would put a file in its place.
    def fail(*_: object, metadata: dict[str, str]) -> None:
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr("safetensors.torch.save_file", fail)
    made = tmp_path / "made" / "model"
    for arguments, name in (
        (["import", "hf", str(hugging_face / "llama")], "checkpoint/step-00000000"),
        (["export", "hf", str(hugging_face / "llama-imported")], "model.safetensors"),
    ):
        assert main([*arguments, "--output", str(made)]) == 1
        error = capsys.readouterr().err
        assert error.startswith(f"error: {made}/{name}: No space left on device; free some space and run")
        assert error.count("\n") == 1
        assert list(tmp_path.iterdir()) == []
    file = hugging_face / "llama" / "config.json"
    assert main(["import", "hf", str(hugging_face / "llama"), "--output", str(file / "x")]) == 1
    error = capsys.readouterr().err
    assert error == f"error: {file}/x: Not a directory; part of this path is a file; name another folder\n"


MEMORY = """
import re, sys
from pathlib import Path
import torch, torch.distributed.checkpoint.state_dict_saver, torch.distributed.checkpoint.state_dict_loader
from flows.models.hugging_face_models import export_model, import_model
import trainer.hugging_face_weights

def peak():
    return int(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]) / 1024

folder = Path(sys.argv[1])
for work in (
    lambda: import_model(folder / "source", folder / "in"),
    lambda: export_model(folder / "in", None, folder / "out", shard_bytes=20_000_000),
):
    Path("/proc/self/clear_refs").write_text("5")
    before = peak()
    work()
    print(peak() - before)
"""


@pytest.mark.slow
def test_memory_holds_a_few_tensors_of_many_layers(tiny_corpus: Corpus, tmp_path: Path) -> None:
    """Of 290 MiB in 24 layers, whose largest tensor has 6 MiB: of export, a file of 19 MiB."""
    model = ModelConfig(num_layers=24, hidden_size=512, num_attention_heads=8, ffn_hidden_size=1408)
    make_folder(model, tmp_path / "made", tiny_corpus.tokenizer_path)
    export_model(tmp_path / "made", None, tmp_path / "source")
    command = [sys.executable, "-c", MEMORY, str(tmp_path)]
    imported, exported = map(float, subprocess.run(command, capture_output=True, text=True, check=True).stdout.split())
    assert (tmp_path / "source" / "model.safetensors").stat().st_size > 280 << 20
    print(f"import {imported:.0f} MiB, export {exported:.0f} MiB")
    assert imported < 60
    assert exported < 80
