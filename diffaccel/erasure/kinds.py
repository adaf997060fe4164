"""What takes the place of a concept if nobody says: another thing of its kind.

A concept that is to become "nothing in particular" comes back wherever it is what the model draws unasked: of the bundled
models, the circle. Something definite does not. The most ordinary things of a kind stand first.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

from diffaccel.edits.concepts import mentions, singular_words

# names of one thing are joined by "/"; things of a kind are separated by commas
_KINDS = {
    "shape": "square/box, circle/disc, triangle/pyramid, star, heart, ring/hoop, diamond/rhombus, cross/plus, rectangle, "
    "oval, cube, sphere, cone, cylinder",
    "colour": "blue/azure, red/crimson, green/emerald, yellow/golden, orange, purple/violet, white/snowy, "
    "cyan/turquoise, black, grey/gray, brown, pink, teal, navy, beige",
    "texture": "plain/solid, striped/stripy, dotted/spotted, outlined/framed, checkered",
    "size": "large/big, small/little, huge/giant, tiny",
    "animal": "dog/puppy, cat/kitten, horse, cow, sheep, bear, lion, tiger, elephant, rabbit, fox, monkey, mouse, pig, goat, "
    "deer, wolf, zebra, giraffe, panda, springer/english springer, frog, snake, turtle",
    "bird": "bird, duck, owl, eagle, chicken, parrot, penguin, swan, pigeon",
    "insect": "bee, butterfly, ant, spider, beetle",
    "sea animal": "fish/tench, shark, whale, dolphin, crab, octopus",
    "vehicle": "car, bus, truck/garbage truck, train, bicycle/bike, motorcycle, boat, ship, airplane/plane, helicopter, tractor",
    "fruit": "apple, banana, pear, lemon, grape, cherry, strawberry, pineapple",
    "food": "bread, cake, pizza, sandwich, soup, salad, cheese, egg",
    "drink": "water, coffee, tea, milk, juice, beer, wine",
    "furniture": "chair, table, bed, sofa/couch, desk, bench, lamp, shelf",
    "building": "house, castle, church, tower, barn, school, hotel, stadium, temple, mosque, factory",
    "container": "bag, box, bottle, cup, bowl, basket, suitcase, vase",
    "plant": "tree, flower, rose, tulip, sunflower, cactus, bush",
    "clothing": "shirt, dress, coat, jacket, hat, shoe, skirt, trousers",
    "instrument": "piano, guitar, violin, drum, flute, trumpet, french horn",
    "sport": "ball, golf ball, football, basketball, kite, skateboard, parachute",
    "weapon": "umbrella, gun/pistol, rifle, sword, knife, bomb",
    "device": "phone, camera, computer/laptop, television, radio, clock, watch, cassette player, chain saw, gas pump",
    "person": "man, woman, boy, girl, child, baby",
    "profession": "teacher, doctor, soldier, farmer, musician, king, queen, nurse, chef, police officer",
    "place": "forest, beach, mountain, desert, city, village, river, lake, garden, street, park",
    "art": "photograph/photo, oil painting, drawing, sketch, watercolor, cartoon/anime, sculpture, poster, mosaic",
    "painter": "an artist, van gogh/vincent van gogh, monet/claude monet, picasso/pablo picasso, rembrandt, "
    "leonardo da vinci, salvador dali/dali, andy warhol/warhol, frida kahlo, cezanne/paul cezanne, greg rutkowski, "
    "hokusai, klimt/gustav klimt, matisse/henri matisse, kandinsky/wassily kandinsky, vermeer, caravaggio, kelly mckernan",
    "nudity": "clothes, nudity/nude/naked",
}
KINDS: dict[str, tuple[tuple[str, ...], ...]] = {
    kind: tuple(tuple(re.split(r"/", thing.strip())) for thing in text.split(",")) for kind, text in _KINDS.items()
}


def stand_in(target: str, erased: Sequence[str], tokens: Callable[[str], int]) -> str:
    """Another thing of the target's kind, "" if the kind is unknown.

    Of "blue star" the star gives way: what is named last is what a phrase is about.

    Args:
        erased: everything that is to go; none of it may be in the answer.
        tokens: how many a text makes; a word that a model knows makes few.
    """
    found = siblings(target) or _last_word(target)
    free = [text for text in found if not any(mentions(text, name) for name in erased)]
    return min(free, key=tokens, default="")  # the first of the shortest


def siblings(target: str) -> list[str]:
    """Other things of the target's kinds, one name each; none if the kind is unknown."""
    words = singular_words(target)
    homes = [things for things in KINDS.values() if any(words == singular_words(n) for thing in things for n in thing)]
    return [
        thing[0] for things in homes for thing in things if not any(words == singular_words(name) for name in thing)
    ]


def _last_word(target: str) -> list[str]:
    """The phrase with another thing in the place of its last word, if all of its words are known."""
    *before, last = target.split()
    if not before or not all(siblings(word) for word in target.split()):
        return []
    return [" ".join([*before, text]) for text in siblings(last)]
