"""The text in which tokens are counted: that of a run (prepared or not), of a configuration, or of files."""

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from data_scoring.base.field_types import normalised
from data_scoring.base.progress import Progress
from data_scoring.config import SourceConfig
from data_scoring.corpus.corpus import Corpus
from data_scoring.corpus.source_token_counts import count_sources
from data_scoring.corpus.sources import Rejects, find_source, read_documents
from data_scoring.corpus.token_counts import SourceCounts, count_corpus, texts_of
from data_scoring.corpus.tokenise import TokenizerFile
from data_scoring.tokenizer.tokenizer import read_tokenizer
from flows.cluster.engines import open_engine
from flows.run.config import EngineConfig, RunConfig, read_config
from flows.run.folder import read_run
from flows.run.locks import locked
from trainer.config import ModelConfig

# Up to this many files are one source each; more are one source together.
_MOST_SOURCES = 64


@dataclass(frozen=True)
class CountedText:
    """Text by source: read from `sources` or, if it is already tokenised, from `corpus`.

    model: the model of the text's configuration, None if there is none. engine: that of the configuration.
    """

    tokenizer_file: TokenizerFile
    sources: tuple[SourceConfig, ...]
    skip_bad: bool = False
    corpus: Corpus | None = None
    model: ModelConfig | None = None
    engine: EngineConfig = field(default_factory=EngineConfig)

    def count(self, folder: Path, progress: Progress) -> list[SourceCounts]:
        """Return the token counts of each source; partial counts are kept in `folder`."""
        with locked(folder), open_engine(self.engine, folder) as engine:
            if self.corpus is not None:
                return count_corpus(self.corpus, self.tokenizer_file.open().end_of_document, folder, engine, progress)
            return count_sources(self.sources, self.tokenizer_file, folder, self.skip_bad, engine, progress)

    def texts(self, name: str, rejects: Path, num_bytes: int, seed: int) -> Iterator[str]:
        """Yield texts of a source: all its documents or, if it is already tokenised, a random sample of its samples.

        Skipped records are listed in `rejects`.
        """
        if self.corpus is not None:
            return texts_of(self.corpus, name, self.tokenizer_file.open(), num_bytes, seed)
        [source] = [source for source in self.sources if source.name == name]
        return read_documents(source, Rejects(rejects, self.skip_bad))


def end_of_document(target: Path) -> str | None:
    """Return the end-of-document token that the configuration of `target` sets; None if it sets none."""
    config = _config_of(target)
    return None if config is None else config.tokenizer.end_of_document


def _config_of(target: Path) -> RunConfig | None:
    if (target / "run.yaml").is_file():
        return read_run(target).config
    return read_config(target, []) if target.suffix in (".yaml", ".yml") else None


def open_text(target: Path, tokenizer: TokenizerFile) -> CountedText:
    """Return the text of `target`: a run folder, a configuration, or a file, folder or glob of text.

    Raises ValueError if it cannot be read, or was tokenised with another tokenizer.
    """
    config = _config_of(target)
    if config is None:
        return CountedText(tokenizer, _sources(str(target)))
    if (target / "corpus" / "manifest.json").is_file():
        corpus = Corpus(target / "corpus")
        _check_tokenizer(corpus, tokenizer.path)
        return CountedText(tokenizer, config.corpus.sources, corpus=corpus, model=config.model, engine=config.engine)
    return _open_sources(config, tokenizer)


def _open_sources(config: RunConfig, tokenizer: TokenizerFile) -> CountedText:
    for source in config.corpus.sources:
        if find_source(source).kind == "megatron":
            raise ValueError(
                f"corpus.sources.{source.name}: is already tokenised; run `reprise prepare` and give the run folder"
            )
    skip_bad = config.corpus.on_bad_record == "skip"
    return CountedText(tokenizer, config.corpus.sources, skip_bad, model=config.model, engine=config.engine)


def _check_tokenizer(corpus: Corpus, path: Path) -> None:
    if read_tokenizer(corpus.tokenizer_path) != read_tokenizer(path):
        raise ValueError(
            f"{corpus.folder}: was tokenised with {corpus.tokenizer_path}, not with {path}; give that tokenizer, or "
            "the run's configuration to tokenise its text with this one"
        )


def _name_after(file: Path) -> str:
    """Return the name of a source that is named after `file`."""
    name = re.sub(r"[^\w.-]", "_", normalised(file.stem)).lstrip("_.-")
    return name.encode()[:190].decode(errors="ignore") or "text"


def _sources(path: str) -> tuple[SourceConfig, ...]:
    whole = SourceConfig(name="text", path=path)
    found = find_source(whole)
    if found.kind == "megatron":
        raise ValueError(f"{path}: is already tokenised; run `reprise prepare` on it and give the run folder")
    # A text file is one document, so several files are one source. In other formats each file is a source of documents.
    if len(found.names) > (1 if found.kind == "text" else _MOST_SOURCES):
        return (whole,)
    names = [_name_after(Path(file)) for file in found.names]
    if len(set(names)) < len(names):
        names = [f"{name}-{number}" for number, name in enumerate(names, start=1)]
    return tuple(SourceConfig(name=name, path=file) for name, file in zip(names, found.names, strict=True))
