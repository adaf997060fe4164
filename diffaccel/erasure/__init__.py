"""Concept erasure: closed-form edits of the projections that read text, their files, and their proof."""

from __future__ import annotations

from typing import Any

from diffaccel.edits.apply import applied_edits as applied_edits
from diffaccel.edits.apply import apply_edit as apply_edit
from diffaccel.edits.apply import remove_edit as remove_edit
from diffaccel.edits.concepts import Concept as Concept
from diffaccel.edits.concepts import ConceptList as ConceptList
from diffaccel.edits.concepts import ErasureError as ErasureError
from diffaccel.edits.concepts import ErasureWarning as ErasureWarning
from diffaccel.edits.concepts import LostKeep as LostKeep
from diffaccel.edits.concepts import UneditedControl as UneditedControl
from diffaccel.edits.concepts import WeakErasure as WeakErasure
from diffaccel.edits.concepts import read_concepts as read_concepts
from diffaccel.edits.edit import Edit as Edit
from diffaccel.edits.edit import load_edit as load_edit
from diffaccel.edits.edit import provide
from diffaccel.edits.effect import Effect as Effect
from diffaccel.edits.parts import EditError as EditError
from diffaccel.erasure.look import look_at
from diffaccel.erasure.settings import MACE as MACE
from diffaccel.erasure.settings import RECE as RECE
from diffaccel.erasure.settings import SPEED as SPEED
from diffaccel.erasure.settings import UCE as UCE
from diffaccel.erasure.settings import Context as Context
from diffaccel.erasure.settings import Settings as Settings
from diffaccel.erasure.solve import erase as erase


def _prove(pipe: Any, edit: Edit, **options: Any) -> Any:
    from diffaccel.erasure.proof.proving import prove  # noqa: PLC0415  (drawing is not needed to make or apply an edit)

    return prove(pipe, edit, **options)


provide("check", look_at)
provide("prove", _prove)
