"""Batch jobs over folders of pictures: `sp_fx.serving.folders` under the name that users import."""

from .serving.folders.batches import Batches, begin, pictures
from .serving.folders.batches import write_atomically as whole
from .serving.folders.results import Result, maps, results

__all__ = ["Batches", "Result", "begin", "maps", "pictures", "results", "whole"]
