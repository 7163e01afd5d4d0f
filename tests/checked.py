"""The checker of types: with it every call in `jmae` is compared with its annotations, shapes of arrays included."""

from beartype import BeartypeConf, beartype
from jaxtyping import install_import_hook

check = beartype(conf=BeartypeConf(is_pep484_tower=True))  # a whole number is a number, as for mypy


def install() -> None:
    """Has all modules of `jmae` checked that are imported from now on."""
    install_import_hook("jmae", "checked.check")
