"""The page that every evaluation writes (`write_report`), and the page that compares several runs (`compare`).

A page holds everything itself: no script, no font and no request. Its content security policy forbids them, so the page
looks the same on a cluster's file share, on a phone, and in ten years. Its slider is made of radio buttons and CSS.
Ids, names and configuration come from data: Jinja escapes them, and they are never part of a chart.
"""

from jmae.report.cases import Case, choose_cases, one_slice, shown_voxel, slice_side, worth_showing
from jmae.report.page import write_report
from jmae.report.pictures import PERCENTILES, Scale, blend, colour_scale
from jmae.report.words import flat_settings, no_curves_reason, result_sentences, short_training, system_description

__all__ = [
    "PERCENTILES",
    "Case",
    "Scale",
    "blend",
    "choose_cases",
    "colour_scale",
    "flat_settings",
    "no_curves_reason",
    "one_slice",
    "result_sentences",
    "short_training",
    "shown_voxel",
    "slice_side",
    "system_description",
    "worth_showing",
    "write_report",
]
