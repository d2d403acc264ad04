"""What a configuration refuses, and how it says so."""

import json
import re
import unicodedata
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from pydantic import BaseModel

from data_scoring.base.field_effects import section_of
from data_scoring.base.files import fingerprint
from flows.cli.main import main
from flows.run.allowed_paths import check_paths
from flows.run.config import (
    LaunchConfig,
    RunConfig,
    differences,
    flatten,
    override,
    parse_config,
    read_config,
)
from flows.run.config_docs import PATH, page
from flows.stages.train import training_inputs

VALUES = {"name": "x", "corpus": {"sources": [{"name": "a", "path": "a.jsonl"}]}}


@pytest.mark.parametrize(
    ("text", "overrides", "message"),
    [
        ("refine: {sampling_rat: 0.3}", [], "refine.sampling_rat: unknown field; did you mean sampling_rate?"),
        ("corpus: {sources: [{name: a, path: b, pth: c}]}", [], "sources.0.pth: unknown field; did you mean path?"),
        ("", ["refine.sampling_rate=0"], "refine.sampling_rate: input should be greater than 0 (it is 0); correct it"),
        ("", ["refine.sampling_rate=1.5"], "refine.sampling_rate: input should be less than or equal to 1 (it is 1.5)"),
        ("", ["score.budget=prefix:0"], "score.budget: should be full, seen, auto, or prefix:P with P of 1"),
        ("", ["score.budget=prefix:257"], "score.budget: prefix:257 is more than the corpus.seq_length of 256; lower"),
        ("", ["refine=2"], "refine: input should be a valid dictionary"),
        ("", ["refine.policy=hardest"], "refine.policy: input should be 'loss', 'loss_batch', 'top', 'band', "),
        ("", ["seed"], "--set seed: not FIELD=VALUE"),
        ("", ["tokenizer.path=@x"], "--set tokenizer.path=@x: not valid YAML (line 1, column 1: found"),
        ("", ["model.num_attention_heads=3"], "model.num_attention_heads: 3 does not divide hidden_size 128"),
        ("", ["parallel.tensor=3"], "parallel.tensor: 3 does not divide model.num_attention_heads 4; choose a divisor"),
        ("", ["parallel.pipeline=3"], "parallel.pipeline: 3 does not divide model.num_layers 4; choose a divisor"),
        ("", ["parallel.data=3"], "train.global_batch_size: 16 is not a multiple of train.micro_batch_size 2 x"),
        ("", ["train.lr=fast"], "train.lr: input should be a valid number"),
        ("", ["train.lr={rule: scaled, increment_rat: 1}"], "train.lr.increment_rat: unknown field; did you mean incr"),
        ("", ["train.global_batch_tokens=4000"], "train.global_batch_tokens: 4000 is not a multiple of corpus.seq_"),
        ("", ["train.lr={rule: scaled}", "train.min_lr=0.01"], "train.lr: 6.4e-06 for batches of 4096 tokens is not"),
        ("", ["score.budget=seen", "train.max_tokens=9"], "score.budget: 'seen' has no losses for samples that train"),
        ("name: [", [], "not valid YAML"),
        ("", ["corpus.sources.1.path=b"], "1 is no entry of corpus.sources, which has 1 entry; give a number from 0"),
        ("", ["corpus.sources.-1.path=b"], "-1 is no entry of corpus.sources, which has 1 entry"),
        ("", ["corpus.sources.a.path=b"], "a is no entry of corpus.sources, which has 1 entry"),
        ("", ["refine.sources.0.at_most=1"], "0 is no entry of refine.sources, which has 0 entries; give the whole"),
        ("", ["eval.tasks.0.1=b"], "0 is no entry of eval.tasks, which has 0 entries"),
        ("", ["eval.training_tasks.0.1=b"], "0 is not a section; name a field such as"),
        ("", ["corpus.sources.0.pth=b"], "corpus.sources.0.pth: unknown field; did you mean path?"),
        ("", ["launch.slurm.time_limit=soon"], "launch.slurm.time_limit: should be a time such as 90, 12:00:00 or 2-"),
        ("", ["launch.slurm.options=[--output=x]"], "launch.slurm.options.0: should be an option of sbatch that"),
        ("name: x\n# \x07\nseed: 1\n", [], "config.yaml: not valid YAML (line 2: control characters are not allowed)"),
        ("- a", [], "not a configuration"),
        ("", ['output="a\\0b"'], "line 1: the control character '\\x00' in a text; remove it"),
        ("name: ../up", [], "name: should begin with a letter or digit, of any script, and have"),
        ("", ["launch.nodes=2"], "launch.nodes: 2 nodes with an equal number of processes each do not match the 1"),
        ("", ["launch.nodes=2", "parallel.data=2"], "launch.rendezvous: not set, but several nodes need it; give this"),
        ("", ["launch.kind=slurm"], "device: 'auto' cannot detect the nodes' devices with launch.kind slurm"),
        ("", ["launch.kind=pbs"], "launch.kind: input should be 'local', 'slurm' or 'ray' (it is 'pbs')"),
        ("", ["score.budget=seen", "refine.policy=forgetting"], "score.budget: 'seen' does not give the losses of"),
        ("", ["score.budget=prefix:8", "refine.min_tokens=9"], "score.budget: 'prefix:8' scores fewer tokens than"),
        ("refine: {sources: [{name: a, from_round: 2}]}", ["score.budget=seen"], "'seen' has no losses for sources"),
        ("", ["refine.policy=sql"], "refine.sql: policy sql needs an expression; give one"),
        ("", ["refine.policy=excess"], "refine.reference: policy excess needs a reference model's losses; name the"),
        ("", ["refine.sql=random()"], "refine.sql: random() in 'random()' is not allowed"),
        ("", ["refine.policy=band", "refine.drop_hardest=0.6"], "refine.drop_hardest: 0.6 and sampling_rate 0.5 add"),
        ("refine: {sources: [{name: b}]}", [], "refine.sources: 'b' is not a source; choose from a"),
        ("refine: {sources: [{name: a, from_round: 2}]}", [], "refine.sources: all sources join after round 1"),
        ("refine: {sources: [{name: a, at_least: 0.5, at_most: 0.1}]}", [], "at_least: 0.5 is above at_most 0.1"),
        ("", ["launch.address=head"], "launch.address: should be auto, local, or HOST:PORT, such as node1:6379"),
        ("", ["launch.resources.GPU=0"], "launch.resources.GPU: input should be greater than or equal to 0.0001"),
        ("", ["launch.rendezvous=host"], "launch.rendezvous: should be HOST:PORT, such as node1:29400"),
    ],
)  # fmt: skip
def test_mistakes_are_named(tmp_path: Path, text: str, overrides: list[str], message: str) -> None:
    path = tmp_path / "config.yaml"
    body = text if text.startswith(("name", "-")) else f"name: x\n{text}\n"
    if "corpus" not in body and not text.startswith(("name: [", "-")):
        body += "\ncorpus: {sources: [{name: a, path: a.jsonl}]}\n"
    path.write_text(body)
    with pytest.raises(ValueError) as error:
        read_config(path, overrides)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_a_missing_file_is_an_error_of_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", str(tmp_path / "none.yaml")]) == 1
    assert capsys.readouterr().err == (f"error: {tmp_path}/none.yaml: no such file; give a YAML configuration\n")


def test_only_what_changes_results_is_a_difference() -> None:
    old = parse_config(VALUES, "x")
    layout = {"device": "cpu", "parallel": {"tensor": 2}, "rounds": {"num_rounds": 5}}
    layout |= {"train": {"micro_batch_size": 1, "loss_kernel": "chunked"}, "score": {"loss_kernel": "reference"}}
    assert differences(old, parse_config({**VALUES, **layout}, "x")) == []
    changed = parse_config({**VALUES, "seed": 3, "train": {"lr": 0.01}}, "x")
    assert differences(old, changed) == [
        "seed: 0 there, 3 here",
        "train.lr: 0.002 there, 0.01 here",
        "train.min_lr: 0.0002 there, 0.001 here",
    ]


def test_a_run_of_an_earlier_version_is_not_trained_again() -> None:
    """0.3.0 gave these sections of the default configuration this fingerprint."""
    run = parse_config(VALUES, "x")
    assert fingerprint("train", *training_inputs(run)) == "c4a951c939500a77"
    another = parse_config({**VALUES, "model": {"start_from": "x"}}, "x")
    assert fingerprint("train", *training_inputs(another)) != "c4a951c939500a77"


def test_a_scaled_rate_follows_the_batch() -> None:
    """(batch / base)^r x base rate, at 64 samples of 256 tokens; a tenth of it at the end."""
    for rate, expected in ((1.0, 1e-4 * 0.016384), (0.5, 1e-4 * 0.128), (0.0, 1e-4)):
        values = {"lr": {"rule": "scaled", "increment_rate": rate}, "global_batch_tokens": 64 * 256}
        train = parse_config({**VALUES, "train": values}, "x").resolved_train
        assert train.global_batch_size == 64
        assert train.lr == pytest.approx(expected, rel=1e-12)
        assert train.min_lr == pytest.approx(expected / 10, rel=1e-12)


def test_every_field_is_described() -> None:
    def fields(schema: dict, prefix: str = "") -> list[str]:
        missing = []
        for name, field in schema["properties"].items():
            if "description" not in field and "$ref" not in field:
                missing.append(f"{prefix}{name}")
        return missing

    schema = RunConfig.model_json_schema()
    missing = fields(schema)
    for name, definition in schema["$defs"].items():
        # A tracker is its name, or a section.
        missing += fields(definition["anyOf"][-1] if "anyOf" in definition else definition, f"{name}.")
    assert missing == []


def test_the_demo_is_the_default_path() -> None:
    """The demo sets its corpus and its two processes; everything else it leaves at its default."""
    demo = read_config(Path("configs/demo.yaml"), [])
    default = RunConfig(name="demo", corpus=demo.corpus.model_copy())
    assert demo.model_copy(update={"requested_parallel": default.parallel}) == default
    assert (demo.parallel.pipeline, demo.parallel.world_size) == (2, 2)
    assert (demo.refine.policy, demo.refine.sampling_rate, demo.refine.draw_temperature) == ("loss", 0.5, 1.0)
    assert (demo.corpus.num_shards, demo.rounds.num_rounds) == (8, 2)


def test_the_readme_s_own_example_is_valid() -> None:
    example, small, asked, launches = re.findall(r"```yaml\n(.*?)```", Path("README.md").read_text(), re.DOTALL)
    values = yaml.safe_load(example)
    assert parse_config(values, "README.md").name == "mine"
    model = parse_config({**values, **yaml.safe_load(small), "parallel": {"tensor": 2}}, "README.md").model
    assert model.inherits and model.channels == 64
    asking = parse_config({**values, **yaml.safe_load(asked)}, "README.md").eval
    assert asking.tasks == ("paper",) and asking.removes
    for line in launches.splitlines():
        launch = parse_config({**values, "device": "cuda", **yaml.safe_load(line)}, "README.md").launch
        assert launch.nodes == 2
    for text in re.findall(r"```yaml\n(.*?)```", Path("docs/operation.md").read_text(), re.DOTALL):
        assert (
            parse_config(
                {**values, "model": {}, "parallel": {"tensor": 2}, **yaml.safe_load(text)}, "docs/operation.md"
            ).launch.nodes
            == 2
        )


@pytest.mark.parametrize(
    ("setting", "line"),
    [
        ("train.max_tokens=20000", "train.max_tokens: 20000 there, null here"),
        ("rounds.keep_optimizer=true", "rounds.keep_optimizer: true there, false here"),
        ("model.num_layers=1", "model.num_layers: 1 there, 4 here"),
        ("refine.policy=top", "refine.policy: 'top' there, 'loss' here"),
    ],
)
def test_values_that_differ_are_named_as_a_configuration_gives_them(setting: str, line: str) -> None:
    config = parse_config({**VALUES, "model": {"num_layers": 4}}, "test")
    assert line in differences(override(config, [setting]), config)


def test_every_field_is_documented() -> None:
    assert PATH.read_text() == page(), "run `python -m flows.run.config_docs`"
    for field in flatten(parse_config(VALUES, "x").model_dump()):
        name = re.sub(r"\.0$", "", field.replace("sources.0", "sources[]"))
        assert f"| `{name}` |" in page()


def test_paths_outside_of_what_is_allowed_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "here" / "link").mkdir(parents=True)
    (tmp_path / "here" / "link").rmdir()
    (tmp_path / "here" / "link").symlink_to(tmp_path)
    (tmp_path / "secret.txt").touch()
    (tmp_path / "here" / "texts").mkdir()
    (tmp_path / "here" / "texts" / "more").symlink_to(tmp_path)
    monkeypatch.chdir(tmp_path / "here")

    def config(source: str, **fields: object) -> RunConfig:
        return RunConfig.model_validate({"corpus": {"sources": [{"name": "a", "path": source}]}, **fields})

    allowed = [Path.cwd()]
    check_paths(config("data/*.jsonl"), allowed)
    check_paths(RunConfig(), allowed)
    for bad in (
        config("../a.jsonl"), config("/etc/passwd"), config("link/a.jsonl"), config("a.jsonl", output="/tmp"),
        config("l*/*.txt"), config("texts"), config("texts/*"),
        config("a.jsonl", tokenizer={"path": "../t.json"}),
    ):  # fmt: skip
        with pytest.raises(ValueError, match="lies outside the folders that flows may use"):
            check_paths(bad, allowed)
        check_paths(bad, [*allowed, Path("/")])
    for url in ("file:///etc/passwd", "~/a.jsonl", "zip://a::file:///b", "https://example.org/a.jsonl"):
        with pytest.raises(ValueError, match="is not a plain path"):
            check_paths(config(url), [Path("/")])


def test_a_run_without_a_name_is_called_after_what_decides_its_results() -> None:
    base = RunConfig()
    assert base.run_name == RunConfig(device="cpu", launch=LaunchConfig(max_restarts=0)).run_name
    assert base.run_name != RunConfig(seed=1).run_name
    assert base.folder == Path("runs") / base.run_name


def test_a_file_has_to_say_what_it_is_about(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text("seed: 1\n")
    with pytest.raises(ValueError, match=r"config.yaml: name: field required"):
        read_config(path, [])


@pytest.mark.parametrize(
    ("rounds", "refine", "within"),
    [
        ({}, {}, "shard"),
        ({"first_order": "random"}, {"policy": "top"}, "shard"),
        ({"first_order": "sources"}, {}, "part"),
        ({"first_order": "sources"}, {"policy": "top"}, "part"),
        ({"first_order": "sources"}, {"within": "shard"}, "shard"),
    ],
)
def test_the_draw_is_within_parts_where_round_1_reads_source_after_source(
    rounds: dict[str, str], refine: dict[str, str], within: str
) -> None:
    config = parse_config({**VALUES, "rounds": rounds, "refine": refine}, "x")
    assert config.refine.within == within
    assert parse_config(config.model_dump(mode="json"), "x") == config


LISTS = {
    "corpus.sources.0.path": ("other.jsonl", "a.jsonl"),
    "eval.tasks.1": ("boolq", "piqa"),
    "eval.training_tasks.0": ("boolq", "hellaswag"),
    "launch.slurm.options.0": ("--exclusive", "--mem=64G"),
    "model.inherit.layers.1": (3, 2),
    "refine.sources.0.at_most": (0.5, 1.0),
    "track.0.project": ("other", "reprise"),
}


@pytest.mark.parametrize("field", LISTS)
@pytest.mark.parametrize("is_stored", [False, True])
def test_an_entry_of_a_list_is_overridden_by_its_number(field: str, is_stored: bool, tmp_path: Path) -> None:
    new, old = LISTS[field]
    values = {
        **VALUES,
        "eval": {"tasks": ["boolq", "piqa", "c3"]},
        "launch": {"slurm": {"options": ["--mem=64G"]}},
        "model": {"inherit": {"from": "larger", "layers": [0, 2, 5, 7]}},
        "refine": {"sources": [{"name": "a"}]},
        "track": [{"name": "wandb"}],
    }
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(values))
    before = read_config(path, [])
    after = override(before, [f"{field}={new}"]) if is_stored else read_config(path, [f"{field}={new}"])
    changed = {
        name: (value, flatten(after.model_dump())[name])
        for name, value in flatten(before.model_dump()).items()
        if flatten(after.model_dump())[name] != value
    }
    assert changed == {field: (old, new)}


def test_every_list_is_tried() -> None:
    """`LISTS` has an entry of every field that is a list."""

    def lists(section: type[BaseModel], prefix: str) -> Iterator[str]:
        for name, field in section.model_fields.items():
            if "tuple" in str(field.annotation):
                yield f"{prefix}{name}"
            elif (inner := section_of(field.annotation)) is not None:
                yield from lists(inner, f"{prefix}{name}.")

    assert {*lists(RunConfig, "")} == {re.sub(r"\.\d.*", "", field) for field in LISTS}


NAMES = ["北京", "новости", "हिन्दी", "é", "e\N{COMBINING ACUTE ACCENT}", "٣", "Å.b_c-1", "x" * 200]


@pytest.mark.parametrize("name", NAMES)
def test_names_have_letters_of_any_script(name: str) -> None:
    """They are the same in whichever normal form they were typed."""
    rule = {"name": unicodedata.normalize("NFD", name), "at_most": 0.5}
    values = {"name": name, "corpus": {"sources": [{"name": name, "path": "a"}]}, "refine": {"sources": [rule]}}
    config = parse_config(values, "test")
    expected = unicodedata.normalize("NFC", name)
    assert [config.name, config.corpus.sources[0].name, config.refine.sources[0].name] == [expected] * 3


@pytest.mark.parametrize(
    "name", ["", ".", "..", "a/b", "a b", "a\\b", "-a", "_a", "\N{COMBINING ACUTE ACCENT}a", "a<b", "a'", 'a"',
             "a\n", "a\0", "\N{RIGHT-TO-LEFT OVERRIDE}a", "a\N{ZERO WIDTH SPACE}", "a|b", "a*", "a=b", "京" * 67, "🙂"],
)  # fmt: skip
@pytest.mark.parametrize("place", ["name", "corpus.sources.0.name"])
def test_other_names_are_refused_in_words(name: str, place: str) -> None:
    source = {"name": "a" if place == "name" else name, "path": "a"}
    with pytest.raises(ValueError) as error:
        parse_config({"name": name if place == "name" else "x", "corpus": {"sources": [source]}}, "test")
    message = str(error.value)
    assert message.startswith(f"test: {place}: should begin with a letter or digit") or "most 200 bytes" in message
    assert "pattern" not in message
    assert "\n" not in message


def test_patterns_are_said_in_words() -> None:
    """No field is checked by a regular expression that pydantic would show."""
    assert '"pattern": "' in json.dumps(RunConfig.model_json_schema())
    fields = [field for section in _sections(RunConfig) for field in section.model_fields.values()]
    assert not [field for field in fields if "pattern=" in str(field)]


def _sections(section: type[BaseModel]) -> Iterator[type[BaseModel]]:
    yield section
    for field in section.model_fields.values():
        if (inner := section_of(field.annotation)) is not None:
            yield from _sections(inner)


@pytest.mark.parametrize("name", ["demo.yaml", "configs/demo.yaml", "demo.yml"])
def test_a_missing_file_is_not_advised(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("configs").mkdir()
    with pytest.raises(ValueError, match=f"^{name}: no such file; give a YAML configuration$"):
        read_config(Path(name), [])
    (Path(name).parent / "demos.yaml").touch()
    with pytest.raises(ValueError, match=f"^{name}: no such file; did you mean {Path(name).parent / 'demos.yaml'}\\?$"):
        read_config(Path(name), [])
