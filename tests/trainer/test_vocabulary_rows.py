"""Checkpoints cut to a smaller vocabulary: rows in their new order, bit for bit, in a loadable checkpoint."""

import shutil
from io import BytesIO
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import BytesStorageMetadata

from benchmarks.plain_model import PlainModel, load_megatron_weights, read_checkpoint
from data_scoring.base.progress import silent
from data_scoring.config import CorpusConfig, SourceConfig, TokenizerConfig
from data_scoring.corpus.corpus import Corpus
from data_scoring.corpus.prepare_corpus import prepare_corpus
from data_scoring.tokenizer.token_coverage import choose_tokens
from data_scoring.tokenizer.vocabulary import open_vocabulary
from tests.conftest import TINY_MODEL, Ranks, make_documents
from tests.forked_ranks import forking
from trainer.checkpoint_folder import RECORD, find_damage, list_checkpoints, read_checkpoint_record
from trainer.vocabulary_rows import EMBEDDING, HEAD, check_rows, cut_checkpoint


@pytest.fixture
def checkpoint(trained: Path) -> Path:
    return list_checkpoints(trained / "checkpoint")[-1]


def test_rows_move_bit_for_bit_and_all_else_stays(checkpoint: Path, tmp_path: Path) -> None:
    kept = [*range(0, 40), *range(60, 110)]
    target = tmp_path / checkpoint.name
    cut_checkpoint(checkpoint, kept, 300, target)
    assert find_damage(target) is None
    record, before = read_checkpoint_record(target), read_checkpoint_record(checkpoint)
    assert (record["vocab_size"], record["step"], record["fingerprint"]) == (90, before["step"], before["fingerprint"])
    old, new = read_checkpoint(checkpoint), read_checkpoint(target)
    assert old.keys() == new.keys()
    for name in old:
        if name in (EMBEDDING, HEAD):
            assert new[name].shape == (128, TINY_MODEL.hidden_size)
            assert torch.equal(new[name][:90], old[name][kept])
            # No loss sees what pads them.
            assert not new[name][90:].any()
        else:
            assert torch.equal(new[name], old[name])
    # The optimizer's state, two moments and the weights once more, is what made it larger.
    sizes = [sum(file.stat().st_size for file in folder.iterdir()) for folder in (checkpoint, target)]
    assert sizes[1] < 0.3 * sizes[0]


def test_what_is_written_without_megatron_has_all_that_its_strict_load_requires(
    checkpoint: Path, tmp_path: Path
) -> None:
    cut_checkpoint(checkpoint, [*range(90)], 300, tmp_path / checkpoint.name)
    contents = []
    for folder in (checkpoint, tmp_path / checkpoint.name):
        metadata = FileSystemReader(folder).read_metadata()
        objects = {}
        for index, entry in metadata.storage_data.items():
            if isinstance(metadata.state_dict_metadata[index.fqn], BytesStorageMetadata):
                content = (folder / entry.relative_path).read_bytes()[entry.offset : entry.offset + entry.length]
                objects[index.fqn] = torch.load(BytesIO(content), weights_only=True)
        names = {name for name in metadata.state_dict_metadata if not name.startswith("optimizer.")}
        contents.append((names, {name: objects[name] for name in objects.keys() & names}))
    assert contents[0] == contents[1]
    # Of the four linear layers in each of the two layers.
    assert [*contents[1][1].values()] == [[None]] * 8


def test_checkpoints_that_do_not_fit_are_named(checkpoint: Path, tmp_path: Path) -> None:
    assert check_rows(checkpoint, 300) == 384
    with pytest.raises(ValueError, match=r"its embedding has 384 rows for 300 tokens, but the tokenizer has 385; "):
        cut_checkpoint(checkpoint, [0], 385, tmp_path / "cut")
    copy = Path(shutil.copytree(checkpoint, tmp_path / checkpoint.name))
    (copy / "__0_0.distcp").write_bytes(b"short")
    with pytest.raises(ValueError, match=r"not an intact checkpoint \(__0_0.distcp has 5 bytes instead of"):
        cut_checkpoint(copy, [0], 300, tmp_path / "cut")
    (copy / RECORD).unlink()
    with pytest.raises(ValueError, match=r"not an intact checkpoint \(it has no reprise.json\); give a step-… folder"):
        cut_checkpoint(copy, [0], 300, tmp_path / "cut")
    assert not (tmp_path / "cut").exists()


@pytest.mark.slow
def test_a_round_starts_from_a_cut_checkpoint_where_the_whole_model_left_off(
    checkpoint: Path, tiny_corpus: Corpus, tmp_path: Path
) -> None:
    """Its first losses are those of the whole model, renormalised over the tokens that are left."""
    vocabulary = open_vocabulary(tiny_corpus.tokenizer_path)
    counts = np.arange(300)
    kept = choose_tokens(vocabulary, counts, 280).kept
    vocabulary.save(kept, tmp_path / "tokenizer.json")
    cut_checkpoint(checkpoint, kept, 300, tmp_path / "step-00000043")
    (tmp_path / "text").mkdir()
    for number, document in enumerate(make_documents(100, 5)):
        (tmp_path / "text" / f"{number:03d}.txt").write_text(document)
    config = CorpusConfig(
        sources=(SourceConfig(name="text", path=str(tmp_path / "text")),), seq_length=32, num_shards=2,
        validation_fraction=0.1,
    )  # fmt: skip
    tokenizer = TokenizerConfig(path=str(tmp_path / "tokenizer.json"))
    prepare_corpus(config, tokenizer, 0, tmp_path / "corpus", "cut", silent)
    corpus = Corpus(tmp_path / "corpus")
    assert corpus.vocab_size == 280
    (tmp_path / "ranks").mkdir()
    folder = Ranks(corpus, tmp_path / "ranks", forking).train("cut", (2, 1, 1), start_from=tmp_path / "step-00000043")
    files = sorted((folder / "seen").glob("*.parquet"))
    seen = [row for file in files for row in pq.read_table(file).to_pylist() if row["step"] == 1]
    assert len(seen) == 8
    whole = PlainModel(TINY_MODEL, 300)
    load_megatron_weights(whole, read_checkpoint(checkpoint))
    logits: list[torch.Tensor] = []
    whole.head.register_forward_hook(lambda _module, _inputs, output: logits.append(output[0]))
    for row in seen:
        batch = corpus.read(np.array([row["shard"]]), np.array([row["sample"]]))
        num_tokens = int(batch.num_tokens[0])
        # The same tokens by their old numbers; what is gone is left out of the sum.
        tokens = torch.tensor(kept)[torch.tensor(batch.tokens[:, : num_tokens + 1])]
        with torch.no_grad():
            whole(tokens[:, :-1], tokens[:, 1:])
        logits_nv = logits.pop()
        losses = logits_nv[:, kept].logsumexp(1) - logits_nv.gather(1, tokens[0, 1:, None])[:, 0]
        assert row["loss"] == pytest.approx(losses.mean().item(), abs=1e-5)
