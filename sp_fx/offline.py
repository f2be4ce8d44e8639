"""Batch jobs over folders of pictures: what `sp_fx.serving.batch_jobs` has, under the name that users import."""

from .serving.batch_jobs import Batches, begin, pictures, whole

__all__ = ["Batches", "begin", "pictures", "whole"]
