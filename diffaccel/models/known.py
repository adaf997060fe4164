"""The families that are known, by the name of their network's class. A new family is a file, and a name in this list."""

from __future__ import annotations

from typing import Any

from diffaccel.models.facts import Family
from diffaccel.models.families import (
    auraflow,
    cogvideox,
    cogview4,
    dit,
    flux,
    flux2,
    hunyuan_dit,
    lumina2,
    lumina_next,
    pixart,
    qwen_image,
    sana,
    sd3,
    unet,
    wan,
    z_image,
)

KNOWN: dict[str, Family] = {
    module.FAMILY.network: module.FAMILY
    for module in (
        unet,
        sd3,
        flux,
        flux2,
        pixart,
        hunyuan_dit,
        lumina_next,
        lumina2,
        auraflow,
        sana,
        dit,
        qwen_image,
        z_image,
        cogview4,
        wan,
        cogvideox,
    )
}


def family_of(network: Any) -> Family:
    """The facts of a network; those of a class that nobody described are empty."""
    name = type(network).__name__
    return KNOWN.get(name, Family(name))
