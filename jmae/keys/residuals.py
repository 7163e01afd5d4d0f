"""Keys of the further scores of a reconstruction (`jmae.residuals`)."""

from jmae.recipe import Key

NAMES = ("smoothed", "ssim", "mahalanobis", "feature")

KEYS = {
    "evaluation.residual": Key(
        "none",
        'The primary score: "none", the system\'s own; ours, of the reconstruction (`jmae.residuals`): "smoothed", '
        '"ssim", "mahalanobis" or "feature".',
        choices=("none", *NAMES),
    ),
    "evaluation.smooth": Key(
        0.25, "Deviation of the Gaussian that smooths a residual.", "patch edges along each axis", least=0, most=1
    ),
    "evaluation.expect": Key(
        "none",
        'What divides evaluation.residual: its mean in held-out normals at the same "position", for aligned images, or '
        'where the reconstruction has the same "appearance"; "none": nothing.',
        choices=("none", "position", "appearance"),
    ),
    "evaluation.case_score": Key(
        "mean",
        'Score of a case by evaluation.residual: the "mean" of its map, the mean of its "top", or the size of its '
        'largest connected "part".',
        choices=("mean", "top", "part"),
    ),
    "evaluation.part_above": Key(2.0, "Value of the map above which a voxel belongs to a part.", above=0),
}

IMAGE_KEYS = {
    "evaluation.top": Key(
        0.01, "Share of the pixels, the highest of the map, that evaluation.case_score=top averages.", above=0, most=1
    ),
}

VOLUME_KEYS = {
    "evaluation.case_score": Key(
        "top",
        'Score of a case: the "mean" of its map in the region, the mean of its "top", or the size of its largest '
        'connected "part".',
        choices=("mean", "top", "part"),
    ),
}
