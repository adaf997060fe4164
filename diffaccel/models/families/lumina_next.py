"""Lumina-Next: rotary positions out of the embedding, attention scaled by the length of the picture."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from diffaccel.models.facts import IMAGE, MASKED, OWN_TABLES, Blocks, Family, Regions, Table


def keys_of_all_tokens(arguments: Mapping[str, Any], tokens: int, active: int, table: Table | None) -> dict[str, Any]:
    """Keys are rotated by the whole table, and attention is scaled by the length of the whole picture.

    The processor takes log(queries) / log(base) as scale; another base makes that log(tokens) / log(base).
    """
    changed = dict(arguments)
    if table is not None and changed.get("key_rotary_emb") is not None:
        changed["key_rotary_emb"] = table[0]
    base = changed.get("base_sequence_length")
    if base is not None:
        changed["base_sequence_length"] = math.exp(math.log(active) * math.log(base) / math.log(tokens))
    return changed


FAMILY = Family(
    network="LuminaNextDiT2DModel",
    blocks=Blocks((("layers", IMAGE),), "patch_embedder", head="norm_out"),
    image_attention=MASKED,
    merging=OWN_TABLES,
    regions=Regions((("layers", "attn1", False),), table_output=3, adapt=keys_of_all_tokens),
    routes="its text comes from a language model, which is not covered yet",
)
