"""What `reprise model` says."""

from pathlib import Path

import matplotlib.pyplot as plt
import pytest

from flows.cli.main import main
from flows.models.parameter_split import draw_split
from tests.flows.fakes import make_tokenizer
from trainer.config import ModelConfig
from trainer.presets import PRESETS


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip("|\n").split("|")]


def test_all_presets_are_listed_with_their_sizes(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["model"]) == 0
    lines = capsys.readouterr().out.splitlines()
    rows = {cells(line)[0]: cells(line)[1:] for line in lines[2:] if line.startswith("|")}
    assert rows.keys() == PRESETS.keys()
    # 1,033,246,720 parameters, of which 2 x 100,883 x 2048 in embedding and head; LLaMA 7B has 6,738,415,616.
    assert rows["pangu-pi-1b"] == ["12", "2,048", "16", "5,632", "2", "32", "100,883", "1,033.2", "40.0%"]
    assert rows["llama-7b"][-2:] == ["6,738.4", "3.9%"]


def test_a_configuration_s_model_is_described(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "x.yaml"
    path.write_text(
        "name: x\ncorpus: {sources: [{name: a, path: a.txt}]}\n"
        "tokenizer: {vocab_size: 1000}\nmodel: {preset: llama-2m, num_layers: 8}"
    )
    assert main(["model", str(path), "--set", "model.activation_terms=3"]) == 0
    out = capsys.readouterr().out
    parameters = 2 * 1000 * 128 + 8 * (4 * 128**2 + 3 * 128 * 512 + 2 * 128 + 6 * 512) + 128
    assert cells(out.splitlines()[2])[:-1] == [
        *("x", "8", "128", "4", "512", "3", "-", "*"),
        f"{parameters / 1e6:.1f}",
    ]
    assert "counted with 1,000 entries" in out


def test_parameters_are_counted_with_the_tokenizer_that_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_tokenizer(tmp_path / "tokenizer.json", 48_000)
    path = tmp_path / "x.yaml"
    path.write_text(
        "name: x\ncorpus: {sources: [{name: a, path: a.txt}]}\n"
        f"tokenizer: {{path: {tmp_path}/tokenizer.json}}\nmodel: {{preset: pangu-pi-1b-pro, vocab_size: null}}"
    )
    assert main(["model", str(path)]) == 0
    out = capsys.readouterr().out
    # As of the paper's model: 2 x 48,000 x 1792 in embedding and head of 995,604,736.
    assert cells(out.splitlines()[2])[-3:] == ["*", "995.6", "17.3%"]
    assert "counted with 48,000 entries" in out
    assert main(["model", str(path), "--vocab-size", "2048"]) == 0
    assert cells(capsys.readouterr().out.splitlines()[2])[-2:] == ["830.9", "0.9%"]


def test_the_split_is_drawn_for_several_vocabularies(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = tmp_path / "new" / "split.png"
    arguments = ["model", "pangu-pi-1b", "--vocab-size", "100883, 48000", "--figure", str(target)]
    assert main(arguments) == 0
    out = capsys.readouterr().out
    # 2 x 2048 weights for each of 52,883 entries less.
    assert cells(out.splitlines()[2])[-3:] == ["100,883", "1,033.2", "40.0%"]
    assert cells(out.splitlines()[3])[-3:] == ["48,000", f"{(1_033_246_720 - 2 * 2048 * 52_883) / 1e6:.1f}", "24.1%"]
    assert out.endswith(f"figure: {target}\n") and target.read_bytes().startswith(b"\x89PNG")
    model = ModelConfig(preset="pangu-pi-1b")
    figure = draw_split({"before": (model, 100_883), "after": (model, 48_000)})
    vocabulary, layers = figure.axes[0].containers
    assert [bar.get_width() for bar in vocabulary] == pytest.approx(
        [2 * 2048 * size / 1e6 for size in (100_883, 48_000)]
    )
    body = (1_033_246_720 - 2 * 2048 * 100_883) / 1e6
    assert [bar.get_width() for bar in layers] == pytest.approx([body, body])
    assert [bar.get_x() for bar in layers] == pytest.approx([bar.get_width() for bar in vocabulary])
    assert figure.axes[0].texts[0].get_text() == "40.0% of 1,033.2 M"
    plt.close(figure)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["llama", "--vocab-size", "9,x"], "error: --vocab-size: 'x' is not an integer; give"),
        (["llama", "--figure", "split.svg"], "error: --figure: 'split.svg' does not end in .png; name a PNG file"),
        (["gpt"], "error: model: 'gpt' is neither a file nor a preset; choose one of pangu-pi-1b, "),
        (["llama", "--set", "seed=1"], "error: --set: overrides need a configuration file; give one"),
        (["llama", "--vocab-size", "0"], "error: --vocab-size: 0 is too small; give 2 or more"),
    ],
)
def test_mistakes_are_one_line(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["model", *arguments]) == 1
    error = capsys.readouterr().err
    assert error.startswith(message)
    assert error.count("\n") == 1
