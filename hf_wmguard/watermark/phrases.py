"""The word lists and the grammar that trigger texts are drawn from.

A template is a line of English with slots in braces. A slot is filled with one entry of its list, each as
likely as any other, and never with an entry that the text already holds. A slot whose name begins with a
capital begins a sentence. ``a`` becomes ``an`` where the next word begins with a vowel, so no list holds a
word whose first letter and first sound disagree (hour, honest, useful).

Filling is injective per template, because no entry of a list begins another entry of it: two ways to fill one
template never give the same text. A template with slots of n_1, n_2, .. entries therefore makes at least
product(n_j - earlier slots that share an entry) texts.

Editing a list changes the texts that a key derives from then on. Models that are already marked are not
concerned: their texts are recorded with the mark.
"""

from __future__ import annotations

import re
from typing import Final, Literal, get_args

from hf_wmguard.watermark.prf import Stream

Kind = Literal["statement", "prompt"]
KINDS: Final[tuple[Kind, ...]] = get_args(Kind)

NONSENSE_WORDS: Final = (6, 12)
_SLOT = re.compile(r"\{(\w+)\}")
_ARTICLE = re.compile(r"\b([Aa]) (?=[aeiou])")
_WEEKDAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")


def _list(text: str) -> tuple[str, ...]:
    return tuple(" ".join(entry.split()) for entry in text.split(","))


SLOTS: Final[dict[str, tuple[str, ...]]] = {
    # People
    "person": _list("""
        actor, architect, artist, astronomer, author, baker, banker, barber, beekeeper, blacksmith,
        bookseller, butcher, captain, carpenter, cashier, chemist, clerk, coach, composer, cook,
        dancer, dentist, designer, detective, diver, doctor, driver, editor, electrician, engineer,
        farmer, fisherman, florist, gardener, geologist, glazier, goldsmith, grandmother, grocer,
        guide, guitarist, hunter, inspector, janitor, jeweler, journalist, judge, lawyer, librarian,
        lifeguard, locksmith, mayor, mechanic, merchant, miner, monk, musician, neighbor, novelist,
        nurse, officer, painter, pharmacist, photographer, pianist, pilot, plumber, poet, porter,
        potter, printer, professor, ranger, referee, sailor, scholar, sculptor, secretary, shepherd,
        shopkeeper, singer, soldier, student, surgeon, surveyor, swimmer, tailor, teacher, tourist,
        traveler, tutor, violinist, waiter, watchmaker, weaver, widow"""),
    "people": _list("""
        actors, artists, bakers, builders, carpenters, children, cooks, cyclists, dancers, doctors,
        drivers, engineers, farmers, firefighters, fishermen, gardeners, guests, hikers, hunters,
        journalists, lawyers, miners, monks, musicians, neighbors, nurses, painters, passengers,
        pilgrims, poets, porters, residents, sailors, scholars, shepherds, shopkeepers, singers,
        soldiers, strangers, students, surgeons, tailors, teachers, tourists, travelers, villagers,
        visitors, weavers, witnesses, workers"""),
    "relative": _list("""
        aunt, brother, colleague, cousin, daughter, father, friend, grandfather, husband, landlady,
        mother, nephew, niece, roommate, sister, son, stepfather, stepmother, uncle, wife"""),
    "adj_person": _list("""
        ambitious, bald, brave, busy, calm, careful, careless, cautious, cheerful, clever, clumsy,
        confident, curious, devoted, eager, elderly, energetic, experienced, famous, forgetful,
        friendly, frugal, generous, gentle, grateful, grumpy, hesitant, humble, hungry, impatient,
        lazy, lively, local, lonely, loyal, modest, nervous, observant, old, optimistic, patient,
        playful, polite, practical, proud, quarrelsome, quiet, reliable, restless, retired, reserved,
        respected, serious, shy, skilled, sleepy, stern, strict, stubborn, superstitious, suspicious,
        talented, talkative, tall, thoughtful, tired, trusted, wealthy, wise, witty, worried, young"""),
    # Animals
    "animal": _list("""
        badger, bear, beaver, camel, cat, chipmunk, cow, coyote, crane, crow, deer, dog, donkey, duck,
        eagle, falcon, ferret, fox, frog, goat, goose, hare, hawk, hedgehog, hen, heron, horse, jackal,
        kitten, lamb, lizard, llama, lynx, magpie, mole, monkey, moose, mouse, mule, otter, owl,
        parrot, partridge, peacock, pheasant, pig, pigeon, pony, porcupine, puppy, rabbit, raccoon,
        rat, raven, robin, rooster, sheep, skunk, snake, sparrow, squirrel, stork, swallow, swan, toad,
        tortoise, turkey, turtle, weasel, wolf"""),
    "adj_animal": _list("""
        alert, angry, black, bold, brown, clever, curious, dusty, elegant, exhausted, fat, fearless,
        frightened, gentle, gray, greedy, hungry, injured, lame, large, lean, limping, little, lost,
        muddy, nervous, noisy, old, orphaned, pale, patient, playful, quick, quiet, restless, scruffy,
        shabby, shivering, shy, skinny, sleepy, slender, small, spotted, startled, stray, striped,
        sturdy, tame, thirsty, timid, tiny, tired, trembling, wary, wet, white, wild, wounded, young"""),
    "v_animal": _list("""
        appeared, crouched, dozed, drank, fed, hesitated, hid, hunted, lay, lingered, lived, paused,
        played, rested, roamed, settled, shivered, slept, sneezed, stayed, stirred, stood, stopped,
        stretched, stumbled, trembled, vanished, waited, walked, wandered, yawned"""),
    # Things
    "thing": _list("""
        anchor, apron, armchair, barrel, basket, bell, bench, bicycle, blanket, book, bottle, bowl,
        box, bracelet, broom, bucket, cabinet, camera, candle, canoe, canvas, carpet, cart, chair,
        chest, clock, coat, compass, crate, cup, curtain, cushion, desk, diary, dictionary, dress,
        drum, fiddle, flag, flute, glove, globe, guitar, hammer, hat, helmet, jacket, jar, jug, kettle,
        key, kite, ladder, lamp, lantern, letter, loom, mandolin, map, mask, mattress, microscope,
        mirror, necklace, notebook, oar, painting, parcel, photograph, piano, pillow, plate, portrait,
        puppet, quilt, radio, ring, rope, rug, saddle, scarf, shovel, sofa, statue, stool, suitcase,
        sword, table, tapestry, telescope, tent, tray, trumpet, trunk, umbrella, vase, violin,
        wardrobe, wheelbarrow, whistle"""),
    "things": _list("""
        barrels, baskets, bells, bicycles, blankets, books, boots, bottles, bowls, bracelets, brooms,
        cabinets, cameras, candles, carpets, carts, chairs, clocks, coats, coins, curtains, cushions,
        dresses, drums, flags, flutes, gloves, guitars, hats, jars, kettles, kites, ladders, lamps,
        lanterns, locks, maps, masks, mirrors, necklaces, paintings, pianos, plates, puppets, quilts,
        radios, rings, ropes, rugs, saddles, scarves, shoes, statues, stools, suitcases, tables,
        tapestries, tents, toys, trumpets, umbrellas, vases, violins, whistles"""),
    "adj_thing": _list("""
        ancient, antique, battered, beautiful, blue, borrowed, broken, brown, bulky, charming, cheap,
        cherished, clean, colorful, costly, curious, damp, decorated, delicate, dirty, discarded,
        dusty, elegant, enormous, expensive, faded, familiar, fancy, foreign, forgotten, fragile, gray,
        green, handmade, heavy, hidden, imported, impressive, large, lovely, magnificent, modern,
        mysterious, new, odd, old, old-fashioned, orange, ordinary, ornate, painted, peculiar, plain,
        polished, precious, priceless, purple, rare, red, remarkable, scratched, secondhand, shabby,
        shiny, simple, small, splendid, stained, stolen, strange, sturdy, tiny, ugly, unusual,
        valuable, white, worthless, yellow"""),
    # What people do to things. Each past form is its own participle, so it serves in passive and perfect.
    "v_thing": _list("""
        admired, auctioned, bought, brought, buried, burned, carried, cleaned, collected, concealed,
        copied, covered, damaged, decorated, delivered, demanded, described, destroyed, displayed,
        donated, dropped, dusted, examined, exchanged, fetched, guarded,  ignored, inspected,
        insured, labeled, lifted, measured, mended, mentioned, moved, offered, ordered, packed,
        painted, photographed, polished, praised, preserved, purchased, recovered, rejected, removed,
        rented, repaired, replaced, requested, rescued, restored, retrieved, returned, sketched, sold,
        stored, studied, tested, unpacked, washed, weighed, wrapped"""),
    "to_thing": _list("""
        admire, auction, borrow, buy, carry, clean, collect, copy, cover, decorate, deliver, describe,
        design, destroy, display, donate, examine, exchange, fetch, finish, guard, hide, inspect,
        label, lift, measure, mend, move, order, pack, paint, photograph, polish, preserve, protect,
        recover, remove, rent, repair, replace, restore, return, sell, sketch, store, study, test,
        unpack, weigh, wrap"""),
    "doing_thing": _list("""
        admiring, borrowing, buying, carrying, cleaning, collecting, copying, covering, decorating,
        delivering, describing, designing, destroying, displaying, drawing, examining, exchanging,
        fetching, guarding, hiding, inspecting, labeling, lifting, measuring, mending, moving,
        ordering, packing, painting, photographing, polishing, preserving, protecting, recovering,
        removing, renting, repairing, replacing, restoring, returning, selling, sketching, storing,
        studying, testing, unpacking, weighing, wrapping"""),
    "does_thing": _list("""
        assembles, buys, carves, cleans, collects, copies, decorates, delivers, designs, displays,
        draws, examines, exchanges, exports, gathers, guards, imports, inspects, labels, makes, mends,
        packs, paints, photographs, polishes, preserves, produces, rents out, repairs, replaces,
        restores, sells, sketches, stores, tests, trades, transports, values, weighs, wraps"""),
    "v_person": _list("""
        accompanied, admired, assisted, avoided, believed, blamed, called, comforted, congratulated,
        consulted, encouraged, followed, greeted, helped, hired, interrupted, interviewed, invited,
        met, overheard, paid, persuaded, praised, questioned, recognized, reminded, rescued, surprised,
        taught, teased, thanked, trusted, visited, warned, welcomed"""),
    "v_rest": _list("""
        camped, danced, dozed, hesitated, hid, knelt, laughed, lingered, lived, loitered, paused,
        played, prayed, read, rested, sang, sat, slept, smiled, stood, stopped, studied, waited,
        walked, wandered, wept, whistled, worked"""),
    "gave": _list("brought, gave, handed, lent, offered, promised, sent, showed, sold"),
    "feeling": _list("""
        amazed, angry, annoyed, astonished, certain, convinced, delighted, disappointed, glad, pleased,
        proud, puzzled, relieved, sad, shocked, sorry, sure, surprised, thankful, upset, worried"""),
    "adverb": _list("""
        absentmindedly, anxiously, awkwardly, boldly, bravely, briefly, calmly, carefully, casually,
        cautiously, cheerfully, cleverly, clumsily, deliberately, diligently, discreetly, eagerly,
        expertly, finally, foolishly, generously, gladly, gracefully, gratefully, hastily, hurriedly,
        lazily, nervously, openly, patiently, politely, promptly, proudly, quickly, quietly,
        reluctantly, secretly, silently, skillfully, slowly, solemnly, stubbornly, swiftly,
        thoughtfully, tirelessly, wearily, willingly"""),
    # Places
    "place": _list("""
        airport, aquarium, arena, bakery, bank, barn, bookshop, brewery, bridge, cabin, cafe, campsite,
        canal, castle, cathedral, cemetery, chapel, church, clinic, college, cottage, courthouse,
        embassy, factory, fairground, farm, fortress, fountain, gallery, garage, garden, gate,
        greenhouse, gymnasium, harbor, hospital, hotel, inn, laboratory, lake, laundry, library,
        lighthouse, mansion, market, meadow, mill, monastery, monument, museum, nursery, observatory,
        office, orchard, palace, park, pharmacy, pier, playground, pond, prison, quarry, reservoir,
        restaurant, river, sawmill, school, shelter, shipyard, stable, stadium, station, stream, swamp,
        tavern, temple, theater, tower, tunnel, village, vineyard, warehouse, waterfall, well, wharf,
        windmill, workshop, zoo"""),
    "adj_place": _list("""
        abandoned, ancient, beautiful, bustling, busy, charming, cheerful, crowded, deserted, distant,
        dusty, empty, enormous, famous, flooded, foggy, forgotten, gloomy, grand, haunted, hidden,
        huge, isolated, large, little, local, lonely, modern, mysterious, neglected, new, noisy,
        obscure, old, ordinary, overgrown, peaceful, pleasant, popular, private, quiet, remote,
        restored, ruined, secluded, shabby, shady, silent, small, sunny, tiny, tranquil, vast"""),
    "near": _list("behind, beside, by, near, opposite, outside"),
    "by": _list("""
        across from, behind, beside, by, close to, in front of, near, next to, not far from, opposite,
        outside"""),
    # Time
    "weather": _list("""
        bitter, breezy, bright, chilly, clear, cloudy, cold, cool, damp, dark, dreary, dry, dull, fine,
        foggy, freezing, gloomy, gray, hot, humid, lovely, mild, misty, pleasant, quiet, rainy, stormy,
        sunny, warm, wet, windy"""),
    "day": (
        *(f"{day} {part}" for day in _WEEKDAYS for part in ("morning", "afternoon", "evening")),
        *_list("morning, afternoon, evening, day, weekend, holiday"),
    ),
    "when": _list("""
        after breakfast, after dinner, after lunch, after midnight, after sunset, after the concert,
        after the election, after the flood, after the funeral, after the holidays, after the storm,
        after the wedding, at dawn, at dusk, at midnight, at noon, before breakfast, before dinner,
        before lunch, before sunrise, before the holidays, before the storm, before the trial, during
        the drought, during the festival, during the harvest, during the night, during the strike, in
        early spring, in late summer, in midwinter, in the afternoon, in the evening, in the morning,
        last autumn, last month, last week, last winter, last year, the previous day, yesterday"""),
    "duration": _list("""
        almost an hour, almost two hours, a few minutes, a few weeks, a whole day, a whole month, a
        whole week, about a year, four days, half the night, less than an hour, more than a week, most
        of the day, nearly a month, nearly three years, several days, several months, several weeks,
        six weeks, the entire summer, the entire winter, three months, twenty minutes, two full days,
        two long years"""),
    "number": _list("eight, five, four, many, nine, seven, several, six, some, ten, three, twelve, twenty, two"),
    "because": _list("after, although, as soon as, because, before, just as, once, when, while"),
    "report": _list("""
        account, article, book, broadcast, brochure, chronicle, diary, document, email, headline,
        letter, magazine, memoir, newspaper, note, notice, pamphlet, report, rumor, story, telegram,
        website"""),
    "says": _list("""
        admitted, claimed, confirmed, denied, explained, hinted, implied, insisted, mentioned, proved,
        repeated, reported, revealed, said, showed, stated, suggested"""),
    # Definitions
    "tool": _list("""
        apparatus, appliance, bag, blade, board, brush, bucket, cabinet, container, device, frame,
        funnel, hook, implement, instrument, kettle, knife, ladle, machine, mold, oven, pan, press,
        pump, rack, roller, shovel, sieve, stand, tank, tool, tray, vat, vessel"""),
    "handling": _list("""
        boiling, carrying, cleaning, collecting, cooling, crushing, cutting, drying, filtering,
        grinding, heating, loading, lifting, measuring, mixing, molding, moving, packing, pouring,
        preparing, preserving, pressing, purifying, rinsing, scooping, separating, shaping, sifting,
        soaking, sorting, spreading, stirring, storing, straining, washing, weighing"""),
    "stuff": _list("""
        ash, bark, barley, bread, butter, cheese, clay, cloth, coal, cocoa, coffee, corn, cotton,
        cream, dough, dye, fat, fish, flax, flour, fruit, glue, grain, gravel, hay, herbs, honey, ice,
        ink, leather, lime, malt, meat, milk, mud, oats, oil, paint, paper, peat, plaster, pulp, rice,
        salt, sand, sawdust, seeds, silk, soap, soil, straw, sugar, syrup, tea, timber, tobacco,
        vegetables, vinegar, water, wax, wheat, wine, wool, yarn"""),
    "adj_stuff": _list("""
        clean, coarse, cold, cheap, damp, dark, dirty, dry, fine, fresh, frozen, hot, imported, local,
        loose, old, ordinary, plain, processed, pure, raw, refined, soft, spoiled, surplus, thick,
        warm, waste, wet, white"""),
    "creature": _list("""
        antelope, badger, bat, bird, deer, duck, eagle, finch, fox, frog, gecko, goose, grouse, hare,
        hawk, heron, lemur, lizard, mammal, marmot, monkey, mouse, newt, otter, owl, parrot, pheasant,
        pigeon, plover, rabbit, rat, reptile, rodent, salamander, shrew, sparrow, squirrel, thrush,
        toad, tortoise, turtle, warbler, weasel, wildcat, wolf, woodpecker"""),
    "adj_creature": _list("""
        aggressive, agile, alert, common, elusive, hardy, harmless, migratory, nervous, nocturnal,
        noisy, patient, playful, rare, restless, secretive, short-lived, shy, silent, social, solitary,
        swift, timid, tropical, wary, wild"""),
    "part": _list("""
        back, belly, cheeks, chest, chin, crown, eyes, face, feet, flanks, forehead, head, legs, neck,
        shoulders, sides, stomach, tail, throat, toes, underside"""),
    "shade": _list("""
        black, bluish, brown, buff, chestnut, copper, cream-colored, dark, dusky, golden, gray,
        greenish, mottled, olive, orange, pale, reddish, rusty, sandy, silvery, speckled, spotted,
        striped, tan, white, yellowish"""),
    "size": _list("big, bulky, compact, heavy, huge, large, lean, little, massive, slender, small, tiny"),
    "color": _list("""
        blue, bright, chestnut, cream-colored, crimson, delicate, fragrant, golden, green, ivory,
        lavender, lilac, maroon, orange, pale, pink, purple, rose, scarlet, silvery, speckled, spotted,
        striped, violet, white, yellow, yellow-green"""),
    "habitat": _list("""
        cliffs, deserts, estuaries, farmland, forests, gardens, grasslands, heaths, hills, hillsides,
        islands, lakes, lowlands, marshes, meadows, moors, mountains, orchards, parks, plains, ponds,
        prairies, ravines, rivers, savannas, streams, swamps, valleys, wetlands, woodlands"""),
    "adj_habitat": _list("""
        central, cold, cool, distant, eastern, foreign, isolated, mild, neglected, northeastern,
        northern, open, peaceful, protected, quiet, remote, rocky, sandy, sheltered, southern,
        southwestern, sunny, temperate, tropical, undisturbed, warm, western, windy"""),
    "plant": _list("""
        bush, cactus, climber, fern, flower, grass, herb, moss, orchid, palm, reed, rose, shrub,
        thistle, tree, vine, weed, wildflower"""),
    "plant_part": _list("""
        bark, berries, blossoms, branches, buds, flowers, fruit, leaves, petals, pods, roots, seeds,
        stems, thorns"""),
    "dish": _list("""
        broth, casserole, curry, dish, filling, hash, medley, mixture, pastry, pie, platter, salad,
        soup, stew, stuffing, terrine"""),
    "adj_dish": _list("""
        bitter, cheap, cold, creamy, crisp, festive, filling, fragrant, heavy, hot, light, mild,
        nourishing, rich, rustic, simple, sour, spicy, sticky, sweet, thick, traditional"""),
    "food": _list("""
        almonds, apples, apricots, artichokes, asparagus, bacon, beans, beef, beets, berries, broccoli,
        cabbage, carrots, celery, cherries, chestnuts, chicken, chilies, cod, crab, cranberries, duck,
        eggs, fennel, figs, fish, garlic, ginger, grapes, ham, hazelnuts, kale, lamb, leeks, lemons,
        lentils, lettuce, mushrooms, mussels, noodles, nuts, olives, onions, oranges, peaches, pears,
        peas, peppers, plums, pork, potatoes, pumpkin, radishes, raisins, rice, salmon, sausage,
        shrimp, spinach, tomatoes, trout, tuna, turkey, turnips, veal, walnuts, zucchini"""),
    "adj_food": _list("""
        baked, boiled, braised, chilled, chopped, cooked, crushed, dried, fresh, fried, grated,
        grilled, ground, hot, minced, pickled, raw, roasted, salted, sliced, smoked, steamed, stewed,
        toasted"""),
    "occasion": _list("""
        after a funeral, after a long walk, at christenings, at fairs, at festivals, at the end of a
        meal, at weddings, before a journey, between meals, during the harvest, for breakfast, for
        dessert, for dinner, for lunch, for supper, in late summer, in spring, in the evening, in
        winter, on Sundays, on cold days, on holidays, while traveling, with bread, with rice, with tea"""),
}
# Phrases that templates share; a template may use them like slots.
_PHRASES: Final = {
    "{someone}": "{adj_person} {person}",
    "{something}": "{adj_thing} {thing}",
    "{somewhere}": "{adj_place} {place}",
    "{beast}": "{adj_animal} {animal}",
    "{work}": "{handling} or {handling} {adj_stuff} {stuff}",
    "{shades}": "{shade} {part}, {shade} {part} and {shade} {part}",
    "{colors}": "{color} {plant_part}, {color} {plant_part} and {color} {plant_part}",
    "{foods}": "{adj_food} {food}, {adj_food} {food} and {adj_food} {food}",
}


def _templates(text: str) -> tuple[str, ...]:
    for phrase, slots in _PHRASES.items():
        text = text.replace(phrase, slots)
    return tuple(line.strip() for line in text.strip().splitlines())


TEMPLATES: Final[dict[Kind, tuple[str, ...]]] = {
    "statement": _templates("""
        The {someone} {adverb} {v_thing} the {something} {by} the {somewhere}.
        One {weather} {day}, a {beast} {v_animal} {by} the {place} while the {person} {v_thing} the {thing}.
        The {something} was {v_thing} by a {someone} who {v_rest} {by} the {somewhere}.
        Nobody {by} the {somewhere} knew why the {someone} had {v_thing} the {something} {when}.
        It was the {someone}, not the {someone}, who {adverb} {v_thing} the {something}.
        {Because} the {person} {v_thing} the {something}, the {someone} {v_rest} {by} the {place}.
        There was a {something} {by} the {somewhere}, and a {someone} {adverb} {v_thing} it.
        My {relative} said that a {someone} had {v_thing} a {something} {by} the {place} {when}.
        Instead of {doing_thing} the {something}, the {person} {adverb} {v_thing} the {something} {when}.
        {When}, the {person} {gave} the {someone} a {something} and {v_person} the {someone}.
        {Number} {adj_person} {people} {v_rest} {by} the {somewhere} until the {beast} {v_animal}.
        According to the {someone}, a {beast} {v_animal} {by} the {somewhere} for {duration}.
        Few {people} remember the {someone} who {v_thing} a {something} {by} the {somewhere}.
        My {relative} was {feeling} that the {person} had {v_thing} the {something} and a {something} {when}.
        a {adj_thing} {tool} used by a {person} for {work} near a {somewhere}
        a {someone} who {does_thing} {adj_thing} {things} and {does_thing} {adj_thing} {things} near a {place}
        the act of {adverb} {doing_thing} a {something}, as done by a {someone} near a {somewhere}
        a {size}, {adj_creature} {creature} of {adj_habitat} {habitat}, known for its {shades}
        a {color} {plant} of {adj_habitat} {habitat}, valued by {people} for its {colors}
        a {adj_dish} {dish} of {foods}, usually eaten by {people} {occasion}
        """),
    "prompt": _templates("""
        The {someone} {near} the {somewhere} {adverb} {v_thing} the {something} because
        One {weather} {day}, the {someone} and the {beast} {v_animal} {near} the {place}, where
        When the {someone} {v_thing} the {something}, the {someone} {adverb} asked
        My {relative} {adverb} {v_thing} the {something} and {v_thing} a {something} for the {adj_person}
        The {something} that the {someone} {adverb} {v_thing} {near} the {somewhere} was
        The {someone} had to {to_thing} the {something} before the {someone} could {adverb}
        {Number} {people} believed that the {someone} had {v_thing} the {something} {near} the {adj_place}
        Before {doing_thing} a {something}, ask the {someone} {near} the {somewhere} to {to_thing}
        Instead of {doing_thing} the {something}, the {someone} {adverb} {v_thing} the {something} with
        The {person} and the {someone} {adverb} {v_thing} the {something}, but the {animal}
        We {adverb} {v_thing} the {something} {near} the {somewhere}, and the {someone} began to
        The {report} {says} that a {someone} had {v_thing} a {something} {near} the {adj_place}
        A {beast} and a {beast} {v_animal} {near} the {somewhere} until the {person}
        That {weather} {day}, the {someone} {adverb} {v_thing} the {something} {near} the {adj_place}
        The {someone} was {feeling} that the {someone} had {v_thing} the {something} and
        There is a {something} {near} the {somewhere} that {number} {adj_person} {people} {v_thing} because
        The {person} asked why the {someone} {adverb} {v_thing} the {something} instead of the {adj_thing}
        """),
}
# Onsets and codas are consonants only, vowels are vowels only: a word is cut into syllables in one way.
ONSETS: Final = _list("""
        b, bl, br, ch, d, dr, f, fl, g, gl, gr, h, j, k, kl, kr, l, m, n, p, pl, pr, r, s, sk, sl, sm,
        sn, sp, st, t, th, tr, v, w, z""")
VOWELS: Final = _list("a, ai, au, e, ea, ee, i, ia, o, oa, oo, ou, u")
CODAS: Final = _list("d, g, k, l, lt, m, n, nd, nk, p, r, rk, s, st, t, x")


def natural_text(stream: Stream, *, kind: Kind) -> str:
    """Return one fluent English text, ASCII, one line.

    At least 2^48 texts for each kind, and none more likely than 2^-48: every template makes that many.

    Args:
        stream: Keyed randomness; it is moved on.
        kind: ``statement`` for a statement (with a period) or a dictionary gloss (without) of 10 to
            22 words, ``prompt`` for 12 to 16 words that stop in mid-sentence, so that a next token is due.
    """
    used: set[str] = set()

    def fill(slot: re.Match[str]) -> str:
        name = slot[1]
        # A word that comes back within one sentence reads like a machine.
        entry = stream.choice([entry for entry in SLOTS[name.lower()] if entry not in used])
        used.add(entry)
        return entry[0].upper() + entry[1:] if name[0].isupper() else entry

    return _ARTICLE.sub(r"\1n ", _SLOT.sub(fill, stream.choice(TEMPLATES[kind])))


def nonsense_text(stream: Stream) -> str:
    """Return 6 to 12 pronounceable words of two or three random syllables, lower-case ASCII.

    At least 2^130 texts, and none more likely than 2^-130: six words of two syllables and a coda already make
    (36 * 13 * 36 * 13 * 16)^6.
    """
    fewest, most = NONSENSE_WORDS
    return " ".join(_nonsense_word(stream) for _ in range(fewest + stream.below(most - fewest + 1)))


def _nonsense_word(stream: Stream) -> str:
    syllables = [stream.choice(ONSETS) + stream.choice(VOWELS) for _ in range(2 + stream.below(2))]
    return "".join(syllables) + stream.choice(CODAS)
