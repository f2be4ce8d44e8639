"""Batch jobs over folders of pictures: `sp_fx.serving.folder_jobs` under the name that users import."""

from .serving.folder_jobs import Batches, begin, pictures
from .serving.folder_jobs import write_atomically as whole

__all__ = ["Batches", "begin", "pictures", "whole"]
