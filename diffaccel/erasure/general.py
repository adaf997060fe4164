"""Everyday words that every edit preserves unless told otherwise: things, people, places, looks."""

GENERAL = tuple(
    sorted(
        text.strip()
        for text in """
        airplane, animal, apple, architecture, art, baby, bag, ball, banana, beach, bear, bed, bench, bicycle, bird, boat,
        book, bottle, bowl, boy, bread, bridge, building, bus, butterfly, cake, camera, car, castle, cat, chair, child,
        church, city, clock, clothes, cloud, coat, coffee, cow, cup, desert, desk, dog, door, dress, duck, elephant, face,
        farm, field, fire, fish, flower, food, forest, fox, fruit, furniture, garden, girl, glass, grass, guitar, hand, hat,
        helicopter, hill, horse, house, insect, island, jacket, kitchen, lake, lamp, landscape, leaf, lion, man, map, market,
        mirror, monkey, moon, mountain, mouse, ocean, office, orange, owl, park, pencil, person, phone, piano, pizza, plant,
        portrait, rabbit, rain, river, road, robot, rock, room, rose, sandwich, sea, sheep, ship, shirt, shoe, sky, snow,
        sofa, soup, square, stadium, star, statue, street, suitcase, sun, sunset, table, tea, tiger, toy, train, tree, truck,
        umbrella, village, wall, watch, water, waterfall, window, woman, wood, zebra,
        doctor, farmer, musician, soldier, teacher, king, queen, crowd, family, friends,
        black, blue, brown, green, grey, red, white, yellow, bright, dark, large, small, old, young, wooden, metal,
        abstract, cartoon, drawing, illustration, oil painting, photograph, sketch, watercolor, sculpture, poster,
        a cup of coffee on a table, a man riding a horse, a woman in a red dress, a dog running on the beach,
        a street in the rain at night, a bowl of fruit, mountains behind a lake, a child with a balloon, a photo of a cat,
        a house with a garden, people walking in a city, a close-up of a flower, an old book on a shelf,
        a train crossing a bridge, a portrait of an old man
        """.split(",")
    )
)
