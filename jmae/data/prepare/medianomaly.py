"""The seven sets of MedIAnomaly (Cai et al., Medical Image Analysis 2025), one at a time, in the folder of its name.

RSNA, VinCXR, BrainTumor, LAG   data.json and images/ (`ddad`). MedIAnomaly itself ignores the unlabelled lists.
ISIC2018_Task3                  as ISIC publishes it (`isic2018`)
Camelyon16                      train/good, test/good, test/Ungood (`folders`)
BraTS2021                       train, test/normal, test/tumor; masks test/annotation, with seg in the place of flair
"""

from pathlib import Path

from jmae.data.prepare import Prepared, ddad, folders, isic2018
from jmae.data.prepare.tree import named
from jmae.errors import InputError

SETS = ("RSNA", "VinCXR", "BrainTumor", "LAG", "ISIC2018_Task3", "Camelyon16", "BraTS2021")
COLOUR = ("LAG", "Camelyon16", "ISIC2018_Task3")
LICENCE = "of the set's own authors (the collection: Zenodo 12677223)"


def prepare(root: Path, out: Path, seed: int) -> Prepared:
    """Returns the rows, and writes hidden labels where there are some. Raises InputError with all problems."""
    if inner := [name for name in SETS if (root / name).is_dir()]:
        raise InputError(f"{root}: has the sets {', '.join(inner)}: name the folder of one, as {root / inner[0]}")
    name = next((name for name in SETS if name.lower() == root.name.lower()), "")
    recipe = "memmc_mae:paper_colour" if name in COLOUR else "memmc_mae:paper"
    if (root / "data.json").is_file():
        made = ddad.prepare(root, out, seed)
        recipe = made.recipe if name not in COLOUR else recipe
        flags = made.flags if recipe.startswith("amae") else ""
        return made._replace(recipe=recipe, flags=flags, licence=LICENCE)
    if named(root, "ISIC2018_Task3_Training_GroundTruth.csv"):
        return isic2018.prepare(root, out, seed)
    made = folders.sorted_folders(root, out)
    tumours = [row for row in made.rows if row.extra["class"] == "tumor"]
    if tumours and (bare := [row for row in tumours if not row.mask]):
        raise InputError(
            f"{bare[0].image[0]}: has no mask in annotation, like {len(bare) - 1} more: copy the set again"
        )
    return made._replace(recipe=recipe, licence=LICENCE)
