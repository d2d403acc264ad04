"""configs/pangu-pi-1b-pro.yaml and configs/pangu-pi-1.5b-pro.yaml: the paper's settings, each with its source."""

import re
from pathlib import Path

import pytest

from flows.run.config import read_config

FILES = {"1b": Path("configs/pangu-pi-1b-pro.yaml"), "1.5b": Path("configs/pangu-pi-1.5b-pro.yaml")}
_SOURCE = re.compile(r"(known \((paper|repository|table)(, (paper|repository|table))*\)|guess: \S|yours|no effect)")


@pytest.mark.parametrize("name", FILES)
def test_every_line_says_what_is_known_and_what_is_a_guess(name: str) -> None:
    for line in FILES[name].read_text().splitlines():
        setting, _, comment = line.partition("  # ")
        if line.lstrip().startswith("#") or setting.rstrip().endswith(":"):
            continue
        assert _SOURCE.match(comment.strip()), line


@pytest.mark.parametrize(
    ("name", "shape", "parameters"),
    [("1b", (1792, 21, 14, 4864), 990_981_376), ("1.5b", (2048, 22, 16, 6912), 1_500_080_128)],
)
def test_settings_are_the_paper_s(name: str, shape: tuple[int, ...], parameters: int) -> None:
    config = read_config(FILES[name], [])
    model, train, refine = config.model, config.resolved_train, config.refine
    assert (model.hidden_size, model.num_layers, model.num_attention_heads, model.ffn_size) == shape
    assert (model.vocab_size, model.num_parameters(48_000)) == (48_000, parameters)
    assert (model.init, model.activation_terms, model.shortcut_reduction) == ("constant", 1, None)
    assert (config.corpus.seq_length, train.global_batch_size * config.corpus.seq_length) == (2048, 2 << 20)
    assert train.lr == pytest.approx(1e-4 * 2.097152**0.5)
    assert (train.min_lr, train.warmup_fraction, train.clip_grad) == (1e-5, 0.03, 1.0)
    assert (train.adam_beta1, train.adam_beta2, train.weight_decay) == (0.9, 0.95, 0.1)
    assert (refine.policy, refine.batch_size, refine.draw_temperature) == ("loss_batch", train.global_batch_size, 1)
    assert (refine.within, config.rounds.num_parts, refine.keep_batches) == ("part", 8, True)
    assert (refine.sampling_rate, refine.outlier_z, config.rounds.num_rounds) == (0.5, None, 2)


def test_the_two_differ_in_shape_and_name_alone() -> None:
    one, other = (read_config(path, []).model_dump() for path in FILES.values())
    assert {section for section in one if one[section] != other[section]} == {"name", "model"}
    differing = {field for field in one["model"] if one["model"][field] != other["model"][field]}
    assert differing == {"hidden_size", "num_layers", "num_attention_heads", "ffn_hidden_size"}
