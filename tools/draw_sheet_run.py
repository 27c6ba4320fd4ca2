"""What tools/draw_sheet does once it is inside its environment: photographs and outlines to a folder, packed, shown.

The photographs are those of scikit-image's wheel, in the public domain: Chelsea the cat by Stéfan van der Walt, a cup
of coffee by Rachel Michetti, and the astronaut Eileen Collins by NASA.
"""

from __future__ import annotations

import json
import tempfile
import zipfile
from pathlib import Path
from typing import Any

from demo_run import command, download_wheel

Points = list[tuple[int, int]]

OUTLINES: dict[str, list[tuple[str, Points]]] = {
    "astronaut": [
        (
            "person",
            [
                *((155, 90), (165, 45), (210, 18), (250, 17), (290, 45), (300, 90), (285, 130), (262, 150), (262, 160)),
                *((300, 190), (305, 235), (340, 260), (360, 310), (362, 355), (310, 370), (282, 430), (285, 511)),
                *((100, 511), (60, 460), (25, 420), (30, 330), (50, 290), (100, 230), (115, 190), (130, 160)),
                *((180, 150), (182, 130), (165, 110)),
            ],
        ),
        (
            "helmet",
            [
                *((285, 420), (320, 362), (380, 343), (440, 350), (485, 395), (505, 460), (511, 511), (282, 511)),
                (278, 460),
            ],
        ),
        (
            "shuttle",
            [
                *((366, 235), (375, 185), (382, 60), (391, 40), (400, 0), (426, 0), (436, 45), (450, 60), (455, 210)),
                *((440, 275), (375, 275)),
            ],
        ),
    ],
    "chelsea": [
        (
            "cat",
            [
                *((35, 0), (385, 0), (362, 60), (352, 120), (345, 180), (330, 235), (290, 299), (45, 299), (40, 250)),
                *((0, 220), (0, 105), (32, 90)),
            ],
        ),
    ],
    "coffee": [
        (
            "saucer",
            [
                *(
                    (78, 210),
                    (95, 150),
                    (140, 95),
                    (180, 75),
                    (400, 90),
                    (450, 140),
                    (478, 215),
                    (465, 280),
                    (430, 330),
                ),
                *((370, 370), (300, 385), (230, 378), (160, 350), (105, 300)),
            ],
        ),
        (
            "cup",
            [
                *((174, 105), (185, 65), (215, 35), (255, 20), (320, 20), (370, 45), (402, 90), (398, 140), (375, 180)),
                *((370, 215), (340, 240), (290, 248), (250, 242), (245, 295), (215, 308), (198, 290), (205, 240)),
                *((180, 200), (178, 150)),
            ],
        ),
        (
            "spoon",
            [
                *(
                    (400, 72),
                    (412, 66),
                    (424, 72),
                    (420, 95),
                    (388, 205),
                    (392, 240),
                    (404, 275),
                    (395, 308),
                    (370, 323),
                ),
                *((345, 315), (328, 290), (330, 265), (348, 248), (368, 240), (374, 215)),
            ],
        ),
    ],
}


def draw(out: Path) -> None:
    """Write the sheet to `out`."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary, "annotated")
        folder.mkdir()
        wheel = download_wheel(Path(temporary), "fastload show")
        with zipfile.ZipFile(wheel) as archive:
            for name, outlines in OUTLINES.items():
                (folder / f"{name}.png").write_bytes(archive.read(f"skimage/data/{name}.png"))
                (folder / f"{name}.json").write_text(json.dumps(annotation(name, outlines)))
        store = str(Path(temporary, "annotated.lmdb"))
        command("pack", str(folder), store, "--encode", "jpeg")
        command("show", store, "-o", str(out), "--transform", "train", "--columns", "6")


def annotation(name: str, outlines: list[tuple[str, Points]]) -> dict[str, Any]:
    """labelme's JSON for one photograph."""
    shapes = [{"label": label, "points": points, "shape_type": "polygon"} for label, points in outlines]
    return {"version": "5.5.0", "flags": {}, "shapes": shapes, "imagePath": f"{name}.png", "imageData": None}
