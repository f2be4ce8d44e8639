"""Batch jobs over folders of pictures: `sp_fx.serving.batch_jobs` under the name that users import."""

from .serving.batch_jobs import Batches, begin, pictures
from .serving.batch_jobs import write_atomically as whole

__all__ = ["Batches", "begin", "pictures", "whole"]
