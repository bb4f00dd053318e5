"""One small drawing for each method: which patches its parts see. Made with the scripts' own masks.

    python results/drawings.py          # writes results/pictures/idea_METHOD.png
"""
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch
from PIL import Image, ImageDraw, ImageFont

import efficient_mae
import emae
import mae

GRID, CELL, GAP, TOP, BOTTOM = 8, 18, 60, 34, 30
SEEN, EMPTY, PREDICTED, DROPPED = (40, 70, 120), (236, 236, 236), (240, 160, 60), (250, 250, 250)
FOLDS = [(90, 150, 90), (200, 110, 110), (150, 110, 190)]


def panel(*groups):
    """A grid of patches as colours: each group is (ids, colour), the rest is empty."""
    colours = [EMPTY] * GRID**2
    for ids, colour in groups:
        for patch in ids.tolist():
            colours[patch] = colour
    return colours


def draw(name, panels):
    """Writes a picture: panels (title, colours, note) from left to right, with arrows between them."""
    side = GRID * CELL
    sheet = Image.new("RGB", (len(panels) * (side + GAP) + GAP // 2, TOP + side + BOTTOM), "white")
    ink, font = ImageDraw.Draw(sheet), ImageFont.load_default(14)
    for number, (title, colours, note) in enumerate(panels):
        left = GAP // 2 + number * (side + GAP)
        ink.text((left + side // 2, 10), title, "black", font, anchor="ma")
        for patch, colour in enumerate(colours):
            x, y = left + patch % GRID * CELL, TOP + patch // GRID * CELL
            ink.rectangle((x, y, x + CELL - 2, y + CELL - 2), colour, (200, 200, 200))
        ink.text((left + side // 2, TOP + side + 6), note, "black", font, anchor="ma")
        if number and not title.startswith(("part", "teacher")):        # those stand side by side
            y = TOP + side // 2
            ink.line((left - GAP + 12, y, left - 12, y), "black", 2)
            ink.polygon(((left - 10, y), (left - 18, y - 5), (left - 18, y + 5)), "black")
    sheet.save(ROOT / f"results/pictures/idea_{name}.png")


def main():
    torch.manual_seed(0)
    noise = torch.rand(1, GRID**2)
    keep, remove = (ids[0] for ids in mae.random_masking(noise, 16))
    draw("mae", [("encoder sees", panel((keep, SEEN)), "a quarter"),
                 ("decoder sees", panel((keep, SEEN), (remove, (205, 205, 205))), "grey: mask tokens"),
                 ("loss", panel((remove, PREDICTED)), "removed pixels")])

    parts, others = emae.random_masking(noise, 4)
    both = others[0][torch.isin(others[0], others[1])]
    draw("emae", [*((f"part {i + 1} sees", panel((part, SEEN)), "") for i, part in enumerate(parts)),
                  ("1 and 2 must agree", panel((both, PREDICTED)), "predicted by both")])

    keep, remove = efficient_mae.random_masking(noise, 9)
    distance = efficient_mae.p2dist_approximate(keep, remove, (GRID, GRID), 16)[0]
    keep, remove, order = keep[0], remove[0], distance.argsort()
    shades = [(remove[i:i + 1], (255, 200 - int(150 * distance[i] / 26), 90)) for i in order if distance[i] <= 26]
    hard = remove[distance > 26]
    draw("efficient_mae", [("encoder sees", panel((keep, SEEN)), "15 %"),
                           ("decoder sees", panel((keep, SEEN), *shades, (hard, DROPPED)), "white: d > 26, dropped"),
                           ("loss", panel(*shades), "redder: larger d, less weight")])

    keep, remove = (ids[0] for ids in mae.random_masking(noise, 16))
    draw("robust_mae", [("encoder sees", panel((keep, SEEN)), "a quarter"),
                        ("enter before block 8", panel((keep, SEEN), (remove[:16], FOLDS[2])), "mid-level, optional"),
                        ("decoder sees", panel((keep, SEEN), (remove, (205, 205, 205))), "30 % of attention dropped"),
                        ("loss", panel((remove, PREDICTED)), "pixels normalised by Eq. 3")])

    folds = [(fold, colour) for fold, colour in zip(remove.split(16), FOLDS)]
    draw("sdae", [("student sees", panel((keep, SEEN)), "a quarter"),
                  *((f"teacher, fold {i + 1}", panel(fold), "seen alone") for i, fold in enumerate(folds)),
                  ("loss", panel((remove, PREDICTED)), "features, fold by fold")])


if __name__ == "__main__":
    main()
