"""The page that every evaluation writes, and the page that compares several runs."""

# A page holds everything itself and asks for nothing: no script, no font, no request (its content security policy
# forbids them), so it opens the same from a cluster's file share, a phone, or an archive in ten years; its slider is
# radio buttons and CSS. What comes from data (ids, names, configuration) is only ever written through Jinja's
# autoescape and never into a figure.

from jmae.report.cases import Case, choose_cases, held_side, one_slice
from jmae.report.page import write_report
from jmae.report.pictures import PERCENTILES, Scale, blend, colour_scale
from jmae.report.words import described, flat, headline, without_curves

__all__ = [
    "PERCENTILES",
    "Case",
    "Scale",
    "blend",
    "choose_cases",
    "colour_scale",
    "described",
    "flat",
    "headline",
    "held_side",
    "one_slice",
    "without_curves",
    "write_report",
]
