"""One HTML page about a wrapped network on given images: what it costs, which filters it uses, how its paths lie.

The page is one file and needs no network: pictures, styles, data and the plotting library are in it.
"""

from decouplify.reporting.findings import Fact, Findings, headline_facts, study
from decouplify.reporting.page import report, write_page

__all__ = ["Fact", "Findings", "headline_facts", "report", "study", "write_page"]
