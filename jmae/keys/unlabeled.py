"""Keys of systems that train on the split `unlabeled` (`jmae.data.unlabeled`)."""

from jmae.recipe import Key

UNLABELED_KEYS = {
    "data.anomaly_ratio": Key(
        -1.0,
        "Share of abnormal images in the unlabelled set, by data.unlabeled_labels; below 0, or without that file: as "
        "it is.",
        most=1,
    ),
    "data.unlabeled_size": Key(0, "Images of the unlabelled set at that share; 0: all.", least=0),
    "data.unlabeled_labels": Key("", "CSV id,label of the unlabelled rows, for that share alone."),
}
"""Keys of systems that train on the split `unlabeled`."""
