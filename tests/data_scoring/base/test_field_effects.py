"""What marks of fields say: of a stage's fingerprint, and of what may change."""

from typing import Annotated

from pydantic import Field

from data_scoring.base.field_effects import FREE, Decides, Neutral, deciding, find_mark, is_free, section_of
from data_scoring.config import Config


class Part(Config):
    origin: str = Field(default="here", alias="from")
    jobs: Annotated[int, FREE] = 1


class Whole(Config):
    seed: int = 0
    limit: Annotated[int | None, Decides(("draw",))] = None
    terms: Annotated[int, Neutral(1)] = Field(default=1, ge=1)
    part: Part | None = None
    parts: tuple[Part, ...] = ()
    layout: Annotated[Part, FREE] = Part()
    look: Annotated[Part, Decides(unless=("origin", "there"))] = Part()


def test_a_stage_depends_on_what_decides_it() -> None:
    assert deciding(Whole(limit=3), "train") == {"seed": 0, "part": None, "parts": ()}
    assert deciding(Whole(limit=3), "draw") == {"seed": 0, "part": None, "parts": (), "limit": 3}
    assert deciding(Whole(terms=2), "train") == {"seed": 0, "part": None, "parts": (), "terms": 2}
    assert deciding(Whole(), "train", keep_neutral=True) == {"seed": 0, "part": None, "parts": (), "terms": 1}
    assert deciding(Part(), "train") == {"from": "here"}


def test_free_fields_are_found_in_sections_lists_and_under_aliases() -> None:
    names = ("seed", "limit", "terms", "part.from", "part.jobs", "parts.0.from", "parts.0.jobs", "layout.from")
    assert [name for name in names if is_free(Whole(), name)] == ["part.jobs", "parts.0.jobs", "layout.from"]
    assert find_mark(Whole, "layout.from") == ("layout", FREE)
    assert find_mark(Whole, "parts.jobs") == ("parts.jobs", FREE)
    assert find_mark(Whole, "seed") is None


def test_a_section_is_free_unless_a_field_of_it_says_otherwise() -> None:
    assert is_free(Whole(look=Part()), "look.from")
    assert not is_free(Whole(look={"from": "there"}), "look.jobs")


def test_sections_are_seen_through_what_holds_them() -> None:
    assert section_of(Part | None) is section_of(tuple[Part, ...]) is section_of(Annotated[Part, FREE]) is Part
    assert section_of(tuple[int, ...]) is None
