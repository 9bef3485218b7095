"""Products and instructions for :mod:`hiper_lab.envs.webshop` without WebShop's data.

A generator in place of a data file: 600 products of 30 kinds in WebShop's own file format, made
from the tables below in a few hundredths of a second. A kind is what an instruction asks for ("hand
cream"); a product of a kind has some of the kind's attributes, options and a price.

Left out on purpose: scraped text, images, reviews. Scores on these products are not comparable
with published WebShop results.
"""

import random

SEED = 0
PRODUCTS_PER_KIND = 20
PATHS = {  # WebShop's five categories, and the head of product_category
    "beauty": "Beauty & Personal Care",
    "electronics": "Electronics",
    "fashion": "Clothing, Shoes & Jewelry",
    "garden": "Home & Kitchen",
    "grocery": "Grocery & Gourmet Food",
}
# Option values differ enough that the reward's fuzzy comparison tells them apart.
OPTIONS = {
    "color": "black | white | navy | olive | rust | sand | teal | plum | mustard | charcoal",
    "scent": "lavender | citrus | rose | unscented | cedar | eucalyptus",
    "shade": "coral | berry | clear | mauve | copper | peach",
    "volume": "50 ml | 120 ml | 200 ml | 350 ml",
    "count": "single | set of two | set of four | set of six",
    "fit": "small | medium | large",
    "shoe size": "37 | 38 | 39 | 40 | 41 | 42",
    "length": "half meter | one meter | two meters | three meters",
    "capacity": "5000 mah | 10000 mah | 20000 mah",
    "flavor": "ginger | mint | vanilla | cinnamon | sea salt | smoked paprika",
    "weight": "150 g | 300 g | 500 g | 1 kg",
    "finish": "walnut | matte black | brushed steel | ivory",
    "diameter": "12 cm | 18 cm | 24 cm | 30 cm",
}
# kind: category / aisle / attributes / names of options / lowest and highest price in dollars
KINDS = {
    "hand cream": "beauty / Skin Care / fragrance free, shea butter, fast absorbing, dry skin, "
    "vegan formula, non greasy, vitamin e / scent, volume / 5 24",
    "shampoo bar": "beauty / Hair Care / sulfate free, plastic free, oily hair, coconut oil, "
    "color safe, gentle cleansing, tea tree / scent, count / 6 28",
    "lip balm": "beauty / Lip Care / beeswax, sun protection, long lasting, cruelty free, chapped "
    "lips, natural ingredients, sugar free / shade, count / 3 19",
    "makeup brush": "beauty / Tools / synthetic bristles, bamboo handle, easy clean, travel case, "
    "soft touch, powder blending, precise tip / color, count / 8 45",
    "face mask": "beauty / Masks / green clay, hydrating, sensitive skin, hyaluronic acid, pore "
    "cleansing, paraben free, overnight / count, scent / 7 39",
    "nail polish": "beauty / Nails / quick dry, chip resistant, high gloss, breathable formula, "
    "non toxic, wide brush, gel effect / shade, count / 4 22",
    "wireless earbuds": "electronics / Audio / noise cancelling, water resistant, long battery, "
    "touch control, low latency, charging case, deep bass / color / 25 160",
    "phone stand": "electronics / Accessories / foldable, adjustable angle, aluminum alloy, non "
    "slip, cable slot, heavy base, fast assembly / color, finish / 9 55",
    "usb cable": "electronics / Cables / braided nylon, fast charging, tangle free, data transfer, "
    "gold plated, reinforced ends, lifetime warranty / color, length / 5 35",
    "desk speaker": "electronics / Audio / stereo sound, bluetooth, compact size, wooden case, "
    "bass boost, plug and play, auto shutoff / finish / 30 210",
    "power bank": "electronics / Power / quick charge, dual port, slim design, led display, "
    "overheat protection, airline approved, solar panel / color, capacity / 18 90",
    "tablet case": "electronics / Accessories / shock proof, pencil holder, auto sleep, "
    "hand strap, lightweight, magnetic closure, kids friendly / color / 14 70",
    "rain jacket": "fashion / Outerwear / waterproof, windproof, packable, hooded, reflective "
    "strips, taped seams, ventilated back / color, fit / 35 190",
    "running socks": "fashion / Socks / moisture wicking, arch support, cushioned sole, seamless "
    "toe, merino wool, odor control, quick drying / color, fit / 8 36",
    "canvas sneakers": "fashion / Shoes / rubber sole, lace up, arch comfort, memory foam, "
    "organic cotton, low top, machine washable / color, shoe size / 28 120",
    "linen shirt": "fashion / Shirts / regular fit, long sleeve, button down, breathable, wrinkle "
    "resistant, stand collar, chest pocket / color, fit / 22 110",
    "wool scarf": "fashion / Scarves / extra soft, fringed edges, hand woven, itch free, "
    "reversible, wide wrap, gift box / color / 16 95",
    "leather belt": "fashion / Belts / full grain, removable buckle, ratchet closure, scratch "
    "resistant, stitched edges, handmade, nickel free / color, fit / 18 85",
    "table lamp": "garden / Lighting / dimmable, energy saving, ceramic base, linen shade, touch "
    "switch, bedside, flicker free / finish / 24 180",
    "throw blanket": "garden / Bedding / double sided, machine wash, fleece lined, lint free, "
    "hypoallergenic, chunky knit, fade resistant / color, fit / 19 130",
    "plant pot": "garden / Planters / drainage hole, matching saucer, frost proof, self watering, "
    "uv stable, glazed ceramic, hanging / color, diameter / 7 60",
    "floor cushion": "garden / Cushions / removable cover, thick filling, cotton canvas, carry "
    "handle, round shape, pet friendly, stain resistant / color, count / 22 140",
    "wall shelf": "garden / Shelving / floating, solid wood, hidden brackets, easy assembly, "
    "rounded corners, space saving, heavy duty / finish, count / 20 150",
    "bath towel": "garden / Bath / turkish cotton, highly absorbent, oeko tested, hanging loop, "
    "plush, double stitched, bleach safe / color, count / 12 75",
    "herbal tea": "grocery / Tea / caffeine free, loose leaf, fair trade, whole flowers, "
    "compostable bags, calming blend, no added sugar / flavor, weight / 5 30",
    "roasted almonds": "grocery / Nuts / dry roasted, high protein, gluten free, resealable bag, "
    "lightly salted, non gmo, low carb / flavor, weight / 6 42",
    "dark chocolate": "grocery / Chocolate / single origin, dairy free, stone ground, high cocoa, "
    "soy free, individually wrapped, keto friendly / flavor, count / 4 38",
    "granola": "grocery / Breakfast / whole grain, nut free, low sodium, baked clusters, high "
    "fiber, honey sweetened, family size / flavor, weight / 5 26",
    "pasta sauce": "grocery / Sauces / slow cooked, vine tomatoes, low fat, garlic free, "
    "vegan friendly, glass jar, extra chunky / flavor, count / 4 33",
    "olive oil": "grocery / Oils / cold pressed, extra virgin, unfiltered, early harvest, dark "
    "bottle, peppery finish, family farm / volume, count / 9 64",
}  # fmt: skip
# Kinds that are asked for only in the split "unseen": the last of each category.
HELD_OUT = ("nail polish", "tablet case", "leather belt", "bath towel", "olive oil")
SYLLABLES = "al bren cor dun el far gal hol ing jor kel lum mar nor or per quil ros sel tam ul ves"
STYLES = "Classic Everyday Essential Studio Harbor Meadow Nordic Signature Urban Weekend".split()
LEADS = (
    "A {kind} made by {brand} in small batches.",
    "{brand} designed this {kind} for everyday use.",
    "The {style} {kind} is the one {brand} is known for.",
    "Our customers asked for a better {kind}, and {brand} listened.",
)
BULLETS = (
    "{attribute}: checked by hand before it leaves the workshop.",
    "You will notice the difference: {attribute}.",
    "What sets it apart: {attribute}, without compromise.",
    "{attribute}, exactly as described.",
)


def generate_catalogue(seed: int = SEED) -> tuple[list[dict], dict[str, dict]]:
    """Products and instructions, in the form of WebShop's items_shuffle and items_ins files.

    Args:
        seed: Draws everything; the same seed gives the same catalogue everywhere.

    Returns:
        The products in shuffled order, and per asin its attributes and instruction.

    Example:
        >>> products, instructions = generate_catalogue()
        >>> len(products), len({p["category"] for p in products})
        (600, 5)
        >>> instructions[products[0]["asin"]]["instruction"].startswith("Find me ")
        True
    """
    rng = random.Random(f"catalogue/{seed}")
    products, instructions = [], {}
    for kind, row in KINDS.items():
        category, aisle, attributes, options, prices = (part.strip() for part in row.split(" / "))
        for _ in range(PRODUCTS_PER_KIND):
            product, instruction = _product(
                kind, category, aisle, attributes.split(", "), options.split(", "),
                tuple(map(int, prices.split())), rng,
            )  # fmt: skip
            if product["asin"] not in instructions:
                products.append(product)
                instructions[product["asin"]] = instruction
    rng.shuffle(products)
    return products, instructions


def _product(
    kind: str, category: str, aisle: str, pool: list[str], option_names: list[str],
    prices: tuple[int, int], rng: random.Random,
) -> tuple[dict, dict]:  # fmt: skip
    brand = "".join(rng.sample(SYLLABLES.split(), 3)).capitalize()
    style = rng.choice(STYLES)
    attributes = rng.sample(pool, rng.randint(4, 6))
    shown = ", ".join(a.title() for a in attributes[:2])
    bullets = [
        rng.choice(BULLETS).format(attribute=a).capitalize() for a in rng.sample(attributes, 4)
    ]
    rest = ", ".join(attributes)
    options = {}
    for name in option_names:
        values = OPTIONS[name].split(" | ")
        chosen = sorted(rng.sample(values, rng.randint(2, min(4, len(values)))), key=values.index)
        options[name] = [{"value": value} for value in chosen]
    product = {
        "asin": "H" + "".join(rng.choices("0123456789BCDFGKLMNPRSTVWXZ", k=9)),
        "name": f"{brand} {style} {kind.title()}, {shown}",
        "full_description": f"{rng.choice(LEADS).format(kind=kind, brand=brand, style=style)} "
        f"In short: {rest}.",
        "small_description": bullets,
        "pricing": _pricing(prices, rng),
        "customization_options": options,
        "category": category,
        "query": kind,
        "product_category": f"{PATHS[category]} › {aisle} › {kind.title()}",
    }
    wanted = rng.sample(attributes, rng.randint(1, 3))
    text = f"Find me {', '.join(wanted[:2])} {kind}"
    if len(wanted) > 2:
        text += f" with {wanted[2]}"
    return product, {
        "attributes": attributes,
        "instruction": text,
        "instruction_attributes": wanted,
    }


def _pricing(prices: tuple[int, int], rng: random.Random) -> str:
    """One price, or a range in a third of the products; none, rarely."""
    low = rng.uniform(*prices)
    draw = rng.random()
    if draw < 0.04:
        return ""
    return f"${low:.2f}" if draw < 0.7 else f"${low:.2f}${low * rng.uniform(1.1, 1.5):.2f}"
