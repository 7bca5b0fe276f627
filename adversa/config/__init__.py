"""What a user may set. Pydantic at this border only: each component is given its own section.

A default lives here and nowhere else. An unknown key stops the run and names the nearest valid one.
"""

from adversa.config.base import AUTO, Section, WeightPath
from adversa.config.classifier import Augment, Classifier
from adversa.config.cluster import Cluster
from adversa.config.codec import Codec
from adversa.config.curate import Curate
from adversa.config.data import Columns, Data, Phantom, Split
from adversa.config.denoiser import Denoiser
from adversa.config.evaluate import Evaluate
from adversa.config.faults import explain, keys
from adversa.config.generate import Generate
from adversa.config.listing import commented
from adversa.config.mine import Mine
from adversa.config.mix import Mix, Ratios
from adversa.config.quality import Quality
from adversa.config.reading import check, dump, load, packaged, read
from adversa.config.root import Config, verifier_of
from adversa.config.sweep import Count, Ratio, Search, Sweep
from adversa.config.tracking import Tracker, Trackers

__all__ = [
    "AUTO",
    "Augment",
    "Classifier",
    "Cluster",
    "Codec",
    "Columns",
    "Config",
    "Count",
    "Curate",
    "Data",
    "Denoiser",
    "Evaluate",
    "Generate",
    "Mine",
    "Mix",
    "Phantom",
    "Quality",
    "Ratio",
    "Ratios",
    "Search",
    "Section",
    "Split",
    "Sweep",
    "Tracker",
    "Trackers",
    "WeightPath",
    "check",
    "commented",
    "dump",
    "explain",
    "verifier_of",
    "keys",
    "load",
    "packaged",
    "read",
]
