"""jmae: unsupervised anomaly detection in medical images with masked autoencoders and their relatives."""

__version__ = "0.1.0"
