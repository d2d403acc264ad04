"""The texts of the study's regimes, as JSON lines, from a folder with one JSON lines file for each source."""

import base64
import json
import random
from collections.abc import Callable
from pathlib import Path

Documents = dict[str, list[str]]

# Sources of noise; they are in the training text and not in what the study measures.
NOISE = "noise_"
_WORDS_CHANGED = 0.02


def read_documents(folder: Path) -> Documents:
    """Return the documents of each `.jsonl` file in `folder`, by its stem, in a random order that is always the same.

    Raises ValueError if there is none.
    """
    documents = {}
    for path in sorted(folder.glob("*.jsonl")):
        with path.open() as file:
            texts = [json.loads(line)["text"] for line in file]
        random.Random(path.stem).shuffle(texts)
        documents[path.stem] = texts
    if not documents:
        raise ValueError(f"{folder}: no .jsonl files; give a folder with one for each source, with a field text")
    return documents


def share_of(documents: Documents, share: float) -> Documents:
    """Return the first documents of each source that hold `share` of its characters, at least one."""
    return {source: up_to(texts, round(share * sum(map(len, texts)))) for source, texts in documents.items()}


def up_to(texts: list[str], characters: int) -> list[str]:
    """Return the first of `texts` that hold at most `characters`, at least one."""
    total, chosen = 0, []
    for text in texts:
        total += len(text)
        if chosen and total > characters:
            break
        chosen.append(text)
    return chosen


def skewed(documents: Documents, rare: int, rare_share: float) -> Documents:
    """Return the documents with the `rare` smallest sources cut to `rare_share` of all characters each."""
    sizes = {source: sum(map(len, texts)) for source, texts in documents.items()}
    smallest = sorted(sizes, key=sizes.__getitem__)[:rare]
    common = sum(sizes.values()) - sum(sizes[source] for source in smallest)
    each = round(rare_share * common / (1 - rare * rare_share))
    return {source: up_to(texts, each) if source in smallest else texts for source, texts in documents.items()}


def with_noise(documents: Documents, share: float) -> Documents:
    """Return the documents and four sources of noise, which together hold `share` of all characters.

    noise_shuffled: real documents with their words in random order; noise_boilerplate: the same notices again and
    again; noise_base64: random bytes; noise_duplicates: real documents with 2 % of their words changed.
    """
    clean = [text for texts in documents.values() for text in texts]
    each = round(sum(map(len, clean)) * share / (1 - share) / 4)
    makers: dict[str, Callable[[random.Random], str]] = {
        "shuffled": lambda chance: _shuffled(chance.choice(clean), chance),
        "boilerplate": _boilerplate,
        "base64": lambda chance: base64.b64encode(chance.randbytes(1500)).decode(),
        "duplicates": lambda chance: _nearly(chance.choice(clean), chance),
    }
    noise = {}
    for name, make in makers.items():
        chance, texts, total = random.Random(name), [], 0
        while total < each:
            texts.append(make(chance))
            total += len(texts[-1])
        noise[NOISE + name] = texts
    return {**documents, **noise}


def _words(text: str) -> list[str]:
    """Return a text's words or, where there are hardly any spaces, its characters."""
    words = text.split()
    return words if len(words) > len(text) / 20 else list(text)


def _shuffled(text: str, chance: random.Random) -> str:
    words = _words(text)
    chance.shuffle(words)
    return (" " if words and len(words[0]) > 1 else "").join(words)


def _nearly(text: str, chance: random.Random) -> str:
    words = _words(text)
    for place in range(len(words)):
        if chance.random() < _WORDS_CHANGED:
            words[place] = chance.choice(words)
    return ("" if len(words) == len(text) else " ").join(words)


def _boilerplate(chance: random.Random) -> str:
    lines = (
        "Copyright {} Example Corp. All rights reserved. See LICENSE file number {} for details.",
        "Accept all {} cookies | Reject {} | Privacy policy | Terms of use | Sign in | Subscribe to our newsletter",
        "Page {} of {}. Next page. Previous page. Back to the top. Share this page. Print this page.",
        "This message was generated automatically on day {} of year {}. Do not reply to this message.",
    )
    return "\n".join(chance.choice(lines).format(*chance.choices(range(1, 3000), k=2)) for _ in range(20))


def write_sources(documents: Documents, folder: Path) -> list[dict[str, str]]:
    """Write a JSON lines file for each source to `folder`, and return the sources of a configuration."""
    folder.mkdir(parents=True, exist_ok=True)
    sources = []
    for source, texts in documents.items():
        path = folder / f"{source}.jsonl"
        path.write_text("".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts))
        sources.append({"name": source, "path": str(path)})
    return sources
