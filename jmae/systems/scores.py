"""What the scores of our systems are, in words for the report (`report.words.score_meanings`)."""

TOKENS = "distance of the image's tokens from those of normal training images"
SCORES = {
    "ppii": "mean of the map",
    "ppii_top_quarter": "mean of the highest quarter of the map's values",
    "ppii_highest": "highest value of the map",
    "tokens": f"{TOKENS}; a token is what the network makes of one patch (a small square or block)",
    "tokens_a": f"{TOKENS}, by the encoder of module A",
    "tokens_b": f"{TOKENS}, by the encoder of module B",
    "tokens_signed": "whether the image's tokens are nearer to those of normal images or to those of the unlabelled "
    "images that look abnormal; a token is what the network makes of one patch (a small square)",
    "stage1": "probability of an anomaly, by a classifier of normal images and images with drawn anomalies",
    "stage2": "difference of the reconstructions of the two modules",
    "stage2_error": "reconstruction error of module A less that of module B",
    "stage2_nearer": "difference of the reconstructions where module B is nearer to the image",
    "mae": "reconstruction error of the first network",
    "module_a": "reconstruction error of module A, which learned from normal images",
    "maemi": "squared reconstruction error",
    "ms_ssim": "how much the reconstruction differs in structure from the image",
    "ms_ssim_patches": "ms_ssim as a mean over each patch",
    "ms_ssim_product": "ms_ssim as a product over scales",
    "mse": "mean squared error of the reconstruction",
    "l1": "mean absolute error of the reconstruction",
    "patches": "reconstruction error of the worst tenth of the patches",
    "simsid": "by how many standard deviations the discriminator finds the reconstruction less real than those of the "
    "training images",
    "A": "simsid on a scale from 0 to 1",
    "difference": "as simsid, for how much less real the image is than its reconstruction",
    "kl": "Kullback-Leibler divergence between the image and the student's reconstruction",
    "kl_teacher": "Kullback-Leibler divergence between the image and the teacher's reconstruction",
}
FROM_MAP = ("maemi",)  # of `SCORES`: what the map shows; the setting `evaluation.case_score` makes a score of it
MAPS = {  # what the values of a map are, by the primary score
    **dict.fromkeys(("ppii", "ppii_top_quarter", "ppii_highest"), "probability of an anomaly, from 0 to 1"),
    "maemi": "squared reconstruction error, in the unit of the prepared image",
}


def from_map(rule: str, share: float, above: float) -> str:
    """How a case's score comes from its map, in words (`scoring.case_score`)."""
    if rule == "part":
        return f"number of voxels of the largest connected part of the map above {above:g}"
    return "mean of the map" if rule == "mean" else f"mean of the highest {100 * share:.3g} % of the map's values"
