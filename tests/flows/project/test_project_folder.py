"""What `reprise init` writes works as it is, and nothing that exists is lost."""

import ast
import importlib.util
import re
from pathlib import Path

import pytest
import yaml

from data_scoring.corpus.prepare_corpus import check_corpus
from flows.cli.main import main
from flows.project.project_folder import make_project
from flows.run.config import RunConfig, read_config
from tests import ROOT

FILES = {".gitignore", "data/sample.jsonl", "mine.yaml", "prefect.toml", "prefect.yaml"}
EXAMPLES = {f"configs/{path.name}" for path in (ROOT / "configs").iterdir()}
PAGES = {f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md")}
# Settings that the configuration offers in comments.
OFFERED = re.compile(r"^( *)# (- \{|preset: |path: )", re.MULTILINE)


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    make_project(tmp_path / "project")
    monkeypatch.chdir(tmp_path / "project")
    return tmp_path / "project"


def test_a_folder_has_the_files_of_the_checkout(tmp_path: Path) -> None:
    written = make_project(tmp_path)
    assert {str(path) for path in written} == FILES | EXAMPLES | PAGES
    assert {path for path in tmp_path.rglob("*") if path.is_file()} == {tmp_path / path for path in written}
    for name in EXAMPLES | PAGES | {"prefect.yaml", "prefect.toml"}:
        assert (tmp_path / name).read_text() == (ROOT / name).read_text()
    assert "runs/" in (tmp_path / ".gitignore").read_text().split()


def test_the_configuration_can_be_run(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = read_config(Path("mine.yaml"), [])
    check_corpus(config.corpus, config.tokenizer)
    assert main(["run", "mine.yaml", "--dry-run"]) == 0
    assert str(project / "runs" / "mine") in capsys.readouterr().out
    assert not (project / "runs").exists()


def test_every_setting_in_a_comment_is_valid(project: Path) -> None:
    text = (project / "mine.yaml").read_text()
    assert len(OFFERED.findall(text)) == 3
    offered = yaml.safe_load(OFFERED.sub(r"\1\2", text))
    assert [source["name"] for source in offered["corpus"]["sources"]] == ["sample", "books"]
    # A preset takes the place of the shape.
    offered["model"] = {"preset": offered["model"]["preset"]}
    assert RunConfig.model_validate(offered).model.num_layers == 21


def test_the_deployments_need_no_checkout(project: Path) -> None:
    deployments = yaml.safe_load((project / "prefect.yaml").read_text())["deployments"]
    assert len(deployments) == 6
    for deployment in deployments:
        module, _, name = deployment["entrypoint"].rpartition(".")
        spec = importlib.util.find_spec(module)
        assert spec is not None
        assert spec.origin is not None
        tree = ast.parse(Path(spec.origin).read_text())
        assert name in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
        if "config" in deployment.get("parameters", {}):
            check_corpus(RunConfig.model_validate(deployment["parameters"]["config"]).corpus, RunConfig().tokenizer)


@pytest.mark.parametrize("name", [*sorted(FILES), "docs/configuration.md", "data", "configs"])
def test_a_file_that_exists_is_named_and_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str) -> None:
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text("mine")
    assert main(["init", str(tmp_path)]) == 1
    assert capsys.readouterr().err == (
        f"error: {tmp_path}: has {name} already; move it away, or choose another folder\n"
    )
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == [tmp_path / name]
    assert (tmp_path / name).read_text() == "mine"


def test_a_file_in_place_of_the_folder_is_an_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("mine")
    assert main(["init", str(tmp_path / "file")]) == 1
    assert capsys.readouterr().err == f"error: {tmp_path / 'file'}: is a file; choose another folder\n"


def test_the_next_commands_are_printed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["init", "my text"]) == 0
    said = capsys.readouterr().out
    assert "  cd 'my text'\n" in said
    assert "  reprise run mine.yaml " in said
    monkeypatch.chdir("my text")
    for path in sorted(Path().rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()
    assert main(["init", "."]) == 0
    assert "cd " not in capsys.readouterr().out
