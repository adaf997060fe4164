"""The settings of the methods: frozen, validated, never clamped; an unknown name is refused."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from diffaccel.edits.concepts import ErasureError, describe_problem
from diffaccel.erasure.columns import Policy

Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NotNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]

TEMPLATES = ("{}", "a {}", "a photo of {}", "a picture of the {}", "an image with {} in it")
CONTEXTS = (
    "a photo of {}",
    "a picture of the {}",
    "an image with {} in it",
    "{} in the background",
    "a painting of {} and a tree",
    "two people next to {}",
)
# a thing and a look have other places in a sentence, and a concept may be either
SENTENCES = (
    *CONTEXTS,
    "a red {}",
    "a blue {}",
    "a small {}",
    "a large green {} on a table",
    "two white {} in a room",
    "a yellow {} and a tree",
    "a tree above a blue {}",
    "a {} square",
    "a {} star",
    "a {} house",
    "a small {} circle",
    "the {} car in a street",
    "a woman in a {} dress",
    "a tree and a {} flower",
    "a dog left of a {} ball",
)


class Settings(BaseModel):
    """What all methods share.

    Attributes:
        templates: prompts around the concept, each with one {}; their weights add up to 1.
        tokens: which rows of them are erased: "last" token of the phrase, its "span", the "tail" from there to the end of
            the sequence, "words" (everything but start token and paddings), "all" (but the start token), or the "context"
            (all but the phrase).
        paddings: how many paddings "tail", "all" and "context" take: the first ones, weighted to stand for all; None is all.
        keep_templates, keep_tokens: the same for what is preserved.
        named_templates: further sentences for your own keeps of up to three words, if these are not more than a hundred, and
            for other things of the concepts' kinds.
        projections: which cross-attention projections are edited, where there is a choice.
        general: also preserve the bundled list of everyday words (without those that name a target), and in "context" other
            things of the concepts' kinds.
        pooled: also edit the path of the pooled text; otherwise the edit lists it as a leak.
        balance: where several encoders share a row, scale their columns to one mean square before solving.
        t5_tokens: length to which prompts are padded for T5; None is the pipeline's own default.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    method: ClassVar[str]

    templates: tuple[str, ...] = TEMPLATES
    tokens: Policy = "last"
    paddings: Annotated[int, Field(ge=0)] | None = None
    keep_templates: tuple[str, ...] = ("{}",)
    keep_tokens: Policy = "last"
    named_templates: tuple[str, ...] = ()
    projections: Literal["keys", "values", "keys and values"] = "keys and values"
    general: bool = True
    pooled: bool = True
    balance: bool = True
    t5_tokens: Annotated[int, Field(ge=1)] | None = None

    @field_validator("templates", "keep_templates")
    @classmethod
    def _not_empty(cls, templates: tuple[str, ...]) -> tuple[str, ...]:
        if not templates:
            raise ValueError("needs at least one template")
        return templates

    @field_validator("templates", "keep_templates", "named_templates")
    @classmethod
    def _one_gap(cls, templates: tuple[str, ...]) -> tuple[str, ...]:
        for template in templates:
            if template.count("{}") != 1:
                raise ValueError(f"{template!r} must have exactly one {{}}")
        if len(set(templates)) < len(templates):
            raise ValueError("a template is listed twice")
        return tuple(sorted(templates))


class UCE(Settings):
    """Ridge regression (arXiv 2308.14761).

    Attributes:
        ridge: weight of staying near the original map; absolute as in the paper, or a share of the mean diagonal of the
            columns' second moment if `ridge_relative`.
        erase_weight, keep_weight: of a concept's columns and of a preserved column.
        named_weight: of all your keeps together against all everyday words together, where that is more than they weigh row
            by row; 0 makes no difference between them, as in the papers.
        keep_empty: preserve the start token and the centres of the empty prompt's rows, on which all guidance rests.
    """

    method: ClassVar[str] = "uce"

    ridge: Positive = 0.5
    ridge_relative: bool = False
    erase_weight: Positive = 1.0
    keep_weight: NotNegative = 1.0
    named_weight: NotNegative = 0.0
    keep_empty: bool = True


class RECE(UCE):
    """Ridge regression, hardened by erasing what a closed-form attack recovers (arXiv 2407.12383).

    Attributes:
        rounds: attacks that are found and erased; 0 is UCE.
        attack_ridge: regulariser of the attack; 0.1 to 0.001 in the paper, smaller is harder on everything.
        attack_tokens: rows of the bare concept that the attack wants back; all of them in the paper.
        norm_budget: attacks longer than this multiple of the longest row of any prompt at hand are left out.
        joint: solve again for everything from the original weights instead of editing the edited ones (the paper).
    """

    method: ClassVar[str] = "rece"

    ridge: Positive = 0.1
    rounds: Annotated[int, Field(ge=0, le=20)] = 1
    attack_ridge: Positive = 0.1
    attack_tokens: Policy = "all"
    norm_budget: Positive = 1.5
    joint: bool = True


class SPEED(Settings):
    """An edit inside the null space of what is preserved (arXiv 2503.07392).

    Attributes:
        threshold: eigenvalues of the mean second moment below it count as null; absolute as in the paper, or a share of
            the largest one if `threshold_relative`.
        directions: use this many directions instead of a threshold.
        ridge: rho of the paper; larger is weaker.
        strength: choose the ridge so that every concept is erased by at least this share, in (0, 1).
        prior_filter: preserve only what a trial edit would disturb more than average.
        augment, augment_directions: noisy copies per preserved row, along so many directions that projections ignore.
        centres: of the empty prompt's rows, which may not move at all, like the start token.
        seed: of the noise.
    """

    method: ClassVar[str] = "speed"

    projections: Literal["keys", "values", "keys and values"] = "values"
    threshold: Positive = 0.1
    threshold_relative: bool = False
    directions: Annotated[int, Field(ge=1)] | None = None
    ridge: Positive = 1.0
    strength: Annotated[float, Field(gt=0, lt=1)] | None = None
    prior_filter: bool = True
    augment: Annotated[int, Field(ge=0, le=1000)] = 10
    augment_directions: Annotated[int, Field(ge=1)] = 1
    centres: Annotated[int, Field(ge=1, le=64)] = 3
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0

    @model_validator(mode="after")
    def _one_way(self) -> SPEED:
        if self.directions is not None and self.model_fields_set & {"threshold", "threshold_relative"}:
            raise ValueError("give directions or a threshold, not both")
        if self.strength is not None and "ridge" in self.model_fields_set:
            raise ValueError("give a ridge or the strength it shall lead to, not both")
        return self


class MACE(UCE):
    """Closed-form refinement of the words around a concept (arXiv 2403.06135, its first stage).

    The paper leaves the phrase itself to LoRA training afterwards; `tokens="all"` sends it to the anchor as well. It takes
    all paddings; eight of them, which resemble the rest, keep a hundred concepts within a minute.
    """

    method: ClassVar[str] = "mace"

    templates: tuple[str, ...] = CONTEXTS
    tokens: Policy = "context"
    paddings: Annotated[int, Field(ge=0)] | None = 8
    keep_tokens: Policy = "words"
    ridge: Positive = 0.1


class Context(RECE):
    """Ridge regression on whole prompts: the form of UCE, on all the rows that carry a concept and all that must not move.

    In a causal text encoder every row after a word carries it, paddings included, and in another sentence a word has other
    rows. UCE, RECE and SPEED regress on a few rows of short phrases and miss these; MACE takes the surroundings, but not
    the phrase. Here every row of every context, the phrase included, goes to its counterpart with the anchor, every row
    of the other prompts stays, and each side has a total weight of its own. Without an anchor, another thing of the concept's
    kind takes its place if the kind is known (`diffaccel.erasure.kinds`), and else nothing: the sentence without the concept.
    So it does with the anchor "". Best with `prompts` of the kind that the model gets, and without the general list if these
    are about a small world of their own.

    Attributes:
        erase_weight: how much the concepts' rows weigh against the preserved ones, all together; 1 is the same. On the
            bundled model a quarter erases as much and spares more.
        rounds: of hardening, as in RECE; none by default. Three make attacks go several times as far and cost what is kept
            a little.
    """

    method: ClassVar[str] = "context"

    rounds: Annotated[int, Field(ge=0, le=20)] = 0

    templates: tuple[str, ...] = SENTENCES
    named_templates: tuple[str, ...] = SENTENCES
    tokens: Policy = "all"
    keep_tokens: Policy = "all"
    paddings: Annotated[int, Field(ge=0)] | None = 8
    ridge: Positive = 0.1
    erase_weight: Positive = 0.25
    named_weight: NotNegative = 1.0


METHODS: dict[str, type[Settings]] = {cls.method: cls for cls in (UCE, RECE, SPEED, MACE, Context)}


def settings_of(method: str | Settings, given: dict[str, Any]) -> Settings:
    """The settings of a method, validated.

    Raises:
        ErasureError: unknown method, unknown setting, or a value out of range.
    """
    if isinstance(method, Settings):
        if given:
            raise ErasureError(f"{', '.join(sorted(given))} given beside a complete {type(method).__name__}.")
        return method
    if method not in METHODS:
        raise ErasureError(f"there is no erasure method {method!r}: choose {', '.join(METHODS)}.")
    try:
        return METHODS[method](**given)
    except ValidationError as error:
        raise ErasureError(f"{method}: {describe_problem(error)}.") from None
