"""The text that tokens are counted in: a run's, prepared or not, a configuration's, or files."""

import hashlib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from data_scoring.base.progress import Progress
from data_scoring.config import SourceConfig
from data_scoring.corpus.corpus import Corpus
from data_scoring.corpus.sources import Rejects, check_source, matching_files, read_documents, resolve_format
from data_scoring.corpus.token_counts import SourceCounts, count_corpus, count_source, texts_of
from data_scoring.tokenizer.tokenizer import Tokenizer, read_tokenizer
from flows.run.config import RunConfig, read_config
from flows.run.folder import read_run
from flows.run.locks import locked
from trainer.config import ModelConfig

# Files that are one source each; more of them are one source all together.
_MOST_SOURCES = 64


@dataclass(frozen=True)
class CountedText:
    """Text by source: as `sources` say or, where it is tokenised already, as it lies in `corpus`.

    model: the model that the text's configuration names, None where there is no configuration.
    """

    tokenizer_path: Path
    tokenizer: Tokenizer
    sources: tuple[SourceConfig, ...]
    skip_bad: bool = False
    corpus: Corpus | None = None
    model: ModelConfig | None = None

    def count(self, folder: Path, progress: Progress) -> list[SourceCounts]:
        """Return the counts of each source; what was counted so far is kept in `folder`."""
        if self.corpus is not None:
            with locked(folder):
                return count_corpus(self.corpus, self.tokenizer.end_of_document, folder, progress)
        identity = hashlib.blake2b(read_tokenizer(self.tokenizer_path)).hexdigest()
        with locked(folder):
            return [
                count_source(source, self.tokenizer, identity, folder, self.skip_bad, progress)
                for source in self.sources
            ]

    def texts(self, name: str, rejects: Path, num_bytes: int, seed: int) -> Iterator[str]:
        """Yield texts of a source: all of its documents or, where they are tokenised, a random sample of their parts.

        What cannot be read is listed in `rejects`, where it is to be skipped.
        """
        if self.corpus is not None:
            return texts_of(self.corpus, name, self.tokenizer, num_bytes, seed)
        [source] = [source for source in self.sources if source.name == name]
        return read_documents(source, Rejects(rejects, self.skip_bad))


def end_of_document(target: Path) -> str | None:
    """Return the token that ends documents by what configures `target`; None where nothing says so."""
    config = _config_of(target)
    return None if config is None else config.tokenizer.end_of_document


def _config_of(target: Path) -> RunConfig | None:
    if (target / "run.yaml").is_file():
        return read_run(target).config
    return read_config(target, []) if target.suffix in (".yaml", ".yml") else None


def open_text(target: Path, tokenizer_path: Path, tokenizer: Tokenizer) -> CountedText:
    """Return the text of `target`: a run folder, a configuration, or a file, folder or glob of text.

    Raises ValueError where it cannot be read, or was tokenised with another tokenizer.
    """
    config = _config_of(target)
    if config is None:
        return CountedText(tokenizer_path, tokenizer, _sources(str(target)))
    if (target / "corpus" / "manifest.json").is_file():
        corpus = Corpus(target / "corpus")
        _check_tokenizer(corpus, tokenizer_path)
        return CountedText(tokenizer_path, tokenizer, config.corpus.sources, corpus=corpus, model=config.model)
    return _open_sources(config, tokenizer_path, tokenizer)


def _open_sources(config: RunConfig, tokenizer_path: Path, tokenizer: Tokenizer) -> CountedText:
    for source in config.corpus.sources:
        check_source(source)
        if resolve_format(source) == "megatron":
            raise ValueError(
                f"corpus.sources.{source.name}: is tokenised already; run `reprise prepare` and give the run folder"
            )
    skip_bad = config.corpus.on_bad_record == "skip"
    return CountedText(tokenizer_path, tokenizer, config.corpus.sources, skip_bad, model=config.model)


def _check_tokenizer(corpus: Corpus, path: Path) -> None:
    if read_tokenizer(corpus.tokenizer_path) != read_tokenizer(path):
        raise ValueError(
            f"{corpus.folder}: tokenised with another tokenizer ({corpus.tokenizer_path}) than {path}; give that one, "
            "or the run's configuration, whose text is then tokenised with this one"
        )


def _sources(path: str) -> tuple[SourceConfig, ...]:
    whole = SourceConfig(name="text", path=path)
    kind = resolve_format(whole)
    if kind == "megatron":
        raise ValueError(f"{path}: is tokenised already; run `reprise prepare` over it and give the run folder")
    files = matching_files(whole)
    # A text file is a document; of files with documents in them, each is a source.
    if len(files) > (1 if kind == "text" else _MOST_SOURCES):
        return (whole,)
    names = [re.sub(r"[^A-Za-z0-9_.-]|^[^A-Za-z0-9]", "_", Path(file).stem).lstrip("_.-") or "text" for file in files]
    if len(set(names)) < len(names):
        names = [f"{name}-{number}" for number, name in enumerate(names, start=1)]
    return tuple(SourceConfig(name=name, path=file) for name, file in zip(names, files, strict=True))
